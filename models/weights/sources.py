"""Where released weights come from.

Each `from_*` puts one file into an empty folder and returns its path, or raises `Unavailable` with the reason in one
line. name: what messages call the place.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from .cache import cached_file, keep_in_cache, receiving
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


@dataclass(frozen=True)
class Release:
    """Published weights of one model.

    url: the page where the authors put them. top1: ImageNet-1K accuracy in percent as published. alias: what their
    code calls the model. top1, license and sha256 are None where they are not known.
    """

    model: str
    url: str
    top1: float | None = None
    alias: str = ""
    license: str | None = None
    sha256: str | None = None

    def names(self, name: str, suffix: str) -> bool:
        """Whether a file or repository of this name is this model's: its name or alias, perhaps more, then `suffix`.

        suffix: a regular expression. biformer_stl_best.pth is biformer_stl's; biformer_stl_nchw.pth is not.
        """
        stems = "|".join(filter(None, (self.model, self.alias))).replace("_", "[-_]")
        return bool(re.fullmatch(rf"(?:{stems})(?:[-_.](?!nchw).*)?{suffix}", name, re.IGNORECASE))


# -- places -------------------------------------------------------------------------------------------------------


def from_mirror(name: str, url: str, release: Release, folder: Path) -> Path:
    """Fetch MODEL.pth of a web server or a folder. url: http://, https:// or file://."""
    file = f"{release.model}.pth"
    parts = urlsplit(f"{url.rstrip('/')}/{file}")
    if parts.scheme in ("http", "https"):
        return _download(parts.geturl(), folder / file, name)
    if parts.scheme != "file":
        raise WeightsError(f"{name}: a mirror begins with https://, http:// or file://")
    path = Path(url2pathname(parts.path))
    if not path.is_file():
        raise Unavailable(f"{name} has no {file}")
    if not os.access(path, os.R_OK):
        raise Unavailable(f"{name} does not let {file} be read")
    return Path(shutil.copyfile(path, folder / file))


def from_hub(name: str, repo: str, release: Release, folder: Path) -> Path:
    """Fetch a file of a Hugging Face repository OWNER/NAME; {model} in it stands for the model's name."""
    repo = repo.replace("{model}", release.model)
    dedicated, hub = release.names(repo.rpartition("/")[2], suffix=""), HfApi()
    try:
        sizes = {file.path: file.size for file in hub.list_repo_tree(repo, recursive=True) if hasattr(file, "size")}
        file = choose_file(list(sizes), release, dedicated)
        if sizes[file] > MAX_BYTES:
            raise Unavailable(f"offers {sizes[file]:,} bytes, over {MAX_BYTES:,}")
        return _within_time(lambda: Path(hub.hf_hub_download(repo, file, local_dir=folder)))
    except Unavailable as error:
        raise type(error)(f"{name} {error}") from error
    except RepositoryNotFoundError as error:
        raise Unavailable(f"{name} does not exist, or is private") from error
    except Exception as error:
        # Its HTTP library, and with it the errors of a broken connection, differs from version to version.
        raise Unavailable(f"{name} failed: {_first_sentence(error)}") from error


def from_authors(_name: str, url: str, release: Release, folder: Path) -> Path:
    """Fetch from a public folder of Google Drive that holds the weights of one model, and perhaps its log."""
    if url.startswith("https://1drv.ms/"):  # of the kind whose links stopped working in 2026: never asked
        raise Unavailable("the authors' OneDrive links no longer answer (share id was malformed)")
    with _reasons("Google Drive"):
        import gdown

        settings = {"skip_download": True, "quiet": True, "use_cookies": False, "timeout": TIMEOUT}
        files = gdown.download_folder(id=url.rpartition("/")[2], **settings)
    if not files:
        raise Unavailable("Google Drive shows an empty folder: its content was moved, or needs a sign-in")
    by_name = {Path(file.path).name: file for file in files}
    try:
        file = choose_file(list(by_name), release, dedicated=True)
    except Unavailable as error:
        raise Unavailable(f"the folder on Google Drive {error}") from error
    url = f"https://drive.google.com/uc?id={by_name[file].id}"
    return _download(url, folder / Path(file).name, "Google Drive", sized=False)


def fetch_url(url: str) -> Path:
    """Fetch the file at an http(s) address; from the cache if it was downloaded before. WeightsError if that fails."""
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


def choose_file(names: Sequence[str], release: Release, dedicated: bool) -> str:
    """Choose the file that holds the weights among relative paths. Unavailable if none or several may be it.

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
    """Find the weights in a local folder, or in its subfolder named after the model; None if they are not there."""
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
    """Call `fetch` in a thread. Unavailable after MAX_SECONDS, when the thread is left to itself."""
    result: Future[Path] = Future()

    def run() -> None:
        try:
            result.set_result(fetch())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], MAX_SECONDS).done:
        raise Unavailable(f"took over {MAX_SECONDS} seconds")
    return result.result()


@contextlib.contextmanager
def _reasons(source: str) -> Iterator[None]:
    """Turn what gdown raises, or that it is missing, into Unavailable; a full disk stays an OSError."""
    try:
        import requests
        from gdown.exceptions import DownloadCancelled, DownloadError, FileURLRetrievalError
    except ImportError as error:
        raise Unavailable(f"{source} is asked with gdown, which is missing; pip install 'gdown>=6.5'") from error
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DownloadError) and error.__cause__ else error
        if isinstance(error, DownloadCancelled):
            words = f" took over {MAX_SECONDS} seconds"
        elif isinstance(error, FileURLRetrievalError):
            words = " refuses the file: too many downloads today, or it is not public any more"
        elif isinstance(cause, requests.HTTPError):
            words = f" answers with status {cause.response.status_code}"
        elif isinstance(cause, requests.ConnectionError | requests.Timeout):
            words = " cannot be reached; this machine may be offline"
        elif isinstance(error, DownloadError | requests.RequestException):
            words = f": {_first_sentence(error)}"
        elif isinstance(error, OSError):
            raise
        else:  # a page that Google has changed makes gdown raise almost anything
            words = f" answers in a way that gdown does not know ({type(error).__name__})"
        raise Unavailable(f"{source}{words}") from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
