"""The four stage outputs of a model, each through its own LayerNorm, for detectors and segmenters."""

from collections.abc import Sequence

from torch import Tensor, nn

from .backbone import Backbone, run_stage
from .layers import to_nchw, to_nhwc


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), at the key `ln`, as released dense checkpoints have it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.ln(to_nhwc(x)))


class FeaturePyramid(nn.Module):
    """Wraps a classification model as the backbone that released dense checkpoints hold.

    The model's stages are used, not copied; its final norm and classifier are left out.
    Released dense models use other windows than the classifiers: segmentation n_win=8, detection 8, 16 and 32
    (tiny, small, base), e.g. FeaturePyramid(timm.create_model("debiformer_tiny", n_win=8)).

    Input (B, in_chans, H, W) of any size; output four maps (B, C_i, ceil(H/s), ceil(W/s)) for s = 4, 8, 16, 32.
    """

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.downsample_layers = model.downsample_layers
        self.stages = model.stages
        self.extra_norms = nn.ModuleList(_ChannelNorm(info["num_chs"]) for info in model.feature_info)
        self.set_grad_checkpointing(model.grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool | Sequence[bool] = True) -> None:
        """Recompute blocks in the backward pass to save memory: one bool for all stages, or one per stage."""
        self.grad_checkpointing = (enable,) * len(self.stages) if isinstance(enable, bool) else tuple(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        stages = zip(self.downsample_layers, self.stages, self.grad_checkpointing, self.extra_norms, strict=True)
        for downsample, blocks, checkpointed, norm in stages:
            x = run_stage(downsample, blocks, x, checkpointed and self.training)
            outputs.append(norm(x))
        return outputs
