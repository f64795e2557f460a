"""Downloads that go wrong leave nothing behind, and what is missing is told with the remedy."""

import gzip
import hashlib
import signal
import subprocess
import sys
import threading

import pytest
import requests
import torch
from released import (
    FOLDER,
    NANO,
    URL,
    assert_same_logits,
    cached,
    file_mirror,
    from_timm,
    http_mirror_that_breaks,
    put,
    use_hub,
)
from support import ROOT, complaint, save_as_authors

from models.weights import load_checkpoint, sources, weights_of
from models.weights.releases import RELEASES, Places, find_release
from models.weights.sources import Release

pytestmark = pytest.mark.usefixtures("offline")

# -- downloads that go wrong --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nano_release")
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_download_from_a_server_that_dies_leaves_nothing_and_is_tried_again(
    tmp_path, checkpoint, published, server, monkeypatch, ranges
):
    places = http_mirror_that_breaks(server, checkpoint)
    server.ranges, server.breaks = ranges, 99
    message = complaint(find_release, NANO, places)
    assert f"mirror {places.mirror}" in message
    assert cached(tmp_path) == {}
    sizes = [int(asked[6:-1]) for _, asked in server.asked if asked]
    assert len(sizes) == (sources.RETRIES if ranges else 1)  # each try went on where the one before broke off
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] <= len(checkpoint) // 2
    server.breaks = 0
    monkeypatch.setenv("DEBIFORMER_MIRROR", places.mirror)
    assert_same_logits(from_timm(), published[0])


@pytest.mark.usefixtures("nano_release")
def test_download_that_is_killed_leaves_nothing_and_is_tried_again(tmp_path, published, server):
    content = save_as_authors(tmp_path / "x.pth", published[0]).read_bytes()
    server.files["/debiformer_tiny.pth"], server.stall = content, threading.Event()
    argv = [sys.executable, "-m", "models.releases", "fetch", "debiformer_tiny", "--release_mirror", server.url]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.half_way.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert left == []
    server.stall.set()
    server.stall = None
    path = find_release("debiformer_tiny", Places(mirror=server.url))
    assert path.read_bytes() == content
    assert cached(tmp_path).keys() == {path.name}


@pytest.mark.usefixtures("nano_release")
def test_download_is_made_once_for_several_processes(tmp_path, published, server):
    server.files[f"/{NANO}.pth"] = save_as_authors(tmp_path / "x.pth", published[0]).read_bytes()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(find_release(NANO, Places(mirror=server.url)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(server.asked) == 1


@pytest.mark.usefixtures("nano_release")
@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"", b"PK\x03\x04"], ids=["page", "nothing", "torn"])
def test_cache_takes_no_file_that_is_no_checkpoint(tmp_path, server, content):
    server.files[f"/{NANO}.pth"] = content
    assert f"what came from mirror {server.url} was not kept" in complaint(
        find_release, NANO, Places(mirror=server.url)
    )
    assert cached(tmp_path) == {}


@pytest.mark.usefixtures("nano_release")
def test_cache_refuses_a_file_that_changed(tmp_path, checkpoint):
    path = find_release(NANO, file_mirror(tmp_path, checkpoint))
    for place in (0, 40, len(checkpoint) // 2, len(checkpoint) - 1):
        path.write_bytes(checkpoint[:place] + bytes([checkpoint[place] ^ 1]) + checkpoint[place + 1 :])
        assert "its sha256 is another; delete it" in complaint(find_release, NANO)
    path.unlink()
    assert find_release(NANO, file_mirror(tmp_path, checkpoint)).read_bytes() == checkpoint


def test_find_release_compares_the_published_checksum(tmp_path, published, monkeypatch):
    file = save_as_authors(tmp_path / "weights" / f"{NANO}.pth", published[0])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder, mirror = Places(folder=str(file.parent)), Places(mirror=file.parent.as_uri())
    monkeypatch.setitem(RELEASES, NANO, Release(NANO, URL, sha256="0" * 64))
    for places in (folder, mirror):
        assert "is not the file that was published" in complaint(find_release, NANO, places)
    assert cached(tmp_path) == {}
    monkeypatch.setitem(RELEASES, NANO, Release(NANO, URL, sha256=digest))
    assert find_release(NANO, folder) == file
    assert digest in find_release(NANO, mirror).name


def test_cache_that_cannot_be_written_to_is_told(monkeypatch):
    monkeypatch.setenv("DEBIFORMER_HOME", "/proc/cache")
    assert "cannot write to /proc/cache: No such file or directory; choose another folder" in complaint(
        find_release, "debiformer_tiny"
    )


# -- downloads without bounds -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nano_release")
def test_download_that_is_too_large_is_refused(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100_000)
    server.files[f"/{NANO}.pth"] = bytes(200_000)
    assert f"mirror {server.url} sends over 100,000 bytes" in complaint(find_release, NANO, Places(mirror=server.url))
    use_hub(server, monkeypatch)
    server.play_hugging_face("lab/weights", {f"{NANO}.pth": bytes(200_000)})
    message = complaint(find_release, NANO, Places(hub="lab/weights"))
    assert "Hugging Face Hub lab/weights offers 200,000 bytes, over 100,000" in message
    assert f"/lab/weights/resolve/main/{NANO}.pth" not in [name for name, _ in server.asked]
    assert cached(tmp_path) == {}


@pytest.mark.usefixtures("nano_release")
def test_download_that_is_compressed_is_not_unpacked(tmp_path, server):
    server.files[f"/{NANO}.pth"], server.encoding = gzip.compress(bytes(50_000_000)), "gzip"
    assert "sends a compressed file" in complaint(find_release, NANO, Places(mirror=server.url))
    assert cached(tmp_path) == {}


@pytest.mark.usefixtures("nano_release")
def test_download_that_does_not_end_is_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sources, "MAX_SECONDS", 1)
    use_hub(server, monkeypatch)
    content = bytes(100_000)
    server.files[f"/{NANO}.pth"], server.stall = content, threading.Event()
    server.play_hugging_face("lab/weights", {f"{NANO}.pth": content})
    message = complaint(find_release, NANO, Places(mirror=server.url, hub="lab/weights"))
    assert f"mirror {server.url} took over 1 seconds" in message
    assert "Hugging Face Hub lab/weights took over 1 seconds" in message
    assert cached(tmp_path) == {}


