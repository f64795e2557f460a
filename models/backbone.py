"""The four-stage skeleton that all families share, with the methods timm expects of a model.

Maps between stages are (B, C, H, W), kept in channels-last memory, at strides 4, 8, 16 and 32.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Downsampling, pointwise_weights
from .ops import copied_for_autocast
from .weights import checkpoint_filter_fn, load_checkpoint, load_to_finetune, weights_of
from .weights.releases import RELEASES, find_release

STRIDES = (4, 8, 16, 32)
POSITION_TABLES = ("rpe_table", "relative_position_bias_table")
"""Ends of the names of parameters that weight decay spares."""


def check_per_stage(**arguments: object) -> None:
    """ValueError, naming the argument, unless each is a sequence with one value per stage."""
    for name, values in arguments.items():
        if not isinstance(values, list | tuple) or len(values) != len(STRIDES):
            raise ValueError(f"{name} takes one value for each of the {len(STRIDES)} stages, not {values}")


def stage_sides(side: int, round_up: bool = True) -> tuple[int, int, int, int]:
    """Token rows (or columns) of the four stages for an image side in pixels: halved 2 to 5 times.

    round_up: an odd side's last row counts, as in padded convolutions; otherwise it is lost, as in patches.
    """
    sides = [side]
    for _ in range(len(STRIDES) + 1):
        sides.append((sides[-1] + round_up) // 2)
    return tuple(sides[2:])


def first_stage_that_pads(
    side: int, n_win: int, grid_strides: Sequence[Sequence[int]], round_up: bool = True
) -> int | None:
    """The first stage (from 1) whose token or agent grids do not divide into `n_win` windows; None if all do.

    grid_strides: per stage (later stages may be missing), the strides in tokens of the grids that are cut into windows.
    """
    for number, (tokens, strides) in enumerate(zip(stage_sides(side, round_up), grid_strides, strict=False), start=1):
        if not tokens or any(-(-tokens // stride) % n_win for stride in strides):
            return number
    return None


def check_image_size(x: Tensor, n_win: int, grid_strides: Sequence[Sequence[int]], round_up: bool = True) -> Tensor:
    """Returns x (B, C, H, W); ValueError if a stage could not be cut into windows without padding."""

    def first_unfit_stage(side: int) -> int | None:
        return first_stage_that_pads(side, n_win, grid_strides, round_up)

    for axis, name in ((2, "height"), (3, "width")):
        side = int(x.shape[axis])
        stage = first_unfit_stage(side)
        if stage is None:
            continue
        below = next((s for s in range(side, 0, -1) if first_unfit_stage(s) is None), None)
        above = next(s for s in range(side, 100 * side + 10_000) if first_unfit_stage(s) is None)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"image size {x.shape[2]}x{x.shape[3]}: stage {stage} cannot cut this {name} into {n_win} windows; "
            f"use a {name} of {nearest} pixels, or auto_pad=True"
        )
    return x


torch.fx.wrap("check_image_size")


def overlapping_downsampling(in_chans: int, embed_dims: Sequence[int]) -> list[nn.Module]:
    """What opens each stage: a stem of two 3x3 convolutions, then one each, with BatchNorm; sides round up."""
    stem = Downsampling(
        nn.Conv2d(in_chans, embed_dims[0] // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(embed_dims[0] // 2),
        nn.GELU(),
        nn.Conv2d(embed_dims[0] // 2, embed_dims[0], 3, stride=2, padding=1),
        nn.BatchNorm2d(embed_dims[0]),
    )
    merges = [
        Downsampling(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after))
        for before, after in pairwise(embed_dims)
    ]
    return [stem, *merges]


def run_stage(downsample: nn.Module, blocks: nn.Module, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
    """Downsample, then run the blocks: (B, C, H, W) -> (B, C', H', W') in channels-last memory.

    blocks: a module that runs them one after the other, and iterates over them.
    grad_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again there.
    """
    x = downsample(x).contiguous(memory_format=torch.channels_last)
    return checkpoint_seq(blocks, x) if grad_checkpointing else blocks(x)


class Backbone(nn.Module):
    """Four stages of blocks between strided convolutions, then a norm, pooling and a linear classifier.

    make_block(stage, number, drop_path) builds block `number` of stage 0..3, a module (B, C, H, W) -> (B, C, H, W).
    downsampling(in_chans, embed_dims) builds what opens each stage; round_up: see `stage_sides`.
    make_stage(*blocks) puts blocks together; norm_layer(dim) builds the final norm.
    n_win, grid_strides: what has to divide into windows (see `first_stage_that_pads`); with `auto_pad` the
    attention pads what does not, without it such an image size is refused with a ValueError.
    drop_rate: dropout before the classifier; drop_path_rate: stochastic depth, growing linearly from 0 over all blocks.
    grad_checkpointing: recompute blocks in the backward pass to save memory; one bool or one per stage.
    output_stride: 32, the only one there is. device, dtype: where and in which precision the model is made.

    Input (B, in_chans, H, W) floats; output logits (B, num_classes).
    """

    def __init__(
        self,
        make_block: Callable[[int, int, float], nn.Module],
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        n_win: int,
        grid_strides: Sequence[Sequence[int]],
        downsampling: Callable[[int, Sequence[int]], list[nn.Module]] = overlapping_downsampling,
        round_up: bool = True,
        make_stage: Callable[..., nn.Module] = nn.Sequential,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        auto_pad: bool = True,
        grad_checkpointing: bool | Sequence[bool] = False,
        output_stride: int = STRIDES[-1],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output_stride != STRIDES[-1]:
            raise ValueError(
                f"{type(self).__name__} has an output stride of {STRIDES[-1]}, not {output_stride}: its stages cannot "
                "be dilated; choose a decoder that takes strides 4 to 32"
            )
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.n_win, self.auto_pad, self.round_up = n_win, auto_pad, round_up
        self.grid_strides = tuple(tuple(strides) for strides in grid_strides)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(embed_dims, STRIDES, strict=True))
        ]

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        with nullcontext() if device is None else torch.device(device):
            self.downsample_layers = nn.ModuleList(downsampling(in_chans, embed_dims))
            self.stages = nn.ModuleList(
                make_stage(*(make_block(stage, number, next(rates)) for number in range(depth)))
                for stage, depth in enumerate(depths)
            )
            self.norm = norm_layer(embed_dims[-1])
            self.head_drop = nn.Dropout(drop_rate)
            self.reset_classifier(num_classes, global_pool)
        self.to(dtype=dtype)
        self.set_grad_checkpointing(grad_checkpointing)

    # -- timm's interface ---------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; num_classes=0 leaves pooled features, global_pool='' the unpooled map."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | Sequence[bool] = True) -> None:
        """One bool for all stages, or one per stage."""
        self.grad_checkpointing = (enable,) * len(STRIDES) if isinstance(enable, bool) else tuple(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(POSITION_TABLES)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from input to output, for layer-wise learning rates."""
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": [
                (r"^downsample_layers\.(\d+)", None),
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)(?:\.blocks)?\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a release; timm calls this for a file with custom_load. WeightsError if it is not of this model."""
        load_to_finetune(self, weights_of(load_checkpoint(path), path), path)

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        """One stage, 0..3: (B, C, H, W) -> (B, C', H', W')."""
        checkpointed = self.training and self.grad_checkpointing[stage]
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else copied_for_autocast(pointwise_weights(self.stages[stage])):
            return run_stage(self.downsample_layers[stage], self.stages[stage], x, checkpointed)

    def check_input(self, x: Tensor) -> Tensor:
        return x if self.auto_pad else check_image_size(x, self.n_win, self.grid_strides, self.round_up)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after the chosen stages, and (unless `intermediates_only`) the normalised last map.

        norm: apply the final norm to the last stage's map too. stop_early: do not run later stages.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        x = self.check_input(x)
        last = len(self.stages) - 1
        intermediates = []
        for stage in range(last_taken + 1 if stop_early else len(self.stages)):
            x = self.forward_stage(stage, x)
            if stage in taken:
                intermediates.append(x)
        if stage == last and (norm or not intermediates_only):
            x = self.norm(x)  # once, for BatchNorm counts what it sees
            if norm and last in taken:
                intermediates[-1] = x
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages' maps do not need. Returns their indices, counted from the first stage."""
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        cut = last_taken < len(self.stages) - 1
        self.downsample_layers = self.downsample_layers[: last_taken + 1]
        self.stages = self.stages[: last_taken + 1]
        self.grid_strides = self.grid_strides[: last_taken + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> normalised map (B, C, H/32, W/32)."""
        x = self.check_input(x)
        for stage in range(len(self.stages)):
            x = self.forward_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, h, w) -> logits (B, num_classes), or pooled features (B, C) with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def build_variant(model_class: type[Backbone], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's builder with what all families share. `pretrained` takes the release unless another source is given."""
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        published = variant in RELEASES and cfg.url == RELEASES[variant].url
        if published and not (cfg.source or cfg.state_dict or cfg.file or cfg.hf_hub_id):
            found = {"file": str(find_release(variant)), "custom_load": True}
            kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), **found}
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's description of how a model wants its images, and where its first and last layers are.

    url: where the authors put its weights; timm's own loader does not know such places, `build_variant` does.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        **overrides,
    }
