"""Logits of a whole image: at once, by overlapping windows, or averaged over scales and mirror images."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .heads import resize

Network = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> logits (B, K, H, W)."""


def windows(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield windows (top, left, bottom, right) that cover an image row by row; the last ones are moved inside."""
    (height, width), (crop_h, crop_w) = size, crop
    rows, columns = (
        max(side - part + step - 1, 0) // step + 1 for side, part, step in zip(size, crop, stride, strict=True)
    )
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + crop_h, height), min(column * stride[1] + crop_w, width)
            yield max(bottom - crop_h, 0), max(right - crop_w, 0), bottom, right


def sliding_window(network: Network, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Average the logits of overlapping windows of (height, width) `crop`, every `stride` pixels."""
    total, count = None, images.new_zeros(1, 1, *images.shape[2:])
    for top, left, bottom, right in windows(tuple(images.shape[2:]), crop, stride):
        logits = network(images[:, :, top:bottom, left:right])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
        total[:, :, top:bottom, left:right] += logits
        count[:, :, top:bottom, left:right] += 1
    return total / count


def augmented(network: Network, images: Tensor, size: tuple[int, int], scales: Sequence[float], flip: bool) -> Tensor:
    """Average class probabilities over rescaled images and, with `flip`, their mirror images: (B, K, *size)."""
    total = None
    for scale in scales:
        sides = [round(side * scale) for side in images.shape[2:]]
        scaled = images if scale == 1 else resize(images, sides)
        for mirrored in (False, True) if flip else (False,):
            logits = network(scaled.flip(3) if mirrored else scaled)
            probabilities = resize(logits.flip(3) if mirrored else logits, size).softmax(1)
            total = probabilities if total is None else total + probabilities
    return total / (len(scales) * (2 if flip else 1))
