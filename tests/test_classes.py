"""What a class is called decides which number it has, not where its name sorts."""

import shutil

import pytest
import torch
from support import CLASSES, SMALL_RUN, build_data, complaint, write_images
from timm.data import ImageNetInfo

import main
from models.labels import class_names
from runtime.checkpoint import BEST, LAST
from runtime.distributed import DistInfo
from tasks.options import parse_args
from tools.loading import load_model
from tools.predict import predict

CPU = torch.device("cpu")
ALONE = DistInfo()


@pytest.fixture(scope="module")
def run_folder(shared_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    main.run(parse_args([*SMALL_RUN, "--data_path", str(shared_images), "--output_dir", str(folder), "--epochs", "1"]))
    return folder


def data_of(root, *argv, trained=()):
    options = parse_args([*SMALL_RUN, "--data_path", str(root), *map(str, argv)])
    return build_data(options, ALONE, CPU, trained=trained)


def reordered(run_folder, tmp_path):
    """The checkpoint of the same run, had its data named and numbered the classes the other way round."""
    content = torch.load(run_folder / LAST, weights_only=True)
    for state in (content["model"], content["model_ema"]):
        for name in ("head.weight", "head.bias"):
            state[name] = state[name].flip(0)
    content["classes"] = content["classes"][::-1]
    torch.save(content, tmp_path / "reordered.pth")
    return tmp_path / "reordered.pth"


def evaluate(root, checkpoint, *argv):
    run = [*SMALL_RUN, "--eval", "--data_path", root, "--resume", checkpoint, *argv]
    return main.run(parse_args(list(map(str, run))))


def test_evaluation_goes_by_the_names_of_the_checkpoint(run_folder, shared_images, tmp_path, capsys):
    expected = evaluate(shared_images, run_folder / BEST)
    assert evaluate(shared_images, flipped(run_folder, tmp_path)) == pytest.approx(expected)
    assert "note" not in capsys.readouterr().err


def flipped(run_folder, tmp_path):
    """The best checkpoint with its classes the other way round, and the names with them."""
    content = torch.load(run_folder / BEST, weights_only=True)
    for name in ("head.weight", "head.bias"):
        content["model"][name] = content["model"][name].flip(0)
    content["classes"] = content["classes"][::-1]
    torch.save(content, tmp_path / "flipped.pth")
    return tmp_path / "flipped.pth"


def test_evaluation_on_some_of_the_classes(run_folder, image_folder):
    whole = evaluate(image_folder, run_folder / BEST)
    shutil.copytree(image_folder / "val", image_folder / "others" / "val")
    for folder, names in ((image_folder, CLASSES[:2]), (image_folder / "others", CLASSES[2:])):
        for name in names:
            shutil.rmtree(folder / "val" / name)
    halves = [evaluate(folder, run_folder / BEST) for folder in (image_folder, image_folder / "others")]
    assert [half["images"] for half in halves] == [10, 10]
    for figure in ("acc1", "loss"):
        assert sum(half[figure] for half in halves) / 2 == pytest.approx(whole[figure])


def test_evaluation_on_other_classes_is_refused(run_folder, image_folder):
    (image_folder / "val" / "owl").rename(image_folder / "val" / "eel")
    message = complaint(evaluate, image_folder, run_folder / BEST)
    assert message == f"{image_folder}: eel is none of the classes that the weights know"


def test_weights_without_names_go_by_number_which_is_said(run_folder, image_folder, tmp_path, capsys):
    content = torch.load(run_folder / BEST, weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pth")
    assert evaluate(image_folder, tmp_path / "bare.pth") == evaluate(image_folder, run_folder / BEST)
    assert f"note: {tmp_path / 'bare.pth'} does not name its classes: they go by number" in capsys.readouterr().err
    shutil.rmtree(image_folder / "val" / "cat")
    message = complaint(evaluate, image_folder, tmp_path / "bare.pth", "--num_classes", 4)
    assert message.startswith("the weights do not name their 4 classes, so it is not known which of them the data's 3")
    (image_folder / "val" / "cat").mkdir()
    assert evaluate(image_folder, tmp_path / "bare.pth")["images"] == 15


def test_released_weights_know_imagenet_by_its_synsets(tmp_path):
    synsets = ImageNetInfo().label_names()
    for number in (7, 300):
        write_images(tmp_path / "val" / synsets[number], 1, 0, number)
    data = data_of(tmp_path, "--eval", "--num_classes", 1000)
    assert data.classes == synsets
    assert [int(target) for batch in data.val for target in batch["targets"]] == [7, 300]


def test_resuming_keeps_the_numbers_of_the_checkpoint(run_folder, shared_images, tmp_path):
    """As of tar files, whose classes were once sorted otherwise."""
    names = list(CLASSES[::-1])
    data = data_of(shared_images, "--no_repeated_aug", trained=names)
    assert data.classes == names
    targets = next(iter(data.val))["targets"]
    assert targets.tolist() == [3] * 5 + [2] * 5 + [1, 1]
    folder = tmp_path / "run"
    folder.mkdir()
    reordered(run_folder, folder).rename(folder / LAST)
    argv = [*SMALL_RUN, "--data_path", str(shared_images), "--output_dir", str(folder), "--epochs", "2"]
    main.run(parse_args(argv))
    assert torch.load(folder / LAST, weights_only=True)["classes"] == names


def test_fine_tuning_keeps_the_classifier_of_the_same_classes_alone(run_folder, image_folder, tmp_path, capsys):
    def tune(name):
        argv = ["--data_path", str(image_folder), "--finetune", str(run_folder / BEST), "--epochs", "1"]
        main.run(parse_args([*SMALL_RUN, *argv, "--output_dir", str(tmp_path / name)]))
        return capsys.readouterr().out

    assert "newly initialised" not in tune("same")
    for split in ("train", "val"):
        (image_folder / split / "owl").rename(image_folder / split / "ant")
    assert "newly initialised: head.weight, head.bias" in tune("other")


def test_validation_images_of_some_classes_are_numbered_as_in_training(image_folder):
    shutil.rmtree(image_folder / "val" / "cat")
    for path in (image_folder / "val" / "dog").iterdir():
        path.unlink()
    data = data_of(image_folder)
    assert (data.num_classes, data.classes) == (4, list(CLASSES))
    assert {int(target) for batch in data.val for target in batch["targets"]} == {2, 3}


def test_predictions_carry_the_checkpoints_names(run_folder, shared_images, tmp_path):
    paths = [str(shared_images / "val" / name / "0.png") for name in CLASSES]
    answers = []
    for checkpoint in (run_folder / BEST, flipped(run_folder, tmp_path)):
        found = predict(load_model("debiformer_nano", str(checkpoint)), paths)
        answers.append([[name for name, _ in ranked] for _, ranked in found])
    assert answers[0] == answers[1]


def test_stand_ins_are_no_names():
    assert class_names({"classes": ["class 0", "class 1"]}) == []
    assert class_names({"classes": ("a", "b")}) == ["a", "b"]
    assert class_names({}) == []
