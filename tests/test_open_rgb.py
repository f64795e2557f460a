"""One way from a file to RGB pixels, wherever images are read."""

import os

import numpy as np
import pytest
import torch
from awkward_images import ACCEPTED, gradient, write_huge, write_transparent
from PIL import Image
from support import SMALL_RUN, build_data, command, complaint

import runtime.storage
from runtime.distributed import DistInfo
from runtime.errors import TemporaryFailure, UsageError, exit_on_error
from runtime.images import ImageRefused, open_rgb
from runtime.samplers import Key
from tasks.classification.sources import ImageFiles, Samples
from tasks.classification.transforms import ImageTransform
from tasks.loading import Transformed
from tasks.options import parse_args
from visualize.images import open_image

CPU = torch.device("cpu")


def write_sideways(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it
    Image.fromarray(np.rot90(gradient())).save(path, exif=exif)
    return path


ODD = {**ACCEPTED, "clear.png": write_transparent, "phone.png": write_sideways}


def as_array(image):
    return np.asarray(image)


def keyed_images(path, target=0):
    source = Samples(ImageFiles([str(path)], [target], []), numbers=None)
    return Transformed(source, ImageTransform(as_array), seed=0)


@pytest.mark.parametrize("name", ODD)
def test_training_evaluation_and_pictures_read_the_same_pixels(tmp_path, name):
    path = ODD[name](tmp_path / name)
    keyed = keyed_images(path)
    pixels = keyed[Key(0)]["image"]
    assert np.array_equal(pixels, as_array(open_image(path)))
    rows = pixels[16:] if name == "clear.png" else pixels
    assert np.abs(rows.astype(int) - gradient()[: len(rows)]).mean() < 6


def test_damaged_exif_block_does_no_harm(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x07" * 40)
    assert open_rgb(tmp_path / "a.jpg").size == (40, 32)


def test_constant_negative_image_is_no_division_by_zero(tmp_path):
    Image.fromarray(np.full((9, 9), -3, np.float32)).save(tmp_path / "flat.tiff")
    assert open_rgb(tmp_path / "flat.tiff").getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 1_000_000), "has 1x1000000 pixels, over 256 times as long as wide; crop it"),
        ((13_000, 13_000), "has 13000x13000 pixels, more than 100,000,000 in all; shrink it"),
        ((20_000, 20_000), "has more than 100,000,000 pixels; shrink it"),
    ],
)
def test_images_of_excessive_size_are_refused_before_they_are_decoded(tmp_path, size, words):
    path = write_huge(tmp_path / "huge.png", *size)
    with pytest.raises(ImageRefused) as error:
        open_rgb(path)
    assert str(error.value) == words
    keyed = keyed_images(path)
    assert complaint(keyed.__getitem__, Key(0)).startswith(f"cannot read image {path}: it {words}")


def test_bound_on_pixels_is_an_option(image_folder):
    options = ["--data_path", str(image_folder), "--no_repeated_aug", "--max_image_pixels"]
    data = build_data(parse_args([*SMALL_RUN, *options, "1000"]), DistInfo(), CPU)
    with pytest.raises(UsageError, match=r"has 44x40 pixels, more than 1,000 in all; shrink it \(--max_image_pixels\)"):
        next(iter(data.train))


def test_larger_bound_reads_larger_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "a.png"
    Image.new("L", (30, 30)).save(path)
    with pytest.raises(ImageRefused):
        open_rgb(path, 80)
    assert open_rgb(path, 900).size == (30, 30)


def test_fifo_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageRefused, match="is no regular file"):
        open_rgb(tmp_path / "pipe.png")
    done = command("-m", "tools.predict", tmp_path / "pipe.png", "--model", "debiformer_nano", timeout=120)
    assert done.returncode == 2
    assert f"cannot read image {tmp_path / 'pipe.png'}: it is no regular file" in done.stderr


# -- storage that fails: /proc/self/mem answers EIO where no memory is mapped


@pytest.fixture
def failing_image(tmp_path):
    link = tmp_path / "image.png"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        link.read_bytes()
    return link


def test_image_is_read_again_when_the_storage_has_failed(failing_image, monkeypatch):
    pauses = []

    def recover(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            failing_image.unlink()
            Image.fromarray(gradient()).save(failing_image)

    monkeypatch.setattr(runtime.storage.time, "sleep", recover)
    keyed = keyed_images(failing_image, 3)
    pixels, target = keyed[Key(0)].values()
    assert np.array_equal(pixels, gradient())
    assert (target, pauses) == (3, [1, 2])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_storage_that_goes_on_failing_ends_the_run_to_be_tried_again(
    image_folder, failing_image, monkeypatch, capsys, workers
):
    monkeypatch.setattr(runtime.storage, "PAUSES", (0.0,) * 5)
    image = image_folder / "train" / "cat" / "0.png"
    failing_image.rename(image.with_name("0.png"))
    options = parse_args([*SMALL_RUN, "--data_path", str(image_folder), "--num_workers", workers])
    data = build_data(options, DistInfo(), CPU)
    with pytest.raises(SystemExit) as end:
        exit_on_error("main.py", lambda: list(data.train))
    assert end.value.code == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: error: cannot read image {image}: the storage fails ([Errno 5]")


def test_missing_image_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.storage.time, "sleep", None)
    keyed = keyed_images(tmp_path / "none.png")
    assert "FileNotFoundError" in complaint(keyed.__getitem__, Key(0))


def test_what_failed_is_named(monkeypatch):
    monkeypatch.setattr(runtime.storage, "PAUSES", ())
    with pytest.raises(TemporaryFailure, match="the storage fails"):
        runtime.storage.read_patiently(lambda: os.read(os.open("/proc/self/mem", os.O_RDONLY), 1), "it")
