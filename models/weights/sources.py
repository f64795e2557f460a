"""Where released weights come from, and how a download ends up in the cache whole or not at all.

A source has a `fetch(release, folder)`: it puts one file into an empty folder and returns its path, or raises
`Unavailable` with the reason in one line.
"""

import contextlib
import hashlib
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from .errors import WeightsError, listed

TIMEOUT = (20, 60)
"""Seconds to wait for a connection, and between two pieces of a download."""
MAX_BYTES = 4 << 30
"""Of a download: twice what a model of 100 million parameters leaves behind with its average and its optimizer."""
MAX_SECONDS = 2 * 3600
"""For a download, whatever comes in."""
RETRIES = 2
"""How often a download that broke off is taken up again where it stopped, before it counts as failed."""
SUFFIX = r"\.(pth|pt|pth\.tar|ckpt|bin|safetensors)"


class Unavailable(Exception):
    """A source does not have the weights, or cannot be reached. The message is the reason, in one line."""


class Ambiguous(Unavailable):
    """A place has several files that may be the weights."""


class Source(Protocol):
    """Something weights can be downloaded from; str() names it in messages."""

    def fetch(self, release: "Release", folder: Path) -> Path: ...


@dataclass(frozen=True)
class Release:
    """Published weights of one model.

    source: where the authors put them. top1: ImageNet-1K accuracy in percent as published. alias: what their code
    calls the model. top1, licence and sha256 are None where they are not known.
    """

    model: str
    source: Source
    top1: float | None = None
    alias: str = ""
    licence: str | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        """The page that a browser shows."""
        return str(self.source)

    def names(self, name: str, suffix: str) -> bool:
        """Whether a file or repository of this name is this model's: its name or alias, perhaps more, then `suffix`.

        suffix: a regular expression. biformer_stl_best.pth is biformer_stl's; biformer_stl_nchw.pth is not.
        """
        stems = "|".join(filter(None, (self.model, self.alias))).replace("_", "[-_]")
        return bool(re.fullmatch(rf"(?:{stems})(?:[-_.](?!nchw).*)?{suffix}", name, re.IGNORECASE))


# -- sources ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirror:
    """A web server or a folder with MODEL.pth in it. url: http://, https:// or file://."""

    url: str

    def __str__(self) -> str:
        return f"mirror {self.url}"

    def fetch(self, release: Release, folder: Path) -> Path:
        name = f"{release.model}.pth"
        target, url = folder / name, urlsplit(f"{self.url.rstrip('/')}/{name}")
        if url.scheme == "file":
            path = Path(url2pathname(url.path))
            if not path.is_file():
                raise Unavailable(f"{self} has no {name}")
            if not os.access(path, os.R_OK):
                raise Unavailable(f"{self} does not let {name} be read")
            shutil.copyfile(path, target)
        elif url.scheme in ("http", "https"):
            _download(url.geturl(), target, str(self))
        else:
            raise WeightsError(f"{self}: a mirror begins with https://, http:// or file://")
        return target


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face Hub, OWNER/NAME; {model} in it stands for the model's name."""

    repo: str

    def __str__(self) -> str:
        return f"Hugging Face Hub {self.repo}"

    def fetch(self, release: Release, folder: Path) -> Path:
        repo = self.repo.replace("{model}", release.model)
        dedicated, hub = release.names(repo.rpartition("/")[2], suffix=""), HfApi()
        try:
            sizes = {file.path: file.size for file in hub.list_repo_tree(repo, recursive=True) if hasattr(file, "size")}
            name = choose_file(list(sizes), release, dedicated)
            if sizes[name] > MAX_BYTES:
                raise Unavailable(f"offers {sizes[name]:,} bytes, over {MAX_BYTES:,}")
            return _within_time(lambda: Path(hub.hf_hub_download(repo, name, local_dir=folder)))
        except Unavailable as error:
            raise type(error)(f"{self} {error}") from error
        except RepositoryNotFoundError as error:
            raise Unavailable(f"{self} does not exist, or is private") from error
        except Exception as error:
            # Its HTTP library, and with it the errors of a broken connection, differs from version to version.
            raise Unavailable(f"{self} failed: {_first_sentence(error)}") from error


