"""What dense models found, drawn over the image."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

GOLDEN_RATIO = 0.618
"""Hues this far apart stay apart, however many there are."""
ROW = 16
"""Height of a line of the legend, in pixels."""


def color_of(number: int) -> tuple[int, int, int]:
    """Return the colour of a class, the same in every picture."""
    brightness = (1.0, 0.75, 0.5)[number // 8 % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number * GOLDEN_RATIO % 1, 0.85, brightness))


def draw_objects(
    image: Image.Image, boxes: Tensor, classes: Sequence[int], words: Sequence[str], masks: Tensor | None = None
) -> Image.Image:
    """Draw boxes (N, 4) with a few words each, in their classes' colours, and masks (N, H, W) bool below them."""
    picture, colors = pil_to_tensor(image), [color_of(number) for number in classes]
    if not colors:
        return image.copy()
    if masks is not None:
        picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colors)
    width = max(1, round(min(image.size) / 250))
    drawn = to_pil_image(draw_bounding_boxes(picture, boxes, colors=colors, width=width))
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(10, 4 * width + 6))
    for (left, top, *_), word in zip(boxes.tolist(), words, strict=True):
        draw.text((left + width + 1, top + width), word, "white", font, stroke_width=1, stroke_fill="black")
    return drawn


def draw_classes(image: Image.Image, numbers: Tensor, names: Mapping[int, str]) -> Image.Image:
    """Paint class numbers (H, W) over an image of that size; below it, a legend of `names` in their order."""
    masks = torch.stack([numbers == number for number in names])
    colors = [color_of(number) for number in names]
    painted = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), masks, alpha=0.6, colors=colors))
    legend = draw_legend(image.width, list(names.values()), colors)
    return Image.fromarray(np.concatenate([np.asarray(painted), np.asarray(legend)]))


def draw_legend(width: int, names: Sequence[str], colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Draw a white strip of this width with a square of its colour before each name, in as many lines as needed."""
    font, places, x, y = ImageFont.load_default(), [], 0, 0
    for name in names:
        needed = ROW + round(font.getlength(name)) + 8
        if x and x + needed > width:
            x, y = 0, y + ROW
        places.append((x, y))
        x += needed
    strip = Image.new("RGB", (width, y + ROW), "white")
    draw = ImageDraw.Draw(strip)
    for (left, top), name, color in zip(places, names, colors, strict=True):
        draw.rectangle((left + 3, top + 3, left + ROW - 4, top + ROW - 4), fill=color)
        draw.text((left + ROW, top + 2), name, fill="black", font=font)
    return strip
