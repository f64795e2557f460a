"""What one visitor of the demo page may ask for at once, so that others get their turn."""

from collections import Counter
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MOST_WAITING, MOST_WAITING_OF_ONE = 32, 3
"""Requests in the queue: of all visitors, and of each."""
MOST_UPLOADS, MOST_UPLOADS_OF_ONE = 8, 2
"""Uploads under way at once: of all addresses, and of each."""
LARGEST_UPLOAD = 50 * 2**20
"""Bytes of a request, with all of its files."""


def limit_waiting(queue: Any) -> None:
    """Have a queue of gradio refuse (503) a session's requests while MOST_WAITING_OF_ONE of them wait in it.

    Sessions whose names cannot be written (lone surrogates) are refused, too (400): gradio fails on them later.
    """
    push = queue.push

    async def push_fairly(body: Any, request: Any, username: str | None) -> Any:
        if not is_text(body.session_hash or ""):
            return False, "the session's name is no text", "error"
        waiting = [event for part in queue.event_queue_per_concurrency_id.values() for event in part.queue]
        if sum(event.session_hash == body.session_hash for event in waiting) >= MOST_WAITING_OF_ONE:
            return False, f"{MOST_WAITING_OF_ONE} requests of yours wait already; try again after them", "queue_full"
        return await push(body=body, request=request, username=username)

    queue.push = push_fairly


def is_text(name: str) -> bool:
    """Whether a string can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class UploadLimit:
    """ASGI middleware that bounds the size of uploads and how many arrive at once; `after` is called after each."""

    def __init__(self, app: ASGIApp, after: Callable[[], None]) -> None:
        self.app, self.after = app, after
        self.arriving: MutableMapping[str, int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        refusal = self._refusal(address, Headers(scope=scope).get("content-length", ""))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.arriving[address] += 1
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:  # nobody is there to be answered, and nothing is wrong here
            pass
        finally:
            self.arriving[address] -= 1
            if not self.arriving[address]:
                del self.arriving[address]
            self.after()

    def _refusal(self, address: str, length: str) -> PlainTextResponse | None:
        if not length.isdecimal():
            return PlainTextResponse("an upload must say its length", HTTPStatus.LENGTH_REQUIRED)
        if int(length) > LARGEST_UPLOAD:
            sentence = f"at most {LARGEST_UPLOAD // 2**20} MB may be uploaded; shrink the image"
            return PlainTextResponse(sentence, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self.arriving[address] >= MOST_UPLOADS_OF_ONE or sum(self.arriving.values()) >= MOST_UPLOADS:
            return PlainTextResponse("too many uploads at once; try again", HTTPStatus.SERVICE_UNAVAILABLE)
        return None