@dataclass(frozen=True)
class DriveFolder:
    """A public folder of Google Drive that holds the weights of one model, and perhaps its log."""

    id: str

    def __str__(self) -> str:
        return f"https://drive.google.com/drive/folders/{self.id}"

    def fetch(self, release: Release, folder: Path) -> Path:
        with _reasons("Google Drive"):
            import gdown

            files = gdown.download_folder(
                id=self.id, skip_download=True, quiet=True, use_cookies=False, timeout=TIMEOUT
            )
        if not files:
            raise Unavailable("Google Drive shows an empty folder: its content was moved, or needs a sign-in")
        by_name = {Path(file.path).name: file for file in files}
        try:
            name = choose_file(list(by_name), release, dedicated=True)
        except Unavailable as error:
            raise Unavailable(f"the folder on Google Drive {error}") from error
        url = f"https://drive.google.com/uc?id={by_name[name].id}"
        return _download(url, folder / Path(name).name, "Google Drive", sized=False)


@dataclass(frozen=True)
class OneDriveShare:
    """A share of OneDrive, of the kind whose links stopped working in 2026: never asked, only named."""

    id: str

    def __str__(self) -> str:
        return f"https://1drv.ms/u/{self.id}"

    def fetch(self, release: Release, folder: Path) -> Path:
        raise Unavailable("the authors' OneDrive links no longer answer (share id was malformed)")


def choose_file(names: Sequence[str], release: Release, dedicated: bool) -> str:
    """The file that holds the weights, among relative paths. Unavailable if there is none or no telling which.

    dedicated: the place is this model's alone, so a weight file of any name will do.
    """
    weights = {name: os.path.basename(name) for name in names if re.search(SUFFIX + "$", name, re.IGNORECASE)}
    named = [name for name, base in weights.items() if release.names(base, SUFFIX)]
    found = named or (list(weights) if dedicated else [])
    if not found:
        raise Unavailable(f"has no weights of {release.model}, only {listed(names)}" if names else "is empty")
    for wanted in (rf"{release.model}{SUFFIX}", r".*best.*", r"model\.safetensors"):
        preferred = [name for name in found if re.fullmatch(wanted, weights[name], re.IGNORECASE)]
        if len(preferred) == 1:
            return preferred[0]
    if len(found) > 1:
        raise Ambiguous(
            f"has several files for {release.model} ({listed(found)}); name the right one {release.model}.pth"
        )
    return found[0]


def file_in_folder(release: Release, folder: Path) -> Path | None:
    """The weights in a local folder, or in its subfolder named after the model; None if they are not there."""
    if not folder.is_dir():
        raise WeightsError(f"the folder of released weights, {folder}, does not exist")
    for place, dedicated in ((folder / release.model, True), (folder, False)):
        try:
            names = [path.name for path in place.iterdir()] if place.is_dir() else []
            return place / choose_file(names, release, dedicated)
        except Ambiguous as error:
            raise WeightsError(f"{place} {error}") from error
        except Unavailable:
            continue
        except OSError as error:
            raise WeightsError(f"cannot read the folder of released weights, {place}: {error.strerror}") from error
    return None


def _download(url: str, path: Path, source: str, sized: bool = True) -> Path:
    """Download to `path`, whole or not at all, within MAX_BYTES and MAX_SECONDS.

    sized: refuse answers that do not announce their size, as compressed ones do not.
    """

    def check_size(received: int, total: int | None) -> None:
        if sized and total is None:
            raise Unavailable(f"{source} sends a compressed file, or does not say how large it is")
        if max(received, total or 0) > MAX_BYTES:
            raise Unavailable(f"{source} sends over {MAX_BYTES:,} bytes")

    late = threading.Event()
    timer = threading.Timer(MAX_SECONDS, late.set)
    timer.daemon = True
    timer.start()
    options = {"quiet": not sys.stderr.isatty(), "use_cookies": False, "timeout": TIMEOUT, "retries": RETRIES}
    try:
        with _reasons(source):
            import gdown

            gdown.download(url, str(path), progress=check_size, cancel=late, **options)
    finally:
        timer.cancel()
    return path


