"""Published weights: what there is, and how it gets here.

    python -m models.releases list                              what is published, and what of it is here
    python -m models.releases fetch debiformer_tiny             download into the cache; `all` for everything
    python -m models.releases add FILE --model debiformer_tiny  take a file that was downloaded by hand into the cache
    python -m models.releases verify                            read everything that is here and compare its sha256

`main.py --load_release`, `hydra_main.py load_release=true` and `timm.create_model(NAME, pretrained=True)` look for
the weights of a model in this order and take the first that they find:

    1. a local folder                --release_dir, or DEBIFORMER_RELEASES
    2. the cache                     DEBIFORMER_HOME, or a folder in torch hub's
    3. a mirror, URL/NAME.pth        --release_mirror, or DEBIFORMER_MIRROR; https://, http:// or file://
    4. a Hugging Face repository     --release_hub OWNER/NAME, or DEBIFORMER_HUB; {model} in it stands for the name
    5. where the authors put them

On a cluster without internet, fetch on a machine that has it and point DEBIFORMER_RELEASES to the files, or share the
cache. Files are read as data: whatever is not weights, options or paths is refused.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from errors import OneLineParser, UsageError, did_you_mean, exit_on_error

from .release_sources import (
    DriveFolder,
    Hub,
    Mirror,
    OneDriveShare,
    Release,
    Unavailable,
    cache_folder,
    cached_file,
    file_in_folder,
    keep_in_cache,
    receiving,
    sha256_of,
)
from .weights import check_fit, load_checkpoint, weights_of

RELEASES: dict[str, Release] = {
    release.model: release
    for release in (
        Release("debiformer_tiny", DriveFolder("1K_Zk5Etx2oh3yVccr71m1R3bTqWAI2bg"), 81.9, alias="debi_tiny"),
        Release("debiformer_small", DriveFolder("1OmWKob1ECHgVMs5wSvZs3XF665zFJdHg"), 83.9, alias="debi_small"),
        Release("debiformer_base", DriveFolder("1Ae3l2Q9nPbpOgSiTtX_HWyvSXIPQ9jce"), 84.4, alias="debi_base"),
        Release("biformer_tiny", OneDriveShare("s!AkBbczdRlZvChHEOoGkgwgQzEDlM"), 81.4),
        Release("biformer_small", OneDriveShare("s!AkBbczdRlZvChHDyM-x9KWRBZ832"), 83.8),
        Release("biformer_base", OneDriveShare("s!AkBbczdRlZvChHI_XPhoadjaNxtO"), 84.3),
        Release("biformer_stl", OneDriveShare("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1"), 82.7),
        Release("biformer_stl_nchw", OneDriveShare("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0")),
    )
}
"""By model."""


@dataclass(frozen=True)
class Places:
    """Where to look besides the cache and the authors' pages; what is left empty is read from the environment."""

    folder: str = ""
    mirror: str = ""
    hub: str = ""

    def __post_init__(self) -> None:
        for name, variable in {"folder": "RELEASES", "mirror": "MIRROR", "hub": "HUB"}.items():
            if not getattr(self, name):
                object.__setattr__(self, name, os.environ.get(f"DEBIFORMER_{variable}", ""))


def release_of(model: str) -> Release:
    """The release of a model. UsageError if none was published."""
    if model not in RELEASES:
        remedy = did_you_mean(model, RELEASES, f"there are those of {', '.join(RELEASES)}")
        raise UsageError(f"no released weights of {model} are known; {remedy}")
    return RELEASES[model]


def find_release(model: str, places: Places | None = None) -> Path:
    """The file with a model's published weights, downloaded if it is not here yet.

    UsageError if no place has it, with every place's reason and the remedy, or if a file is not what it should be.
    """
    release, places = release_of(model), places or Places()
    found = here(release, places)
    if found is not None:
        return found
    sources = [*([Mirror(places.mirror)] if places.mirror else []), *([Hub(places.hub)] if places.hub else [])]
    reasons = [f"{places.folder} has none"] if places.folder else []
    with receiving(model) as folder:
        found = cached_file(model)  # another process may have received it meanwhile
        if found is not None:
            return found
        for source in (*sources, release.source):
            try:
                path = source.fetch(release, folder)
                weights_of(load_checkpoint(path), path)  # whether they fit depends on --model_kwargs
                check_sha256(release, path)
                return keep_in_cache(path, model)
            except Unavailable as reason:
                reasons.append(str(reason))
            except UsageError as error:
                raise UsageError(f"what came from {source} was not kept: {error}") from error
    raise UsageError(
        f"cannot get the released weights of {model}: {'; '.join(reasons)}. Download them from {release.source} in a "
        f"browser, then: python -m models.releases add FILE --model {model} (or see its --help for other places)"
    )


