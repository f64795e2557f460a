"""A trained model's checkpoint."""

import pytest
from support import CLASSES, SMALL_RUN

import main
from runtime.checkpoint import BEST
from tasks.options import parse_args


@pytest.fixture(scope="session")
def checkpoint(shared_images, tmp_path_factory):
    """best.pth of a small run on four classes of images that differ by their brightness."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [*SMALL_RUN, "--data_path", str(shared_images), "--output_dir", str(folder), "--no_model_ema"]
    plain = ["--aa", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--color_jitter", "0"]
    main.run(parse_args([*argv, *plain, "--epochs", "12", "--lr", "0.1"]))
    return folder / BEST


@pytest.fixture(scope="session")
def images_by_class(shared_images):
    """Per class the path of an image that the model has not seen."""
    return {name: shared_images / "val" / name / "0.png" for name in CLASSES}
