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
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import timm

from .weights import WeightsError, check_outline, load_checkpoint, weights_of
from .weights.cache import cache_folder, keep_in_cache, receiving, sha256_of
from .weights.releases import RELEASES, Places, check_sha256, find_release, here, release_of

COMMAND = f"{__package__}.releases"
"""models.releases in a checkout, debiformer.releases where the package is installed."""


def list_releases(places: Places) -> None:
    """Print the table."""
    row = "{:18} {:>6}  {:12} {}"
    print(row.format("model", "top-1", "licence", "published at; here as"))
    for release in RELEASES.values():
        top1 = "-" if release.top1 is None else f"{release.top1:.1f}"
        print(row.format(release.model, top1, release.license or "not known", release.url))
        try:
            found = here(release, places)
        except WeightsError as error:
            found = error
        if found is not None:
            print(row.format("", "", "", found))
    print(f"Cache: {cache_folder()}")


def verify(models: Sequence[str], places: Places) -> None:
    """Read the weights that are here and compare them with their checksums and models. WeightsError if any is bad."""
    bad = 0
    for model in models:
        try:
            path = here(release_of(model), places)
            words = "not here" if path is None else f"{describe_fit(path, model)}; {path}, sha256 {sha256_of(path)}"
        except WeightsError as error:
            bad, words = bad + 1, f"BAD: {error}"
        print(f"{model}: {words}")
    if bad:
        raise WeightsError(f"{bad} of {len(models)} failed")


def describe_fit(path: Path, model: str) -> str:
    """Whether a file's weights are those of the model as it is built here. WeightsError if it holds none."""
    weights = weights_of(load_checkpoint(path), path)
    if not timm.is_model(model):
        return "weights that can be read, of a model that is not built here"
    check_outline(lambda: timm.create_model(model), weights, path)
    return f"weights that fit {model}"


def add(file: Path, model: str) -> Path:
    """Copy a file into the cache as the weights of a model. WeightsError if it is not."""
    release = release_of(model)
    describe_fit(file, model)
    check_sha256(release, file)
    with receiving(model) as folder:
        copy = folder / file.name
        shutil.copyfile(file, copy)
        return keep_in_cache(copy, model)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{COMMAND}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {COMMAND}",
        description=__doc__.replace("models.releases", COMMAND),
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
    try:
        main()
    except WeightsError as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