def here(release: Release, places: Places) -> Path | None:
    """The weights in the local folder or else in the cache; None if they are in neither. UsageError if damaged."""
    path = file_in_folder(release, Path(places.folder)) if places.folder else None
    if path is not None:
        check_sha256(release, path)
    return path or cached_file(release.model)


def check_sha256(release: Release, path: Path) -> None:
    """UsageError if the published checksum is known and another."""
    if release.sha256 is not None and sha256_of(path) != release.sha256:
        raise UsageError(f"{path} is not the file that was published for {release.model}: its sha256 is another")


# -- the command --------------------------------------------------------------------------------------------------


def list_releases(places: Places) -> None:
    """Print the table."""
    row = "{:18} {:>6}  {:12} {}"
    print(row.format("model", "top-1", "licence", "published at; here as"))
    for release in RELEASES.values():
        top1 = "-" if release.top1 is None else f"{release.top1:.1f}"
        print(row.format(release.model, top1, release.licence or "not known", release.source))
        try:
            found = here(release, places)
        except UsageError as error:
            found = error
        if found is not None:
            print(row.format("", "", "", found))
    print(f"Cache: {cache_folder()}")


def verify(models: Sequence[str], places: Places) -> None:
    """Read the weights that are here and compare them with their checksums and models. UsageError if any is bad."""
    bad = 0
    for model in models:
        try:
            path = here(release_of(model), places)
            words = "not here" if path is None else f"{describe_fit(path, model)}; {path}, sha256 {sha256_of(path)}"
        except UsageError as error:
            bad, words = bad + 1, f"BAD: {error}"
        print(f"{model}: {words}")
    if bad:
        raise UsageError(f"{bad} of {len(models)} failed")


def describe_fit(path: Path, model: str) -> str:
    """Whether a file's weights are those of the model as it is built here. UsageError if it holds none."""
    weights = weights_of(load_checkpoint(path), path)
    if not timm.is_model(model):
        return "weights that can be read, of a model that is not built here"
    with torch.device("meta"):
        outline = timm.create_model(model)
    check_fit(outline, weights, path)
    return f"weights that fit {model}"


def add(file: Path, model: str) -> Path:
    """Copy a file into the cache as the weights of a model. UsageError if it is not."""
    release = release_of(model)
    describe_fit(file, model)
    check_sha256(release, file)
    with receiving(model) as folder:
        copy = folder / file.name
        shutil.copyfile(file, copy)
        return keep_in_cache(copy, model)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m models.releases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|fetch|add|verify")
    helps = {
        "list": "what is published, and what of it is here",
        "fetch": "download into the cache",
        "add": "take a file into the cache",
        "verify": "read what is here and compare checksums",
    }
    for name, words in helps.items():
        command = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        if name == "fetch":
            command.add_argument("models", nargs="+", metavar="NAME", help=f"all, or of {', '.join(RELEASES)}")
        elif name == "verify":
            command.add_argument("models", nargs="*", default=["all"], metavar="NAME", help="default: all")
        elif name == "add":
            command.add_argument("file", type=Path, metavar="FILE", help="a checkpoint as the authors save them")
            command.add_argument("--model", required=True, metavar="NAME", help="whose weights it holds")
        if name != "add":
            command.add_argument("--release_dir", default="", metavar="DIR", help="a folder with weights to look in")
        if name == "fetch":
            command.add_argument("--release_mirror", default="", metavar="URL", help="a mirror to ask for URL/NAME.pth")
            command.add_argument("--release_hub", default="", metavar="OWNER/NAME", help="a Hugging Face repository")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    if options.command == "add":
        print(add(options.file, options.model))
        return
    places = Places(options.release_dir, *(getattr(options, f"release_{name}", "") for name in ("mirror", "hub")))
    if options.command == "list":
        list_releases(places)
        return
    models = list(RELEASES) if "all" in options.models else options.models
    if options.command == "verify":
        verify(models, places)
        return
    for model in models:
        print(find_release(model, places), flush=True)


if __name__ == "__main__":
    exit_on_error("models.releases", main)
