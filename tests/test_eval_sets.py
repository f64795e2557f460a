"""ImageNet's other test sets, from small folders laid out as the published ones."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import timm
import torch
from support import CLASSES, SMALL_RUN, command, write_images
from timm.data import ImageNetInfo

import main
from runtime.checkpoint import BEST
from runtime.errors import UsageError
from tasks.classification.eval_sets import open_eval_set
from tasks.options import Options, parse_args

SYNSETS = ImageNetInfo().label_names()
SMALL_KWARGS = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}


def folders(root: Path, images: dict[str, int]) -> Path:
    """ROOT/NAME/* with so many images per name."""
    for seed, (name, count) in enumerate(images.items()):
        write_images(root / name, count, 0, seed)
    return root


def validation_images(folder: Path, numbers: Iterable[int]) -> None:
    write_images(folder / "made", len(list(numbers)), 0, 0)
    for file, number in zip(sorted((folder / "made").iterdir()), numbers, strict=True):
        file.rename(folder / f"ILSVRC2012_val_{number:08}.JPEG")
    (folder / "made").rmdir()


@pytest.fixture
def accuracy(tmp_path):
    """accuracy(eval_set, folder, [first, second, ...]): top-1 and top-5 of a model that always ranks classes so."""

    def evaluate(eval_set: str, folder: Path, ranking: list[int]) -> tuple[float, float, int]:
        model = timm.create_model("debiformer_nano", img_size=32, **SMALL_KWARGS)
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
        model.head.bias.data[ranking] = torch.arange(len(ranking), 0, -1.0)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        run = [
            *SMALL_RUN,
            "--eval",
            "--resume",
            tmp_path / "weights.pth",
            "--eval_set",
            eval_set,
            "--data_path",
            folder,
        ]
        metrics = main.run(parse_args(list(map(str, run))))
        return metrics["acc1"], metrics["acc5"], metrics["images"]

    return evaluate


def test_v2_numbers_its_folders_in_the_order_of_synsets(tmp_path, accuracy):
    folder = folders(tmp_path / "v2", {"0": 2, "2": 3, "10": 1, "999": 2})
    assert accuracy("v2", folder, [2, 10, 50, 51, 52, 999]) == (37.5, 50, 8)


def test_sketch_has_folders_of_synsets(tmp_path, accuracy, capsys):
    folder = folders(tmp_path / "sketch", {SYNSETS[7]: 1, SYNSETS[300]: 3})
    assert accuracy("sketch", folder, [300, 0, 1, 2, 3]) == (75, 75, 4)
    assert "ImageNet-Sketch: * Acc@1 75.000" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a", "r"])
def test_a_and_r_seek_the_answer_among_their_200_classes(tmp_path, accuracy, name):
    shared = str(folders(tmp_path / "one", {"n01498041": 1}))
    inside = open_eval_set(Options(eval_set=name, data_path=shared)).class_subset
    assert len(set(inside)) == 200
    outside = [number for number in range(1000) if number not in inside][:10]
    first, second = inside[:2]
    folder = folders(tmp_path / name, {SYNSETS[first]: 1, SYNSETS[second]: 3})
    assert accuracy(name, folder, [*outside, second, first]) == (75, 100, 4)
    assert accuracy("v2", folder, [*outside, second, first]) == (0, 0, 4)


def test_a_and_r_are_not_the_same_classes(tmp_path):
    shared = str(folders(tmp_path / "one", {"n01498041": 1}))
    a, r = (open_eval_set(Options(eval_set=name, data_path=shared)).class_subset for name in ("a", "r"))
    assert set(a) != set(r)


@pytest.mark.parametrize("place", ["val/n01440764", "val", "."])
def test_real_takes_any_of_its_labels_and_leaves_out_images_without(tmp_path, accuracy, place):
    """The first validation image has no label, the next two have two each."""
    validation_images(tmp_path / "in1k" / place, [1, 2, 3])
    images = open_eval_set(Options(eval_set="real", data_path=str(tmp_path / "in1k")))
    assert {Path(path).name[-7:]: labels for path, labels in zip(images.paths, images.labels, strict=True)} == {
        "02.JPEG": [970, 795],
        "03.JPEG": [230, 231],
    }
    assert accuracy("real", tmp_path / "in1k", [795, 100, 231]) == (50, 100, 2)
    assert accuracy("real", tmp_path / "in1k", [970, 0, 1, 2, 3, 230]) == (50, 50, 2)


def test_split_evaluation_gives_the_same_line(tmp_path, accuracy):
    validation_images(tmp_path / "val", range(1, 9))
    assert accuracy("real", tmp_path, [970, 516, 230]) == (pytest.approx(100 / 7), pytest.approx(300 / 7), 7)
    run = [*SMALL_RUN, "--eval", "--resume", tmp_path / "weights.pth", "--eval_set", "real", "--data_path", tmp_path]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py"]
    printed = command(*launch, *run, "--dist_eval")
    assert printed.returncode == 0, printed.stderr
    assert "ImageNet-ReaL: * Acc@1 14.286 Acc@5 42.857" in printed.stdout
    assert "on the 7 test images" in printed.stdout


@pytest.mark.parametrize(
    ("eval_set", "images", "words"),
    [
        ("v2", {}, "is not ImageNet-V2: it has no class folders"),
        ("v2", {"1000": 1}, "1000 is no class of it"),
        ("sketch", {"cat": 1}, "cat is no class of it"),
        ("sketch", {"train": 1, "val": 1}, "train is no class of it"),
        ("a", {SYNSETS[0]: 1}, f"{SYNSETS[0]} is no class of it"),
        ("r", {SYNSETS[0]: 1}, f"{SYNSETS[0]} is no class of it"),
        ("r", {SYNSETS[1]: 0}, "hold no images"),
        ("real", {SYNSETS[0]: 1}, "holds no image named ILSVRC2012_val_"),
    ],
)
def test_other_folders_are_refused(tmp_path, eval_set, images, words):
    with pytest.raises(UsageError, match=words) as error:
        open_eval_set(Options(eval_set=eval_set, data_path=str(folders(tmp_path, images))))
    assert "\n" not in str(error.value)


def test_validation_images_that_do_not_exist_or_have_no_label(tmp_path):
    options = Options(eval_set="real", data_path=str(tmp_path))
    validation_images(tmp_path, [1])
    with pytest.raises(UsageError, match="none of its images has a label"):
        open_eval_set(options)
    validation_images(tmp_path, [2, 50_001])
    with pytest.raises(UsageError, match=r"ILSVRC2012_val_00050001\.JPEG is none of ImageNet's"):
        open_eval_set(options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_path": ""}, "needs its folder"),
        ({"data_path": "/nowhere"}, "'/nowhere' is none"),
        ({"data_path": "/tmp", "num_classes": 10}, "leave out --num_classes"),
    ],
)
def test_missing_folders_and_other_class_counts(options, words):
    with pytest.raises(UsageError, match=words):
        open_eval_set(Options(eval_set="v2", **options))


# -- other resolutions


@pytest.mark.parametrize("argv", [["--input_size", "64"], ["--input_size", "48", "--crop_pct", "1.0"]])
def test_model_is_tested_at_another_resolution_than_it_was_trained_at(run_small, small_options, argv):
    """The position tables are resampled, as in fine-tuning."""
    folder = run_small("--epochs", "1")
    trained = main.run(small_options("--eval", "--resume", str(folder / BEST)))
    other = main.run(small_options("--eval", "--resume", str(folder / BEST), *argv))
    assert other["images"] == trained["images"] == 5 * len(CLASSES)
    assert other["loss"] != trained["loss"]
    assert other["loss"] == pytest.approx(trained["loss"], rel=0.5)
