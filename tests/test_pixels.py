"""Images are normalised, resized and cropped as their model wants, in training, evaluation and for teachers."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import generate_default_cfgs, register_model
from torch import nn

import main
import models
from models.pixels import Pixels, Teacher, denormalize, normalize, pixels_of
from runtime.checkpoint import LAST
from tasks.classification.teacher import build_teacher
from tasks.classification.transforms import eval_transform, pixels_for
from tasks.options import parse_args
from tools.loading import load_model
from tools.predict import predict

SEEN: list[torch.Tensor] = []


class Watched(nn.Module):
    """A linear classifier of mean colours that keeps the images it was given in SEEN."""

    num_classes = 4

    def __init__(self, num_classes: int = 4, **kwargs) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        SEEN.append(images.detach().clone())
        return self.head(images.mean((2, 3)))


default_cfgs = generate_default_cfgs(
    {
        "half_pixels.untrained": {
            **{"num_classes": 4, "input_size": (3, 32, 32), "classifier": "head"},
            **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 1.0},
        }
    }
)


@register_model
def half_pixels(pretrained=False, **kwargs):
    model = Watched(kwargs.get("num_classes", 4))
    model.pretrained_cfg = model.default_cfg = timm.get_pretrained_cfg("half_pixels").to_dict()
    return model


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


@pytest.fixture
def white(tmp_path):
    """train/ and val/ with four white images each."""
    for number in range(4):
        for split in ("train", "val"):
            folder = tmp_path / "white" / split / str(number)
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 40), "white").save(folder / "0.png")
    return tmp_path / "white"


def run(white, tmp_path, *argv):
    plain = ["--aa", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--color_jitter", "0", "--no_model_ema"]
    small = ["--input_size", "32", "--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--no_repeated_aug"]
    small += ["--min_lr", "0"]
    place = ["--data_path", str(white), "--output_dir", str(tmp_path / "run"), "--num_workers", "0", "--device", "cpu"]
    main.run(parse_args(["--model", "half_pixels", *plain, *small, *place, *argv]))
    return tmp_path / "run" / LAST


def test_white_is_one_for_a_model_of_that_statistic(white, tmp_path):
    checkpoint = run(white, tmp_path)
    assert len(SEEN) == 2  # one batch of training, one of evaluation
    assert all(torch.equal(images, torch.ones_like(images)) for images in SEEN)
    SEEN.clear()
    loaded = load_model("half_pixels", str(checkpoint))
    list(predict(loaded, [str(white / "val" / "0" / "0.png")]))
    assert torch.equal(SEEN[0], torch.ones(1, 3, 32, 32))


def test_statistics_that_are_given_win_and_stay_with_the_checkpoint(white, tmp_path):
    checkpoint = run(white, tmp_path, "--mean", "0", "0", "0", "--std", "0.25", "0.25", "0.25")
    assert all(torch.equal(images, torch.full_like(images, 4)) for images in SEEN)
    assert pixels_for(load_model("half_pixels", str(checkpoint)).options).std == (0.25, 0.25, 0.25)


def test_teacher_is_given_images_of_its_own_statistics(white, tmp_path):
    model = timm.create_model("half_pixels")
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    options = parse_args(
        [
            *("--model", "debiformer_nano", "--teacher_model", "half_pixels", "--distillation_type", "soft"),
            *("--teacher_path", str(tmp_path / "teacher.pth"), "--data_path", str(white), "--teacher_input_size", "8"),
        ]
    )
    teacher = build_teacher(options, 4, pixels_for(options), torch.device("cpu"))
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    logits = teacher(normalize(images, Pixels()))
    expected = normalize(images, Pixels(mean=(0.5,) * 3, std=(0.5,) * 3))
    torch.testing.assert_close(SEEN[0], expected)
    torch.testing.assert_close(logits, model(expected))
    assert isinstance(teacher, Teacher)


@pytest.mark.parametrize("name", models.MODEL_NAMES)
def test_models_of_this_project_want_what_was_published(name):
    assert pixels_of(name) == Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 224 / 256, "center")


@pytest.mark.parametrize("name", ["half_pixels", "vit_base_patch16_224", "vit_base_patch16_siglip_224", "resnet18"])
def test_evaluation_of_a_model_of_timm_is_timms(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    cfg = timm.get_pretrained_cfg(name).to_dict()
    config = resolve_data_config({"input_size": (3, 32, 32)}, pretrained_cfg=cfg)
    options = parse_args(["--model", name, "--input_size", "32", "--data_path", "x"])
    ours = normalize(eval_transform(options)(image)[None], pixels_for(options))[0]
    torch.testing.assert_close(ours, create_transform(**config)(image), rtol=0, atol=1e-6)


def test_denormalizing_gives_the_picture_back():
    images, pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), Pixels(mean=(0.5,) * 3)
    torch.testing.assert_close(denormalize(normalize(images, pixels), pixels), images / 255)


@pytest.mark.parametrize("given", ["--mean 0.5 0.5 2", "--mean 0.5 0.5", "--std 0 1 1", "--std a a a"])
def test_statistics_that_cannot_be_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", "debiformer_nano", "--data_path", "x", *given.split()])
    assert given.split()[0] in capsys.readouterr().err
