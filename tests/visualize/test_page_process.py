"""The demo page as a process, spoken to as a hostile or unlucky browser would: plain HTTP and real signals."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys

import pytest
from awkward_images import write_text
from PIL import Image
from support import ROOT, command

httpx = pytest.importorskip("httpx", reason="httpx comes with gradio (requirements-demo.txt)")
pytest.importorskip("gradio", reason="gradio is an extra (requirements-demo.txt)")

from visualize.limits import LARGEST_UPLOAD, MOST_WAITING_OF_ONE  # noqa: E402

SLOW = 120


class Server:
    """python -m visualize.app in a temporary folder where gradio's usual place is barred."""

    def __init__(self, folder, *argv):
        (folder / "gradio").touch(exist_ok=True)
        self.folder, self.log = folder, folder / "stderr.txt"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "visualize.app", "--model", "debiformer_nano", "--port", str(port), *argv],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(folder)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        self.address = re.search(r"http://\S+?(?=/? )", line)[0]

    def end(self, number=signal.SIGKILL):
        """The exit code after a signal."""
        self.process.send_signal(number)
        self.process.communicate(timeout=SLOW)
        return self.process.returncode

    @property
    def own_folder(self):
        (found,) = self.folder.glob("visualize-*")
        return found

    def visit(self, session="one"):
        return Visit(self, session)


class Visit:
    """A browser's session, without the browser."""

    def __init__(self, server, session):
        self.http = httpx.Client(base_url=f"{server.address}/gradio_api", timeout=SLOW)
        self.session = session
        config = httpx.get(f"{server.address}/config", timeout=SLOW).json()
        self.events = {event["api_name"]: event for event in config["dependencies"]}
        self.ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}

    def join(self, event, *values, event_data=None):
        """Queue an event; the response."""
        body = {
            "data": [None, *values],
            "fn_index": self.events[event]["id"],
            "session_hash": self.session,
            "event_data": event_data,
        }
        content = json.dumps(body)  # as ASCII, with lone surrogates escaped
        return self.http.post("/queue/join", content=content, headers={"content-type": "application/json"})

    def outcome(self):
        """What became of the event queued last."""
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if '"process_completed"' in line:
                    return json.loads(line.removeprefix("data:"))
        raise AssertionError("the event was not answered")

    def do(self, event, *values, event_data=None):
        assert self.join(event, *values, event_data=event_data).status_code == 200
        found = self.outcome()
        assert found["success"], found
        return json.dumps(found["output"]["data"])

    def upload(self, path):
        return self.http.post("/upload", files={"files": (path.name, path.read_bytes())})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("tmp"))
    yield server
    server.end()
    assert server.log.read_text() == ""


def test_barred_temporary_folder_of_gradio_does_not_matter(server):
    assert "<figure>" in server.visit().do("begin")


@pytest.mark.parametrize(
    "data", [None, {}, {"index": [1]}, {"index": ["a", "b"]}, {"index": [float("nan"), 1]}, "text"]
)
def test_click_without_a_place_gets_a_sentence(server, data):
    assert "a click needs the two coordinates of a pixel" in server.visit().do("click", event_data=data)


def test_session_whose_name_is_no_text_is_refused(server):
    assert server.visit("\ud800").join("begin").status_code == 400


def test_one_session_cannot_fill_the_queue(server):
    greedy, other = server.visit("greedy"), server.visit("other")
    answers = [greedy.join("choose", f"biformer_{size}", "none: untrained weights") for size in ("small", "base") * 8]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert f"{MOST_WAITING_OF_ONE} requests of yours wait already" in refused[0].text
    assert "<figure>" in other.do("begin")


def test_upload_is_gone_once_it_is_read(server, tmp_path):
    visit = server.visit()
    image = tmp_path / "mine.png"
    Image.new("RGB", (64, 64)).save(image)
    for file in (image, write_text(tmp_path / "notes.txt")):
        (path,) = visit.upload(file).json()
        assert path.startswith(str(server.own_folder))
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert ("notes.txt is no image" in visit.do("open_file", data)) == (file.suffix == ".txt")
        assert not os.path.exists(path)
        assert visit.http.get(f"/file={path}").status_code == 403


def test_upload_is_bounded(server):
    for length, code in ((f"Content-Length: {LARGEST_UPLOAD + 1}", 413), ("Transfer-Encoding: chunked", 411)):
        with begin_upload(server, length) as connection:
            assert connection.recv(20).startswith(f"HTTP/1.1 {code}".encode())


def test_one_address_cannot_take_all_uploads(server):
    held = [begin_upload(server, "Content-Length: 1000") for _ in range(3)]
    (refused,) = select.select(held, [], [], SLOW)[0]
    assert refused.recv(20).startswith(b"HTTP/1.1 503")
    for connection in held:
        connection.close()


def begin_upload(server, length):
    """A connection that has sent the headers of an upload, and not the rest."""
    address = httpx.URL(server.address)
    connection = socket.create_connection((address.host, address.port), timeout=SLOW)
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    connection.sendall(f"{head}{length}\r\n\r\n".encode())
    return connection


def test_signal_leaves_nothing_behind(tmp_path):
    server = Server(tmp_path, "--host", "0.0.0.0", "--auth", "me:secret")
    assert server.own_folder.stat().st_mode & 0o077 == 0
    assert httpx.get(f"{server.address}/config").status_code == 401
    for password, code in (("guessed", 400), ("secret", 200)):
        answer = httpx.post(f"{server.address}/login", data={"username": "me", "password": password})
        assert answer.status_code == code
    assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert list(tmp_path.glob("visualize-*")) == []
    assert server.log.read_text() == ""


def test_other_addresses_without_a_password_are_pointed_out():
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("-m", "visualize.app", "--host", "0.0.0.0", "--port", port)
    assert done.stderr.splitlines() == [
        "Whoever reaches 0.0.0.0 can use the page; --auth USER:PASSWORD asks for a name and a password",
        f"visualize.app: error: port {port} is taken; choose another --port",
    ]
