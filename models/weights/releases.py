"""Published weights: what there is, and where each model's are looked for."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from .cache import cached_file, keep_in_cache, receiving, sha256_of
from .errors import WeightsError
from .reading import load_checkpoint, weights_of
from .sources import Release, Unavailable, file_in_folder, from_authors, from_hub, from_mirror

DRIVE, ONEDRIVE = "https://drive.google.com/drive/folders/", "https://1drv.ms/u/"

RELEASES: dict[str, Release] = {
    release.model: release
    for release in (
        Release("debiformer_tiny", f"{DRIVE}1K_Zk5Etx2oh3yVccr71m1R3bTqWAI2bg", 81.9, alias="debi_tiny"),
        Release("debiformer_small", f"{DRIVE}1OmWKob1ECHgVMs5wSvZs3XF665zFJdHg", 83.9, alias="debi_small"),
        Release("debiformer_base", f"{DRIVE}1Ae3l2Q9nPbpOgSiTtX_HWyvSXIPQ9jce", 84.4, alias="debi_base"),
        Release("biformer_tiny", f"{ONEDRIVE}s!AkBbczdRlZvChHEOoGkgwgQzEDlM", 81.4),
        Release("biformer_small", f"{ONEDRIVE}s!AkBbczdRlZvChHDyM-x9KWRBZ832", 83.8),
        Release("biformer_base", f"{ONEDRIVE}s!AkBbczdRlZvChHI_XPhoadjaNxtO", 84.3),
        Release("biformer_stl", f"{ONEDRIVE}s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", 82.7),
        Release("biformer_stl_nchw", f"{ONEDRIVE}s!AkBbczdRlZvChWYrKbWbMgqd2Ai0"),
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
    """Return the release of a model. WeightsError if none was published."""
    if model not in RELEASES:
        close = difflib.get_close_matches(model, RELEASES, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]}?" if close else f"there are those of {', '.join(RELEASES)}"
        raise WeightsError(f"no released weights of {model} are known; {remedy}")
    return RELEASES[model]


def find_release(model: str, places: Places | None = None) -> Path:
    """Find the file with a model's published weights; download it if it is not here yet.

    WeightsError if no place has it, with every place's reason and the remedy, or if a file is not what it should be.
    """
    release, places = release_of(model), places or Places()
    found = here(release, places)
    if found is not None:
        return found
    sources = (
        (f"mirror {places.mirror}", from_mirror, places.mirror),
        (f"Hugging Face Hub {places.hub}", from_hub, places.hub),
        (release.url, from_authors, release.url),
    )
    reasons = [f"{places.folder} has none"] if places.folder else []
    with receiving(model) as folder:
        found = cached_file(model)  # another process may have received it meanwhile
        if found is not None:
            return found
        for source, fetch, place in sources:
            if not place:
                continue
            try:
                path = fetch(source, place, release, folder)
                weights_of(load_checkpoint(path), path)  # whether they fit depends on --model_kwargs
                check_sha256(release, path)
                return keep_in_cache(path, model)
            except Unavailable as reason:
                reasons.append(str(reason))
            except WeightsError as error:
                raise WeightsError(f"what came from {source} was not kept: {error}") from error
    command = f"python -m {__name__.partition('.')[0]}.releases"
    raise WeightsError(
        f"cannot get the released weights of {model}: {'; '.join(reasons)}. Download them from {release.url} in a "
        f"browser, then: {command} add FILE --model {model} (or see its --help for other places)"
    )


def here(release: Release, places: Places) -> Path | None:
    """Find the weights in the local folder or else in the cache; None if in neither. WeightsError if damaged."""
    path = file_in_folder(release, Path(places.folder)) if places.folder else None
    if path is not None:
        check_sha256(release, path)
    return path or cached_file(release.model)


def check_sha256(release: Release, path: Path) -> None:
    """Raise WeightsError if the published checksum is known and another."""
    if release.sha256 is not None and sha256_of(path) != release.sha256:
        raise WeightsError(f"{path} is not the file that was published for {release.model}: its sha256 is another")
