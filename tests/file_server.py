"""A web server on the loopback that misbehaves as asked, and sites of others as it plays them."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import requests

DRIVE_PAGES = Path(__file__).parent / "drive_pages"


class FileServer:
    """Serves `files` by path. A file is its bytes, or a page (status, text of HTML or JSON).

    breaks: how many answers with a file stop half-way. ranges: whether Range is heeded. stall: an event; answers
    stop half-way until it is set. asked: (path, Range header) of every request for a file. encoding: a
    Content-Encoding that answers claim.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes | tuple[int, str]] = {}
        self.breaks, self.ranges, self.asked = 0, True, []
        self.stall: threading.Event | None = None
        self.half_way = threading.Event()
        self.encoding = ""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.answer(self, body=True)

            def do_HEAD(self) -> None:
                owner.answer(self, body=False)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        name = (
            url.path + (f"?id={query['id'][0]}" if "id" in query else "") + ("&confirm" if "confirm" in query else "")
        )
        content = self.files.get(name, (404, "<html>not found</html>"))
        if isinstance(content, tuple):
            status, text = content
            kind = "application/json" if text.startswith(("[", "{")) else "text/html; charset=utf-8"
            self.send(request, status, {"Content-Type": kind}, text.encode() if body else b"", len(text.encode()))
            return
        start = 0
        if body:
            asked = request.headers.get("Range")
            self.asked.append((name, asked))
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        headers = {"Content-Type": "application/octet-stream", "ETag": '"1"', "X-Repo-Commit": "c" * 40}
        headers["Content-Disposition"] = 'attachment; filename="weights.pth"'
        if self.encoding:
            headers["Content-Encoding"] = self.encoding
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(request, 206 if start else 200, headers, content[start:] if body else b"", len(content) - start)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, length: int
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            request.send_header(name, value)
        request.end_headers()
        half = len(content) // 2
        if status in (200, 206) and content and "ETag" in headers and (self.breaks > 0 or self.stall):
            self.breaks -= 1
            request.wfile.write(content[:half])
            request.wfile.flush()
            self.half_way.set()
            if self.stall:
                self.stall.wait(60)
            request.close_connection = True
            return
        request.wfile.write(content)

    # -- sites of others ------------------------------------------------------------------------------------------

    def play_google_drive(self, monkeypatch: object, folder: str, weights: bytes | None, quota: bool = False) -> None:
        """A folder of Google Drive as recorded: a log and a weight file too large for Google to scan for viruses."""
        get = requests.Session.get

        def get_from_here(session: requests.Session, url: str, **kwargs: object) -> requests.Response:
            here = re.sub(r"https://(drive|docs|drive\.usercontent)\.google\.com", self.url, url)
            return get(session, here, **kwargs)

        monkeypatch.setattr(requests.Session, "get", get_from_here)
        listing = (DRIVE_PAGES / ("empty.html" if weights is None else "folder.html")).read_text()
        file = "1aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
        self.files[f"/embeddedfolderview?id={folder}"] = (200, listing)
        page = "quota.html" if quota else "scan_warning.html"
        self.files[f"/uc?id={file}"] = (200, (DRIVE_PAGES / page).read_text())
        self.files[f"/download?id={file}&confirm"] = weights or b""

    def play_hugging_face(self, repository: str, files: dict[str, bytes]) -> None:
        """A repository of the Hugging Face Hub."""
        tree = [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
        self.files[f"/api/models/{repository}/tree/main"] = (200, json.dumps(tree))
        for name, content in files.items():
            self.files[f"/{repository}/resolve/main/{name}"] = content


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A server for the duration of the block."""
    server = FileServer()
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if server.stall:
            server.stall.set()
        server.server.shutdown()
        server.server.server_close()
        thread.join()
