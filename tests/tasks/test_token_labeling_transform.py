"""Maps cropped, flipped and moved with their images, against slow computations and images that show where they are."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support import complaint
from timm.data.auto_augment import RandAugment

from tasks.classification.augmentation import MOVES
from tasks.classification.transforms import train_transform
from tasks.options import parse_args
from tasks.token_labeling.transform import MapTransform, crop_maps, dense_map
from utils import seeded


def options(*argv):
    base = ["--task", "token_labeling", "--tl_maps", "unused", "--data_set", "DIGITS", "--input_size", "64"]
    return parse_args([*base, *argv])


def transform_of(*argv):
    opts = options(*argv)
    return MapTransform(train_transform(opts), opts.aa)


def batch_of(samples):
    batch = {name: torch.tensor(np.stack([s[name] for s in samples])) for name in ("box", "flip", "moves")}
    return {**batch, "moved": [number for number, s in enumerate(samples) if s["moved"]]}


def bilinear(values, y, x):
    """A map (C, H, W) in float64 at a place in cells; beyond the centres of the outer cells it stays the same."""
    rows, columns = values.shape[1:]
    y, x = min(max(y - 0.5, 0), rows - 1), min(max(x - 0.5, 0), columns - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    dy, dx = y - top, x - left
    upper = values[:, top, left] * (1 - dx) + values[:, top, right] * dx
    lower = values[:, bottom, left] * (1 - dx) + values[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def slow_crop(values, box, flip, grid):
    """What `crop_maps` computes of one image without moves, point by point."""
    values = values.double()
    rows, columns = values.shape[1:]
    left, top, right, bottom = (float(edge) for edge in box)
    per_row = math.ceil(np.float32(bottom * rows) / grid[0] - np.float32(top * rows) / grid[0] - 1e-6)
    per_column = math.ceil(np.float32(right * columns) / grid[1] - np.float32(left * columns) / grid[1] - 1e-6)
    result = torch.zeros(len(values), *grid, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            points = []
            for i in range(per_row):
                for j in range(per_column):
                    y = top + (bottom - top) * (row + (i + 0.5) / per_row) / grid[0]
                    x = left + (right - left) * (column + (j + 0.5) / per_column) / grid[1]
                    points.append(bilinear(values, y * rows, x * columns))
            place = grid[1] - 1 - column if flip else column
            result[:, row, place] = torch.stack(points).mean(0)
    return result


def test_crops_agree_with_a_slow_computation_border_included():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 4, 18, 13, generator=generator)
    boxes = torch.tensor(
        [
            [0, 0, 1, 1],
            [0, 0, 0.31, 0.47],
            [0.6, 0.73, 1, 1],
            [0.5, 0.1, 0.52, 0.9],
            [0, 0.4, 1, 0.41],
            [0.2, 0.3, 0.7, 0.8],
        ]
    )
    flip = torch.tensor([False, True, False, True, True, False])
    batch = {"box": boxes, "flip": flip, "moves": torch.zeros(6, 0, 2, 3), "moved": []}
    for grid in ((7, 7), (3, 5)):
        found = crop_maps(maps, batch, grid)
        for number in range(6):
            slow = slow_crop(maps[number], boxes[number], flip[number], grid)
            assert (found[number] - slow).abs().max() < 1e-6


def test_moves_that_do_nothing_leave_the_crop_as_it_is():
    maps = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 2, 3)
    batch = {"box": torch.tensor([[0.0, 0, 1, 1]]).repeat(2, 1), "flip": torch.tensor([False, True]), "moves": still}
    plain, moved = (crop_maps(maps, {**batch, "moved": chosen}, (7, 7)) for chosen in ([], [0, 1]))
    assert (plain - moved).abs().max() < 1e-6


def test_image_is_the_one_that_classification_draws():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    ours, plain = pickle.loads(pickle.dumps(transform_of())), train_transform(options())
    for number in range(40):
        with seeded(number):
            here = ours({"image": image})["image"]
        with seeded(number):
            assert torch.equal(here, plain(image))


def places_image(width, height):
    """Red grows to the right, green downwards, blue is full."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.round(np.stack([x, y, np.ones_like(x)], -1) * 255).astype(np.uint8))


def places_map(rows, columns):
    """The same as a map (3, rows, columns) of its cells' centres."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


@pytest.mark.parametrize("policy", ["none", "rand-m9-n3-p0.7-mstd0.5-inc1"])
def test_every_token_is_told_the_place_that_its_pixels_show(policy):
    transform = transform_of("--aa", policy, "--input_size", "224", "--color_jitter", "null")
    for part in transform.transform.transforms:
        if isinstance(part, RandAugment):
            part.ops = [op for op in part.ops if op.name in MOVES]
            for op in part.ops:
                op.kwargs["fillcolor"] = (0, 0, 0)  # so that blue says how much of the image shows
    image, samples = places_image(320, 240), []
    for number in range(60):
        with seeded(number):
            samples.append(transform({"image": image}))
    batch = batch_of(samples)
    assert batch["flip"].any()
    assert not batch["flip"].all()
    assert bool(batch["moved"]) == (policy != "none")
    found = crop_maps(places_map(64, 64).expand(60, -1, -1, -1), batch, (7, 7))
    shown = torch.stack([sample["image"] for sample in samples]).float().unflatten(3, (7, 32)).unflatten(2, (7, 32))
    shown = shown.mean((3, 5)) / 255
    whole = (shown[:, 2] > 0.999) & (found[:, 2] > 0.999)
    assert whole.float().mean() > 0.4
    assert (
        ((found - shown).abs().amax(1)[whole]).max() < 0.012
    )  # a map's outer cells reach no further than their centres
    assert ((found - shown)[:, 2].abs()).mean() < 0.01
    assert ((found - shown)[:, 2].abs()).max() < 0.08  # of points against pixels along a slanted frame


def test_crop_in_one_corner_reads_that_corner():
    transform = transform_of("--aa", "none", "--hflip", "0", "--color_jitter", "null", "--scale", "0.1", "0.1")
    with seeded(4):
        sample = transform({"image": places_image(300, 200)})
    left, top, right, bottom = sample["box"].tolist()
    assert abs((left + right) - (top + bottom)) > 0.3  # x and y cannot be taken for each other
    found = crop_maps(places_map(50, 50)[None], batch_of([sample]), (1, 1))[0, :2, 0, 0]
    assert found.tolist() == pytest.approx([(left + right) / 2, (top + bottom) / 2], abs=2e-3)


def test_stored_classes_become_shares_that_sum_to_one():
    values, indices = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1), torch.tensor([3, 0]).view(1, 2, 1, 1)
    shares = dense_map(values.half(), indices.to(torch.int16), 4).flatten().tolist()
    e = math.e
    assert shares == pytest.approx([1 / (1 + e), 0, 0, e / (1 + e)])


@pytest.mark.parametrize(("argv", "words"), [(("--aa", "augmix-m3"), "--aa augmix-m3 blends")])
def test_what_has_no_places_is_refused(argv, words):
    assert words in complaint(transform_of, *argv)
    cifar = options("--data_set", "CIFAR", "--input_size", "32")
    assert "--input_size above 32" in complaint(MapTransform, train_transform(cifar), cifar.aa)


@pytest.mark.parametrize("policy", ["original", "v0", "3a"])
def test_other_policies_are_followed(policy):
    image = places_image(80, 80)
    transform = transform_of("--aa", policy)
    moved = 0
    for number in range(30):
        with seeded(number):
            moved += transform({"image": image})["moved"]
    assert bool(moved) == (policy != "3a")
