"""The table that the families take their attention from, and how an attention of your own gets into a model.

An attention is a module made by `build(dim, num_heads, ...)`, with two methods: `forward(x)`, (B, H, W, C) in and out,
and, to be shown, `attention_maps(x)`, which returns `attention_maps.AttentionMaps` of one image.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from .backbone import STRIDES, check_per_stage

Builder = Callable[..., nn.Module]
AttentionLayer = str | Builder
"""A name of the table, or a class (or another callable) that takes (dim, num_heads, ...)."""
PerStage = AttentionLayer | Sequence[AttentionLayer | None] | None
"""One for all stages, or one for each; None stands for the published one."""

ATTENTIONS: dict[str, Builder] = {}
"""Every attention that a model can be built with by name."""

Class = TypeVar("Class", bound=Builder)


def register_attention(name: str) -> Callable[[Class], Class]:
    """Decorate a class to enter it into `ATTENTIONS` as `name`. ValueError if another one has the name."""

    def register(build: Class) -> Class:
        # A module that is loaded again brings its class again.
        if name in ATTENTIONS and ATTENTIONS[name].__qualname__ != getattr(build, "__qualname__", None):
            raise ValueError(f"there is an attention {name!r} already; choose another name")
        ATTENTIONS[name] = build
        return build

    return register


def find_attention(layer: AttentionLayer) -> Builder:
    """What builds an attention. ValueError for a name that is not in the table."""
    if callable(layer):
        return layer
    if layer in ATTENTIONS:
        return ATTENTIONS[layer]
    close = difflib.get_close_matches(str(layer), ATTENTIONS, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(ATTENTIONS))}"
    raise ValueError(f"unknown attention {str(layer)[:100]!r}; {remedy}")


def build_attention(layer: AttentionLayer, dim: int, num_heads: int, **settings: Any) -> nn.Module:
    """An attention for maps of `dim` channels.

    settings: what the family has for this place (n_win, topk ...). The attention gets those that its signature names;
    None stands for a setting that the place does not have. ValueError if the attention needs one that is not there.
    """
    build = find_attention(layer)
    parameters = list(inspect.signature(build).parameters.values())[2:]
    given = {name: value for name, value in settings.items() if value is not None}
    if not any(each.kind == each.VAR_KEYWORD for each in parameters):
        names = {each.name for each in parameters}
        given = {name: value for name, value in given.items() if name in names}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {each.name for each in parameters if each.default is each.empty and each.kind not in variadic}
    if missing := sorted(needed - given.keys()):
        name = layer if isinstance(layer, str) else getattr(layer, "__name__", "the attention")
        raise ValueError(f"{name} needs {', '.join(missing)}, which its place in the model does not have")
    return build(dim, num_heads, **given)


def per_stage(layers: PerStage, published: Sequence[AttentionLayer], name: str = "attn_layer") -> list[AttentionLayer]:
    """The attention of each stage: what `layers` chooses, otherwise the published one. ValueError with `name`."""
    if not isinstance(layers, list | tuple):
        layers = [layers] * len(STRIDES)
    check_per_stage(**{name: layers})
    return [other if layer is None else layer for layer, other in zip(layers, published, strict=True)]


def window_strides(layer: AttentionLayer, agent_stride: int | None = None) -> tuple[int, ...]:
    """The strides, in tokens, of the grids that an attention cuts into n_win x n_win windows; see `Backbone`.

    A class names them by an attribute `window_grids`; without one, any size will do.
    """
    strides = {"tokens": 1, "agents": agent_stride}
    return tuple(strides[grid] for grid in getattr(find_attention(layer), "window_grids", ()))
