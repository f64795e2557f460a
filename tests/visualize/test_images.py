"""Whatever file users bring becomes an RGB picture or a sentence."""

import numpy as np
import pytest
import torch
from awkward_images import ACCEPTED, REFUSED, gradient, write_transparent
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.pixels import Pixels, normalize
from runtime.errors import UsageError
from tasks.classification.transforms import eval_transform
from tasks.options import Options
from visualize.images import image_files, open_image, to_tensor, view_of


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_get_a_sentence(tmp_path, name):
    write, words = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        open_image(write(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_modes_show_what_they_hold(tmp_path, name):
    image = open_image(ACCEPTED[name](tmp_path / name))
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - gradient())
    assert difference.mean() < 6


def test_sixteen_bits_keep_their_range(tmp_path):
    image = open_image(ACCEPTED["deep.png"](tmp_path / "deep.png"))
    assert np.array_equal(np.asarray(image), gradient())


def test_transparent_parts_are_white(tmp_path):
    pixels = np.asarray(open_image(write_transparent(tmp_path / "clear.png")))
    assert (pixels[:16] == 255).all()
    assert np.array_equal(pixels[16:], gradient()[16:])


def test_photos_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it
    Image.fromarray(gradient()).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "phone.png")), np.rot90(gradient(), -1))


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="no image files"):
        image_files(tmp_path)
    for name in ("b.png", "a.JPG"):
        (tmp_path / name).write_text("")
    assert [path.name for path in image_files(tmp_path)] == ["a.JPG", "b.png"]


@pytest.mark.parametrize("crop_pct", [1.0, 224 / 256])
def test_view_is_the_evaluation_view(crop_pct):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (81, 123, 3), np.uint8))
    pixels = Pixels(crop_pct=crop_pct)
    expected = normalize(eval_transform(Options(input_size=64, crop_pct=crop_pct))(image)[None], pixels)[0]
    torch.testing.assert_close(to_tensor(view_of(image, 64, pixels), pixels)[0], expected)


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 40), side=st.integers(8, 64))
def test_views_of_any_proportions_are_square(width, height, side):
    assert view_of(Image.new("RGB", (width, height)), side, Pixels()).size == (side, side)
