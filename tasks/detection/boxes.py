"""Anchors, their matching with objects, the coding of boxes and their suppression, as the published detectors do it.

torchvision rounds anchors to whole pixels, spaces them by the ratio of image and map, keeps low matches without a
floor and bounds predicted sizes on one side only; the published code does none of these.

Boxes are (x1, y1, x2, y2) in pixels.
"""

import torch
from torch import Tensor
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms


class Anchors(AnchorGenerator):
    """Real-valued anchors every `strides[i]` pixels of map i."""

    def __init__(self, sizes: tuple[tuple[float, ...], ...], strides: tuple[int, ...]) -> None:
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float64,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Anchors (A, 4) about the origin, ratios (height / width) before sizes."""
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        widths, heights = (sizes / roots[:, None]).flatten(), (sizes * roots[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Do nothing: `forward` converts, so that the float64 originals stay exact."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """All anchors (N, 4) of each image: map by map, row by row, position by position."""
        dtype, device = feature_maps[0].dtype, feature_maps[0].device
        self.grids = [tuple(x.shape[-2:]) for x in feature_maps]
        levels = []
        for (rows, columns), stride, cell in zip(self.grids, self.strides, self.cell_anchors, strict=True):
            y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((shifts + cell).flatten(0, 1))
        anchors = torch.cat(levels).to(device, dtype)
        return [anchors] * len(image_list.image_sizes)

    def inside(self, size: tuple[int, int], divisor: int = 32) -> Tensor:
        """Whether each anchor's position (N,) lies in an image of (height, width) `size`, padded by itself."""
        flags = []
        for (rows, columns), stride, count in zip(
            self.grids, self.strides, self.num_anchors_per_location(), strict=True
        ):
            height, width = (-(-(-(-side // divisor) * divisor) // stride) for side in size)
            grid = (torch.arange(rows) < height)[:, None] & (torch.arange(columns) < width)
            flags.append(grid[..., None].expand(-1, -1, count).flatten())
        return torch.cat(flags)


class Matcher(detection_utils.Matcher):
    """Assigns anchors to objects by overlap; each object also takes all anchors that share its best overlap.

    floor: the least best overlap for that. Where objects compete, the last one wins.
    """

    def __init__(self, high: float, low: float, floor: float) -> None:
        super().__init__(high, low, allow_low_quality_matches=False)
        self.floor = floor

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Overlaps (objects, anchors) -> the object of each anchor; -1 background, -2 neither."""
        matches = super().__call__(match_quality_matrix)
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        takes = (match_quality_matrix == best) & (best >= self.floor)
        numbers = torch.arange(len(match_quality_matrix), device=takes.device)[:, None]
        taken_by = torch.where(takes, numbers, -1).amax(dim=0)
        return torch.where(taken_by >= 0, taken_by, matches)


class BoxCoder(detection_utils.BoxCoder):
    """Codes boxes relative to anchors; predicted sizes are bounded to 16/1000 .. 1000/16 of the anchor's."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Codes (N, 4 K) and anchors (N, 4) -> boxes (N, 4 K)."""
        codes = rel_codes.unflatten(1, (-1, 4)).clone()
        lowest = rel_codes.new_tensor(self.weights[2:]) * -self.bbox_xform_clip
        codes[..., 2:] = torch.maximum(codes[..., 2:], lowest)
        return super().decode_single(codes.flatten(1), boxes)


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the best `most` boxes (N, 4) after suppression at overlap `threshold` within each label."""
    keep = batched_nms(boxes, scores, labels, threshold)[:most]
    return boxes[keep], scores[keep], labels[keep]


def rescaled(boxes: Tensor, resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bring boxes (N, 4) on an image resized to (height, width) `resized` back to its own `size`."""
    return boxes * boxes.new_tensor([size[1] / resized[1], size[0] / resized[0]] * 2)