def _within_time(fetch: Callable[[], Path]) -> Path:
    """What `fetch` returns or raises, or Unavailable after MAX_SECONDS; it cannot be ended, only left."""
    results: queue.Queue[Path | BaseException] = queue.Queue()

    def run() -> None:
        try:
            results.put(fetch())
        except BaseException as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = results.get(timeout=MAX_SECONDS)
    except queue.Empty:
        raise Unavailable(f"took over {MAX_SECONDS} seconds") from None
    if isinstance(result, BaseException):
        raise result
    return result


@contextlib.contextmanager
def _reasons(source: str) -> Iterator[None]:
    """Turns what gdown raises, or that it is not there, into Unavailable; a full disk stays an OSError."""
    try:
        import requests
        from gdown.exceptions import DownloadCancelled, DownloadError, FileURLRetrievalError
    except ImportError as error:
        raise Unavailable(f"{source} is asked with gdown, which is missing; pip install 'gdown>=6.5'") from error
    try:
        yield
    except Unavailable:
        raise
    except DownloadCancelled as error:
        raise Unavailable(f"{source} took over {MAX_SECONDS} seconds") from error
    except FileURLRetrievalError as error:
        words = "refuses the file: too many downloads today, or it is not public any more"
        raise Unavailable(f"{source} {words}") from error
    except (DownloadError, requests.RequestException) as error:
        cause = error.__cause__ if isinstance(error, DownloadError) and error.__cause__ else error
        if isinstance(cause, requests.HTTPError):
            raise Unavailable(f"{source} answers with status {cause.response.status_code}") from error
        if isinstance(cause, requests.ConnectionError | requests.Timeout):
            raise Unavailable(f"{source} cannot be reached; this machine may be offline") from error
        raise Unavailable(f"{source}: {_first_sentence(error)}") from error
    except OSError:
        raise
    except Exception as error:
        # A page that Google has changed makes gdown raise almost anything.
        raise Unavailable(f"{source} answers in a way that gdown does not know ({type(error).__name__})") from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


# -- the cache ----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$DEBIFORMER_HOME, else a folder in torch hub's. Its files are named MODEL-SHA256.pth (or .safetensors)."""
    return Path(os.environ.get("DEBIFORMER_HOME") or Path(torch.hub.get_dir()) / "debiformer")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_file(model: str) -> Path | None:
    """The cached weights of a model; None if there are none. WeightsError if they changed since they were cached."""
    folder = cache_folder()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    entries = [match for name in names if (match := re.fullmatch(rf"{model}-([0-9a-f]{{64}})\.\w+", name))]
    if not entries:
        return None
    newest = max(entries, key=lambda entry: (folder / entry[0]).stat().st_mtime)
    path, recorded = folder / newest[0], newest[1]
    if sha256_of(path) != recorded:
        raise WeightsError(f"{path} changed since it was cached: its sha256 is another; delete it to fetch it again")
    return path


@contextlib.contextmanager
def receiving(model: str) -> Iterator[Path]:
    """An empty folder to download into. One process at a time has it; what a killed one left there is removed."""
    home = cache_folder()
    folder = home / f".{model}.part"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{model}.lock"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        words = error.strerror or error
        raise WeightsError(f"cannot write to {home}: {words}; choose another folder with DEBIFORMER_HOME") from error


def keep_in_cache(path: Path, model: str) -> Path:
    """Move a received file into the cache under its sha256, at once; it takes the place of earlier ones."""
    suffix = ".safetensors" if path.suffix == ".safetensors" else ".pth"
    target = cache_folder() / f"{model}-{sha256_of(path)}{suffix}"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    for other in cache_folder().glob(f"{model}-*"):
        if other != target:
            other.unlink()
    return target


def fetch_url(url: str) -> Path:
    """The file at an http(s) address, from the cache if it was downloaded before. WeightsError if it cannot be had."""
    name = f"url-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    with receiving(name) as folder:
        found = cached_file(name)
        if found is not None:
            return found
        suffix = Path(urlsplit(url).path).suffix
        path = folder / f"weights{suffix if suffix == '.safetensors' else '.pth'}"
        try:
            return keep_in_cache(_download(url, path, url), name)
        except Unavailable as reason:
            raise WeightsError(f"{reason}") from reason
