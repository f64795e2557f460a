"""Faster ways to the same pixels: JPEGs decoded strictly, crops resized by torch, shears and shifts line by line."""

import io
import random

import numpy as np
import pytest
import torch
from awkward_images import write_cmyk
from PIL import Image
from support import build_data
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp

from runtime import images
from runtime.images import ImageRefused, open_rgb, read_pixels
from runtime.samplers import Key
from tasks.classification.shifts import KINDS, shift_lines, speed_up
from tasks.classification.transforms import eval_transform, train_transform
from tasks.options import parse_args
from utils import seeded

MOST = 1.5
"""Mean absolute difference to Pillow's pixels, of 255."""


def photograph(width=160, height=120, seed=0):
    """Smooth shapes with texture on them."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    texture = np.random.default_rng(seed + 1).integers(-12, 13, smooth.shape)
    return Image.fromarray((smooth + texture).clip(0, 255).astype(np.uint8))


def options(*argv):
    return parse_args(["--model", "debiformer_nano", "--data_path", "x", "--input_size", "64", *argv])


def values(image):
    return torch.as_tensor(np.array(image) if isinstance(image, Image.Image) else image).float()


def jpeg(image, **settings):
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file


# -- reading


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_read_pixels_gives_the_values_that_pillow_gives(tmp_path, mode, subsampling):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(photograph(77, 51).convert(mode), subsampling=subsampling, progressive=True).getvalue())
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        pixels = read_pixels(source)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(open_rgb(path)))
        assert isinstance(pixels, torch.Tensor)


def sideways(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    return path.write_bytes(jpeg(photograph(), exif=exif).getvalue())


FOR_PILLOW = {
    "cmyk.jpg": write_cmyk,
    "sideways.jpg": sideways,
    "png.jpg": lambda path: photograph().save(path, "PNG"),
}


@pytest.mark.parametrize("name", FOR_PILLOW)
def test_read_pixels_leaves_what_is_not_decoded_strictly_to_pillow(tmp_path, name):
    path = tmp_path / name
    FOR_PILLOW[name](path)
    refused = []
    pixels = read_pixels(path, refused=lambda: refused.append(path))
    assert np.array_equal(np.asarray(pixels), np.asarray(open_rgb(path)))
    assert isinstance(pixels, Image.Image)
    assert bool(refused) == (name != "png.jpg")


def test_read_pixels_refuses_a_torn_file_and_a_large_one(tmp_path):
    content = jpeg(photograph()).getvalue()
    (tmp_path / "torn.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_pixels(tmp_path / "torn.jpg")
    with pytest.raises(ImageRefused, match="has 160x120 pixels, more than 1,000 in all"):
        read_pixels(io.BytesIO(content), 1000)


def test_read_pixels_does_without_the_library(tmp_path, monkeypatch):
    photograph().save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(np.asarray(read_pixels(tmp_path / "a.jpg")), np.asarray(open_rgb(tmp_path / "a.jpg")))


# -- augmentation


@pytest.mark.parametrize("name", KINDS)
def test_shears_and_shifts_are_those_of_pillow(name):
    image = photograph(96, 96)
    hparams = {"img_mean": (9, 120, 250), "interpolation": Image.Resampling.BICUBIC}
    for magnitude in range(1, 11):
        pillow, ours = (AugmentOp(name, 1.0, magnitude, hparams) for _ in range(2))
        speed_up([ours])
        results = []
        for op in (pillow, ours):
            random.seed(magnitude)  # for the sign
            results.append(values(op(image)))
        assert (results[0] - results[1]).abs().max() <= 1
        assert (results[0] - results[1]).abs().mean() < 0.02


def test_shears_leave_a_colour_as_it_is():
    lines = np.full((64, 64, 3), 255, np.uint8)
    assert (shift_lines(lines, 0.3 * np.arange(64) - 10, (255, 255, 255)) == 255).all()


def test_lines_shifted_beyond_their_ends_are_filled():
    lines = np.full((3, 5, 3), 200, np.uint8)
    moved = shift_lines(lines, np.array([-50.0, 0.0, 50.0]), (1, 2, 3))
    assert (moved[1] == 200).all()
    assert (moved[[0, 2]] == (1, 2, 3)).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "original", "none"])
def test_training_pixels_are_those_of_timm_with_the_same_random_numbers(interpolation, aa):
    image = photograph()
    opts = options("--train_interpolation", interpolation, "--aa", aa)
    policy = {"auto_augment": None if aa == "none" else aa, "color_jitter": opts.color_jitter}
    plain = create_transform(
        64, is_training=True, interpolation=interpolation, scale=tuple(opts.scale), normalize=False, **policy
    )
    fast, found = train_transform(opts), []
    for number in range(24):
        results = []
        for transform in (plain, fast):
            with seeded(number):
                results.append(values(transform(image)))
        found.append((results[0] - results[1]).abs().mean())
    assert torch.stack(found).mean() < MOST
    assert torch.stack(found).max() < 2 * MOST


def test_crop_of_a_tensor_is_that_of_an_image():
    image, transform = photograph(), train_transform(options())
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for number in range(5):
        with seeded(number):
            one = transform(image)
        with seeded(number):
            assert torch.equal(transform(tensor), one)


@pytest.mark.parametrize("train", [True, False])
def test_resizing_shifts_nothing(train):
    """On a slope of 1 of 255 per pixel, a shift by a part of a pixel is that difference of the mean."""
    slope = np.arange(150)[:, None] + np.arange(100)
    image = Image.fromarray(np.stack([slope] * 3, -1).astype(np.uint8))
    if train:
        crop = train_transform(options()).transforms[0]
        reference = create_transform(64, is_training=True, interpolation="bicubic", normalize=False).transforms[0]
    else:
        crop = eval_transform(options("--eval_resize", "torch")).transforms[0]
        reference = eval_transform(options()).transforms[0]
    for number in range(10):
        with seeded(number):
            one = values(crop(image))
        with seeded(number):
            two = values(reference(image))
        assert one.shape == two.shape
        assert abs((one - two).mean()) < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_evaluation_may_be_resized_by_torch(interpolation):
    argv = ["--interpolation", interpolation]
    for size in ((160, 120), (70, 300), (64, 64)):
        plain = values(eval_transform(options(*argv))(photograph(*size)))
        fast = values(eval_transform(options(*argv, "--eval_resize", "torch"))(photograph(*size)))
        assert (plain - fast).abs().mean() < MOST


# -- together


def test_folder_of_jpegs_is_read_without_pillow(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                photograph(90 + number, 70, number).save(tmp_path / split / name / f"{number}.jpg")
    argv = ["--data_path", str(tmp_path), "--num_workers", "0", "--batch_size", "4", "--eval_resize", "torch"]
    data = build_data(options(*argv))
    batches = [next(iter(loader))["images"] for loader in (data.train, data.val)]
    assert isinstance(data.train.dataset.read(0)["image"], torch.Tensor)
    for batch in batches:
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batches[1][2], data.val.dataset[Key(2)]["image"])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_epoch_says_how_many_jpegs_were_left_to_pillow(run_small, image_folder, capsys, workers):
    for number in range(4):
        write_cmyk(image_folder / "train" / "cat" / f"cmyk{number}.jpg")
    run_small("--data_path", str(image_folder), "--num_workers", workers, "--batch_size", "26")
    lines = [line for line in capsys.readouterr().err.splitlines() if "Pillow" in line]
    says = "JPEGs that only Pillow reads, which takes longer (CMYK, turned or damaged): 4"
    assert lines == [f"note: epoch {epoch}/2: {says}" for epoch in (1, 2)]
