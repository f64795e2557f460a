"""What a page shows as the query of its address, and back."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from urllib.parse import urlencode

from runtime.errors import UsageError

from .session import INSIDE, Choice, Photo, samples


def link_to(photo: Photo, choice: Choice) -> str:
    """The query, from its question mark on. A visitor's own image is not in it: nobody else has that."""
    x, y = choice.point
    parts = {
        "photo": photo.name if photo in samples().values() else "",
        "model": choice.model,
        "checkpoint": choice.checkpoint,
        "point": f"{x:.4f},{y:.4f}",
        "stage": choice.stage,
        "block": "" if choice.block == -1 else choice.block,
        "head": "" if choice.head is None else choice.head,
        "scale": "common" * choice.common,
        "overlay": "smooth" * choice.smooth,
    }
    return "?" + urlencode({name: value for name, value in parts.items() if value != ""}, safe="/,")


def linked(parts: Mapping[str, str], start: Choice, checkpoints: Collection[str]) -> tuple[Photo, Choice]:
    """What a query asks for; what it leaves out is as in `start`, or the first photo.

    checkpoints: those on offer; a link may name no other file. UsageError for what cannot be.
    """
    known = samples()
    photo = parts.get("photo", next(iter(known)))
    if photo not in known:
        raise UsageError(f"the link asks for a photo {photo!r}; there are {', '.join(known)}")
    checkpoint = parts.get("checkpoint", "" if "model" in parts else start.checkpoint)
    if checkpoint not in ("", *checkpoints):
        raise UsageError(f"the link asks for a checkpoint that is not on offer: {checkpoint}")
    try:
        choice = Choice(
            parts.get("model", start.model),
            checkpoint,
            int(parts.get("stage", start.stage)),
            int(parts.get("block", start.block)),
            int(parts["head"]) if "head" in parts else None,
            start.point,
            parts.get("scale") == "common",
            parts.get("overlay") == "smooth",
        )
        if "point" in parts:
            x, y = (float(part) for part in parts["point"].split(","))
            if not (math.isfinite(x) and math.isfinite(y)):
                raise ValueError
            choice = replace(choice, point=(min(max(x, 0.0), INSIDE), min(max(y, 0.0), INSIDE)))
    except ValueError:
        raise UsageError("the link's point, stage, block and head have to be numbers") from None
    return known[photo], choice
