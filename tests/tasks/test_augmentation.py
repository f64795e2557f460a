"""Augmentation on the device: the workers' random numbers, and Pillow's pixels."""

import random

import kill_often
import numpy as np
import pytest
import torch
from PIL import Image
from support import build_data, complaint, run_until_stopped
from test_fast_pixels import MOST, options, photograph
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp

import main
from runtime.checkpoint import LAST
from runtime.samplers import Key
from tasks.classification.augmentation import MOVES, DrawnTransform, Noted, augment, grouped
from tasks.classification.task import Classification
from tasks.classification.transforms import ImageTransform, train_transform
from utils import seeded


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def both(argv, images):
    """The images as the worker transforms them, and as the device does, (N, 3, S, S); whether both drew as much."""
    opts = options(*argv)
    worker = ImageTransform(train_transform(opts))
    drawing = DrawnTransform(train_transform(opts), opts.aa, opts.input_size)
    results, samples, after = [], [], []
    for number, image in enumerate(images):
        with seeded(number):
            results.append(worker({"image": image})["image"])
            after.append((random.random(), np.random.rand(), torch.rand(1).item()))
        with seeded(number):
            samples.append(drawing({"image": image}))
            after[-1] = after[-1] == (random.random(), np.random.rand(), torch.rand(1).item())
    drawn = grouped([sample["flip"] for sample in samples], [sample["steps"] for sample in samples])
    device = augment(torch.stack([sample["image"] for sample in samples]), drawn)
    return torch.stack(results).float(), device.float(), after


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m7-n4-p0.9", "v0", "original", "none"])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_device_does_what_the_worker_does_with_the_same_random_numbers(aa, interpolation):
    images = [photograph(160, 120, number) for number in range(48)]
    worker, device, same = both(["--aa", aa, "--train_interpolation", interpolation], images)
    assert all(same)
    difference = (worker - device).abs().mean((1, 2, 3))
    assert difference.mean() < MOST
    assert (difference < 0.01).float().mean() > 0.2


def test_device_mirrors_what_the_worker_mirrors():
    images = [photograph(160, 120, number) for number in range(16)]
    worker, device, _ = both(["--aa", "none", "--color_jitter", "null"], images)
    assert torch.equal(worker, device)


def apply_one(name, magnitude, image, **hparams):
    """An operation as Pillow does it, and as the device does."""
    settings = {"img_mean": (9, 120, 250), "interpolation": Image.Resampling.BICUBIC, "translate_const": 30, **hparams}
    pillow, ours = (AugmentOp(name, 1.0, magnitude, settings) for _ in range(2))
    ours.aug_fn = Noted(name, image.width)
    random.seed(magnitude)  # for the sign
    expected = pixels_of(pillow(image)).float()
    random.seed(magnitude)
    steps = ours([])
    before = pixels_of(image)[None].contiguous(memory_format=torch.channels_last)
    return expected, augment(before, grouped([False], [steps]))[0].float()


COLOURS = sorted(name for name in LEVEL_TO_ARG if name not in MOVES and "Blur" not in name)


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_pillow(name):
    for magnitude in range(11):
        for seed in (0, 3):
            expected, found = apply_one(name, magnitude, photograph(96, 96, seed))
            assert (expected - found).abs().max() <= 1
            assert (expected - found).abs().mean() < 0.02


@pytest.mark.parametrize("shade", [0, 77, 255])
@pytest.mark.parametrize("name", COLOURS)
def test_images_of_one_colour_are_those_of_pillow(name, shade):
    expected, found = apply_one(name, 7, Image.new("RGB", (32, 32), (shade, 0, 255)))
    assert (expected - found).abs().max() <= 1


@pytest.mark.parametrize("kernel", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_those_of_pillow(name, kernel):
    for magnitude in range(11):
        expected, found = apply_one(name, magnitude, photograph(96, 96), interpolation=kernel)
        assert (expected - found).abs().mean() < MOST


@pytest.mark.parametrize("name", MOVES)
def test_moves_shift_nothing_by_a_part_of_a_pixel(name):
    """On a slope of 1 of 255 per pixel, a shift by a part of a pixel is that difference of the mean."""
    slope = np.arange(96)[:, None] + np.arange(96) + 20
    for magnitude in (2, 5, 9):
        expected, found = apply_one(name, magnitude, Image.fromarray(np.stack([slope] * 3, -1).astype(np.uint8)))
        assert abs((expected - found).mean()) < 0.1


def test_images_without_steps_stay_as_they_are():
    images = torch.stack([pixels_of(photograph(32, 32, seed)) for seed in range(3)])
    before = images.clone()
    found = augment(images, grouped([False, True, False], [[], [("Invert", (0.0,))], []]))
    assert torch.equal(images, before)
    assert torch.equal(found[[0, 2]], images[[0, 2]])
    assert torch.equal(found[1], 255 - images[1].flip(2))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--aa", "augmix-m3"], "--aa augmix-m3 blends several views of an image; choose --augment_on worker"),
        (["--aa", "3a"], "--aa 3a has GaussianBlurRand, which no device does; choose --augment_on worker"),
        (["--aa", "rand-m9-t3a"], "has GaussianBlur, which"),
    ],
)
def test_policy_that_the_device_cannot_do_is_refused(argv, words):
    assert words in complaint(Classification(options("--augment_on", "device", *argv)).check)


def test_token_labelling_is_refused(capsys):
    with pytest.raises(SystemExit):
        options("--augment_on", "device", "--task", "token_labeling", "--tl_maps", "x")
    assert "--augment_on device goes with --task classification alone; leave it out" in capsys.readouterr().err


def test_workers_draw_what_the_process_itself_would(shared_images):
    batches = []
    for workers in (0, 2):
        argv = ["--data_path", str(shared_images), "--augment_on", "device", "--batch_size", "4"]
        data = build_data(options(*argv, "--num_workers", str(workers)))
        batches += [[augment(batch["images"], batch["drawn"]) for batch in data.train]]
        key = data.train.dataset[Key(3, epoch=2, position=7)]
        assert data.train.dataset[Key(3, epoch=2, position=7)]["steps"] == key["steps"]
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))


def test_stopped_training_ends_as_an_undisturbed_one(small_options, tmp_path, monkeypatch):
    argv = ["--augment_on", "device", "--deterministic", "--aa", "rand-m9-n3-p0.9"]
    main.run(small_options(*argv, "--output_dir", str(tmp_path / "whole")))
    run_until_stopped(small_options(*argv), 3, monkeypatch)
    main.run(small_options(*argv))
    assert (tmp_path / "run" / LAST).exists()
    assert kill_often.same_weights(tmp_path / "whole", tmp_path / "run")
