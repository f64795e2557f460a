"""The recipe for small data learns from a checkpoint of other classes, as the README's command promises."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_earlier_run import EARLIER, OPTIONS

import main
from tasks.options import parse_args

SHADES = {"dune": (200, 150, 90), "meadow": (80, 160, 70), "sea": (60, 110, 190)}


def write_photos(root):
    """150 blurred photos of three landscapes to train on, 30 to test: their colours differ, and vary."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 50), ("val", 10)):
        for name, shade in SHADES.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                ground = np.array(shade) + draw.normal(0, 25, 3) + draw.normal(0, 30, (9, 12, 1))
                sky = np.array((150, 180, 220)) + draw.normal(0, 20, 3) + draw.normal(0, 10, (9, 12, 1))
                pixels = np.where(np.arange(9)[:, None, None] < draw.integers(2, 5), sky, ground).clip(0, 255)
                photo = Image.fromarray(pixels.astype(np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
                photo.filter(ImageFilter.GaussianBlur(1)).save(root / split / name / f"{number}.jpg")


@pytest.mark.slow
def test_finetune_recipe_learns_150_photos(tmp_path):
    write_photos(tmp_path / "photos")
    architecture = OPTIONS[OPTIONS.index("--model") : OPTIONS.index("--batch_size")]
    kwargs = OPTIONS[OPTIONS.index("--model_kwargs") : OPTIONS.index("--epochs")]
    argv = ["--recipe", "finetune", *architecture, *kwargs, "--finetune", str(EARLIER / "best.pth")]
    run = main.run(parse_args([*argv, "--data_path", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "run")]))
    assert max(run["test_acc1"], run["test_ema_acc1"]) > 90
