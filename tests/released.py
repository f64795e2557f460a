"""Released weights in tests: a small model released as the authors do, places for its file, and no network."""

import functools
import os
import socket

import huggingface_hub
import pytest
import timm
import torch
from file_server import file_server
from support import save_as_authors, scrambled

from models.weights import sources
from models.weights.releases import RELEASES, Places
from models.weights.sources import Release

FOLDER = "1K_Zk5Etx2oh3yVccr71m1R3bTqWAI2bg"
URL = f"https://drive.google.com/drive/folders/{FOLDER}"
NANO = "debiformer_nano"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No host but this one can be found; the cache is the test's own."""
    lookup = socket.getaddrinfo

    def only_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost", None):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    for name in [name for name in os.environ if name.startswith("DEBIFORMER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DEBIFORMER_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # gdown waits so long before it tries again


@pytest.fixture
def server():
    with file_server() as server:
        yield server


@pytest.fixture
def nano_release(monkeypatch):
    """A release of the small model, so that files are small."""
    monkeypatch.setitem(RELEASES, NANO, Release(NANO, URL))


@pytest.fixture(scope="session")
def published():
    """The model that a release was saved from, and its average."""
    return scrambled(timm.create_model(NANO, num_classes=4), 1), scrambled(timm.create_model(NANO, num_classes=4), 2)


@pytest.fixture(scope="session", params=[True, False], ids=["zip", "legacy"])
def checkpoint(request, published, tmp_path_factory):
    """The file as the authors saved it: bytes."""
    return save_as_authors(tmp_path_factory.mktemp("authors") / "x.pth", *published, request.param).read_bytes()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cached(tmp_path):
    """The files in the cache by name, without locks."""
    folder = tmp_path / "cache"
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".lock")} if folder.is_dir() else {}


def from_timm():
    return timm.create_model(
        NANO, pretrained=True, pretrained_cfg_overlay={"url": RELEASES[NANO].url, "num_classes": 4}
    ).eval()


@torch.no_grad()
def assert_same_logits(model, expected):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # A run keeps weights in channels-last memory, where convolutions round otherwise.
    logits, wanted = (m.to(memory_format=torch.channels_last)(images) for m in (model, expected))
    assert torch.equal(logits, wanted)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# -- places --------------------------------------------------------------------------------------------------------


def local_folder(tmp_path, content, **_):
    put(tmp_path / "weights" / "debiformer_nano_best.pth", content)
    return Places(folder=str(tmp_path / "weights"))


def folder_as_downloaded(tmp_path, content, **_):
    put(tmp_path / "weights" / NANO / "checkpoint.pth", content)
    (tmp_path / "weights" / NANO / "log.txt").write_text("{}")
    return Places(folder=str(tmp_path / "weights"))


def file_mirror(tmp_path, content, **_):
    put(tmp_path / "a mirror" / f"{NANO}.pth", content)
    return Places(mirror=(tmp_path / "a mirror").as_uri())


def http_mirror(server, content, **_):
    server.files[f"/weights/{NANO}.pth"] = content
    return Places(mirror=f"{server.url}/weights/")


def http_mirror_that_breaks(server, content, **_):
    server.files[f"/weights/{NANO}.pth"], server.breaks = content, 1
    return Places(mirror=f"{server.url}/weights")


def use_hub(server, monkeypatch):
    """Have `server` play the Hugging Face Hub."""
    here = functools.partial(huggingface_hub.HfApi, endpoint=server.url, token=False)
    monkeypatch.setattr(sources, "HfApi", here)
