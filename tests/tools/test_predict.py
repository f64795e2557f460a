"""Predictions from the shell."""

import argparse
import re

import pytest
import timm
import torch
from support import CLASSES, command
from timm.data import ImageNetInfo

from models.weights import WeightsError, load_checkpoint
from runtime.errors import UsageError
from tools import predict
from tools.loading import UNTRAINED, load_model


def lines_of(capsys, *argv):
    predict.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


def test_trained_model_names_what_it_sees(checkpoint, images_by_class, capsys):
    lines = lines_of(capsys, *images_by_class.values(), "--model", "debiformer_nano", "--checkpoint", checkpoint)
    blocks = [lines[i : i + 5] for i in range(0, len(lines), 5)]
    for (path, *ranked), (name, image) in zip(blocks, images_by_class.items(), strict=True):
        assert path == str(image)
        found = [re.fullmatch(r" +([\d.]+)%  (\w+)", line).groups() for line in ranked]
        assert found[0][1] == name
        assert {label for _, label in found} == set(CLASSES)
        shares = [float(share) for share, _ in found]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.3)


def test_what_the_checkpoint_says_is_used(checkpoint):
    loaded = load_model("debiformer_nano", str(checkpoint))
    assert loaded.labels == list(CLASSES)
    assert loaded.options.input_size == 32
    assert loaded.model.num_features == 64  # of --model_kwargs embed_dims=16,32,48,64
    assert loaded.trained
    assert not loaded.model.training


def test_untrained_weights_are_announced(images_by_class, capsys):
    lines = lines_of(capsys, images_by_class["cat"], "--model", "debiformer_nano")
    assert lines[0] == UNTRAINED
    assert len(lines) == 7


def test_imagenet_names_need_no_file(images_by_class, capsys, tmp_path):
    """Weights as published, a bare state dict of 1000 classes: the names are ImageNet's."""
    model = timm.create_model("debiformer_nano")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    model.head.bias.data[[207, 281]] = torch.tensor([9.0, 10.0])
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    lines = lines_of(
        capsys, images_by_class["cat"], "--model", "debiformer_nano", "--checkpoint", tmp_path / "bare.pth"
    )
    assert lines[1].endswith("%  tabby, tabby cat")
    assert lines[2].endswith("%  golden retriever")


def test_synsets_as_folder_names_are_translated(images_by_class, tmp_path):
    synsets = ImageNetInfo().label_names()[:3]
    model = timm.create_model("debiformer_nano", num_classes=3)
    torch.save({"model": model.state_dict(), "classes": synsets}, tmp_path / "three.pth")
    loaded = load_model("debiformer_nano", str(tmp_path / "three.pth"))
    ((_, ranked),) = predict.predict(loaded, [str(images_by_class["cat"])])
    names = {"tench, Tinca tinca", "goldfish, Carassius auratus"}
    assert names < {name for name, _ in ranked}


def test_class_names_that_do_not_fit_are_not_used(tmp_path):
    model = timm.create_model("debiformer_nano", num_classes=3)
    torch.save({"model": model.state_dict(), "classes": ["a", "b"]}, tmp_path / "odd.pth")
    assert load_model("debiformer_nano", str(tmp_path / "odd.pth")).labels == ["class 0", "class 1", "class 2"]


def test_models_of_timm_work_too(images_by_class, tmp_path, capsys):
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "resnet.pth")
    weights = ("--checkpoint", tmp_path / "resnet.pth")
    lines = lines_of(capsys, images_by_class["cat"], "--model", "resnet10t", *weights, "--input-size", "64")
    assert len(lines) == 6
    assert re.search(r"class [0-6]$", lines[1])


@pytest.mark.parametrize(
    ("args", "size"),
    [
        (argparse.Namespace(input_size=96, model="debi_nano", lr=1e-3), 96),
        (argparse.Namespace(), 64),
        ({"input_size": "large", "model_kwargs": ["n_win"], "crop_pct": None}, 64),
        (["input_size"], 64),
    ],
)
def test_options_as_authors_save_them(tmp_path, args, size):
    """An argparse Namespace; and what is none of the options is not taken for one."""
    model = timm.create_model("debiformer_nano", num_classes=3, img_size=size)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "authors.pth")
    loaded = load_model("debiformer_nano", str(tmp_path / "authors.pth"))
    assert loaded.options.input_size == size
    assert loaded.model.state_dict().keys() == model.state_dict().keys()


def test_averaged_weights(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    average = {name: value + 1 if name == "head.bias" else value for name, value in content["model"].items()}
    torch.save({**content, "model_ema": average}, tmp_path / "both.pth")
    plain, averaged = (load_model("debiformer_nano", str(tmp_path / "both.pth"), use_ema=use) for use in (False, True))
    torch.testing.assert_close(averaged.model.head.bias, plain.model.head.bias + 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{image}", "--model", "debiformer_nanno"], ["debiformer_nanno", "did you mean debiformer_nano"]),
        (["{image}", "--model", "debiformer_nano", "--checkpoint", "/nowhere.pth"], ["/nowhere.pth does not exist"]),
        (["{image}", "--model", "debiformer_nano", "--checkpoint", "{image}"], ["is not a checkpoint"]),
        (["{image}", "--model", "biformer_tiny", "--checkpoint", "{checkpoint}"], ["is of another model"]),
        (["{image}", "--model", "vit_tiny_patch16_224", "--checkpoint", "{checkpoint}"], ["vit_tiny_patch16_224"]),
        (["/nowhere.png", "--model", "debiformer_nano"], ["cannot read image /nowhere.png"]),
        (["{checkpoint}", "--model", "debiformer_nano"], ["cannot read image", "best.pth"]),
        (["/tmp", "--model", "debiformer_nano"], ["cannot read image /tmp"]),
        (["{image}"], ["--model"]),
        (["--model", "debiformer_nano"], ["IMAGE"]),
        (["{image}", "--model", "biformer_stl", "--input_size", "8"], ["--input_size 8", "at least 32 pixels"]),
        (["{image}", "--model", "debiformer_nano", "--input_size", "0"], ["--input_size must be at least 1"]),
        (["{image}", "--model", "debiformer_nano", "--device", "gpu"], ["--device 'gpu'"]),
        (["{image}", "--model", "debiformer_nano", "--use_ema", "--checkpoint", "{checkpoint}"], ["averaged weights"]),
        (["{image}", "--model", "debiformer_nano", "--model_kwargs", "n_windows=3"], ["n_windows"]),
    ],
)
def test_bad_input_is_refused_in_one_line(checkpoint, images_by_class, capsys, argv, words):
    filled = [word.format(image=images_by_class["cat"], checkpoint=checkpoint) for word in argv]
    with pytest.raises((UsageError, WeightsError, SystemExit)) as stop:
        predict.main(filled)
    if isinstance(stop.value, SystemExit):
        assert stop.value.code == 2
    message = capsys.readouterr().err.strip() if isinstance(stop.value, SystemExit) else str(stop.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_command_prints_and_ends_as_documented(checkpoint, images_by_class, tmp_path):
    run = ["-m", "tools.predict", images_by_class["dog"], "--model", "debiformer_nano", "--checkpoint"]
    printed = command(*run, checkpoint)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout.splitlines()[1].endswith("%  dog")
    printed = command(*run, tmp_path)
    assert printed.returncode == 2
    assert printed.stderr.splitlines() == [
        f"tools.predict: error: checkpoint {tmp_path} is a folder; name a file in it"
    ]