def test_load_checkpoint_reads_an_address_and_downloads_it_once(tmp_path, checkpoint, published, server):
    server.files["/best.pth"] = checkpoint
    for _ in range(2):
        weights = weights_of(load_checkpoint(f"{server.url}/best.pth"), "x")
        assert torch.equal(weights["head.bias"], published[0].state_dict()["head.bias"])
    assert len(server.asked) == 1
    assert f"{server.url}/none.pth answers with status 404" in complaint(load_checkpoint, f"{server.url}/none.pth")
    assert "cannot be reached" in complaint(load_checkpoint, "http://127.0.0.1:1/x.pth")


# -- what is missing, and the remedy ------------------------------------------------------------------------------


def test_find_release_tells_offline_empty_and_refused_apart(monkeypatch, server):
    offline = complaint(find_release, "debiformer_tiny")
    assert "Google Drive cannot be reached; this machine may be offline" in offline
    with monkeypatch.context() as patch:
        server.play_google_drive(patch, FOLDER, None)
        empty = complaint(find_release, "debiformer_tiny")
    assert "Google Drive shows an empty folder" in empty
    with monkeypatch.context() as patch:
        server.play_google_drive(patch, FOLDER, b"x", quota=True)
        quota = complaint(find_release, "debiformer_tiny")
    assert "Google Drive refuses the file: too many downloads today" in quota
    with monkeypatch.context() as patch:
        server.files.clear()
        server.play_google_drive(patch, "another folder", b"x")
        gone = complaint(find_release, "debiformer_tiny")
    assert "Google Drive: Failed to retrieve folder contents" in gone
    assert "(status code 404)" in gone
    for message in (offline, empty, quota, gone):
        assert f"Download them from https://drive.google.com/drive/folders/{FOLDER} in a browser" in message
        assert "python -m models.releases add FILE --model debiformer_tiny" in message


def test_find_release_tells_a_slow_drive_and_a_changed_page(monkeypatch):
    errors = {requests.ReadTimeout(): "cannot be reached", KeyError("Content-Type"): "does not know (KeyError)"}
    for error, words in errors.items():

        def get(*args, error=error, **kwargs):
            assert kwargs["timeout"] == sources.TIMEOUT
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(requests.Session, "get", get)
            assert words in complaint(find_release, "debiformer_tiny")


def test_find_release_tells_dead_links_with_the_remedy():
    message = complaint(find_release, "biformer_tiny")
    assert "OneDrive links no longer answer" in message
    assert "s!AkBbczdRlZvChHEOoGkgwgQzEDlM" in message
    assert "add FILE --model biformer_tiny" in message


def test_find_release_names_every_place_that_was_asked(tmp_path, server, monkeypatch):
    (tmp_path / "weights").mkdir()
    use_hub(server, monkeypatch)
    server.play_hugging_face("lab/weights", {"biformer_stl_nchw.pth": b""})
    message = complaint(find_release, "biformer_tiny", Places(str(tmp_path / "weights"), server.url, "lab/weights"))
    assert f"{tmp_path / 'weights'} has none" in message
    assert f"mirror {server.url} answers with status 404" in message
    assert "Hugging Face Hub lab/weights has no weights of biformer_tiny, only biformer_stl_nchw.pth" in message
    assert "OneDrive" in message
    assert "Hugging Face Hub lab/nothing" in complaint(find_release, "biformer_tiny", Places(hub="lab/nothing"))


def test_find_release_tells_places_that_cannot_be(tmp_path):
    assert "does not exist" in complaint(find_release, "biformer_tiny", Places(folder=str(tmp_path / "nowhere")))
    assert "a mirror begins with https://" in complaint(find_release, "biformer_tiny", Places(mirror="ftp://a"))
    assert "did you mean biformer_tiny?" in complaint(find_release, "biformer_tinny")


def test_find_release_tells_several_files_apart_by_name(tmp_path, published):
    folder = tmp_path / "weights"
    for name in ("debiformer_tiny_a.pth", "debiformer_tiny_b.pth"):
        put(folder / name, b"")
    places = Places(folder=str(folder))
    assert (
        "has several files for debiformer_tiny (debiformer_tiny_a.pth, debiformer_tiny_b.pth); name the right one"
        in (complaint(find_release, "debiformer_tiny", places))
    )
    for name in ("debiformer_tiny_best.pth", "debiformer_tiny.pth"):  # each is preferred to those before
        put(folder / name, b"")
        assert find_release("debiformer_tiny", places).name == name
