"""Between attention maps (`models.attention_maps`), whose places are tokens, and pictures, whose places are pixels."""

from torch import Tensor

from models.attention_maps import AgentMaps
from runtime.errors import UsageError

from .capture import Capture, Layer


def token_at(layer: Layer, size: tuple[int, int], x: int, y: int) -> tuple[int, int]:
    """Row and column of the token whose cell holds the pixel (x, y). UsageError outside of size (height, width)."""
    check_inside(size, x, y)
    return y // layer.stride, x // layer.stride


def check_inside(size: tuple[int, int], x: int, y: int) -> None:
    """UsageError if the pixel (x, y) lies outside of a picture of size (height, width)."""
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(
            f"the query {x},{y} lies outside of the {width}x{height} picture; "
            f"x goes from 0 to {width - 1}, y from 0 to {height - 1}"
        )


def check_head(layers: list[Layer], head: int | None) -> None:
    """UsageError if one of the layers has no such head; None stands for the mean over all."""
    fewest = min(layer.maps.num_heads for layer in layers)
    if head is not None and not 0 <= head < fewest:
        raise UsageError(f"stage {layers[0].stage} has no head {head}; use 0..{fewest - 1}, or none for their mean")


def over_heads(maps: Tensor, head: int | None) -> Tensor:
    """(m, ...) -> (...): one head's map, or the mean of all."""
    return maps.mean(0) if head is None else maps[head]


def window_box(layer: Layer, window: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of a window in pixels, which may lie in the padding."""
    n_win = layer.maps.n_win
    height, width = (side // n_win * layer.stride for side in layer.maps.sides)
    row, column = divmod(window, n_win)
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def pixel_positions(layer: Layer, positions: Tensor) -> Tensor:
    """Positions (..., 2) in [-1, 1], y first, as pixels (..., 2), x first: -1 and 1 are outer tokens' centres."""
    sides = positions.new_tensor(layer.maps.sides)
    token = (positions + 1) / 2 * (sides - 1)
    return ((token + 0.5) * layer.stride - 0.5).flip(-1)


def agent_pixels(layer: Layer) -> tuple[Tensor, Tensor]:
    """Where the agents (padding left out) start from and where they are, in pixels, x first: (ha, wa, g, 2) each."""
    ha, wa = layer.maps.agents
    positions = layer.maps.positions[:ha, :wa]
    return pixel_positions(layer, layer.maps.reference_grid()), pixel_positions(layer, positions)


def share_stopped(maps: AgentMaps) -> float:
    """The share of agents that were stopped at -1 or 1 along an axis; padding left out."""
    ha, wa = maps.agents
    return float((maps.positions[:ha, :wa].abs() >= 1).any(-1).double().mean())


def predictions(capture: Capture, classes: list[str], most: int = 5) -> list[tuple[str, float]]:
    """The most probable classes and their probabilities, best first."""
    values, numbers = capture.logits.softmax(-1).topk(min(most, len(capture.logits)))
    return [(classes[number], value) for number, value in zip(numbers.tolist(), values.tolist(), strict=True)]
