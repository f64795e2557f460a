"""Teachers of features, tokens and logits: what they are shown, what they say, and what a student makes of it."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from support import CLASSES, SMALL_RUN, complaint, run_until_stopped
from torch import nn

import main
from models.pixels import Pixels, normalize, pixels_of
from models.weights import load_checkpoint
from runtime.checkpoint import BEST, LAST
from tasks.classification.distillation import DenseTeacher, add_answers, feature_distance, resized
from tasks.classification.losses import DenseLoss, DistillationLoss, token_distance
from tasks.classification.options import lessons_of
from tasks.classification.teacher import Candidate, build_teacher
from tasks.options import parse_args

KWARGS = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
ALL = {"logits", "tokens", "features"}
CPU = torch.device("cpu")


def saved(path, name, side, classes=CLASSES, **kwargs):
    """A checkpoint as a run leaves it."""
    torch.manual_seed(0)
    sized = {} if name.startswith("resnet") else {"img_size": side}
    model = timm.create_model(name, num_classes=len(classes), **sized, **kwargs)
    args = {"model": name, "input_size": side, "model_kwargs": kwargs}
    torch.save({"model": model.state_dict(), "args": args, "classes": list(classes)}, path)
    return path


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "resnet10t": saved(folder / "conv.pth", "resnet10t", 64),
        "vit_tiny_patch16_224": saved(folder / "vit.pth", "vit_tiny_patch16_224", 64, depth=1),
    }


@pytest.fixture
def taught(small_options, teachers, tmp_path):
    def build(*argv, teacher="resnet10t", folder="run"):
        named = ["--teacher_model", teacher, "--teacher_path", str(teachers[teacher])]
        return small_options(*named, "--output_dir", str(tmp_path / folder), *argv)

    return build


def teacher_of(options, classes=CLASSES):
    return build_teacher(options, 4, Pixels(), CPU, classes)


def test_run_resumes_midway_to_the_same_bits_and_saves_a_plain_model(taught, small_options, monkeypatch):
    lessons = ("--distill", "features,tokens+logits")
    whole, stopped = taught(*lessons, folder="whole"), taught(*lessons)
    main.run(whole)
    run_until_stopped(stopped, 3, monkeypatch)
    main.run(stopped)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST) for options in (whole, stopped))
    for part in ("model", "model_ema"):
        assert {name for name in one[part] if name.startswith("auxiliary.")} == {
            f"auxiliary.{lesson}.{stride}.{kind}"
            for lesson in ("features", "tokens")
            for stride in (16, 32)
            for kind in ("weight", "bias")
        }
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    best = main.Path(whole.output_dir) / BEST
    content = load_checkpoint(best)
    plain = timm.create_model("debiformer_nano", num_classes=4, img_size=32, **KWARGS)
    plain.load_state_dict(content["model"], strict=True)
    assert main.run(small_options("--eval", "--resume", str(best)))["acc1"] == content["best"]["acc1"]
    assert main.run(taught(*lessons, "--eval", "--resume", str(best)))["acc1"] == content["best"]["acc1"]


@pytest.mark.parametrize("extra", [("--amp", "bf16"), ("--distill_feature_loss", "smooth_l1", "--mixup", "0")])
def test_vision_transformer_teaches_its_tokens_as_maps(taught, extra):
    options = taught("--distill", "features", "--epochs", "1", *extra, teacher="vit_tiny_patch16_224")
    assert 0 < main.run(options)["train_loss"] < 10


def test_student_starts_from_the_weights_that_it_would_have_without_a_teacher(taught, small_options):
    frozen = ("--lr", "0", "--min_lr", "0", "--warmup_lr", "0", "--epochs", "1")
    runs = taught("--distill", "features", *frozen), small_options(*frozen, "--output_dir", taught().output_dir + "2")
    for options in runs:
        main.run(options)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST)["model"] for options in runs)
    assert all(torch.equal(one[name], value) for name, value in two.items())


def test_fine_tuning_starts_from_a_plain_model(taught, tmp_path, capsys):
    torch.manual_seed(5)
    model = timm.create_model("debiformer_nano", num_classes=9, img_size=32, **KWARGS)
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    main.run(taught("--distill", "tokens", "--finetune", str(tmp_path / "plain.pth"), "--epochs", "1"))
    assert "newly initialised: head.weight, head.bias, auxiliary" in capsys.readouterr().out


# -- what a teacher is shown, and says


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_teacher_sees_the_same_crop_at_its_own_size_and_statistics(taught, teachers, name):
    options = taught("--distill", "logits,features", teacher=name)
    teacher = teacher_of(options)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    said = teacher(normalize(images, Pixels()))
    content = load_checkpoint(teachers[name])
    arguments = {"depth": 1, "img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=4, **arguments).eval()
    model.load_state_dict(content["model"])
    large = F.interpolate(images / 255, (64, 64), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels_of(name).mean, pixels_of(name).std))
    with torch.no_grad():
        features = model.forward_features((large - mean) / std)
        logits = model.forward_head(features)
    last = features[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) if "vit" in name else features
    torch.testing.assert_close(said["logits"], logits)
    torch.testing.assert_close(said["features"][32], last)
    assert said["features"][16].shape == ((2, 192, 4, 4) if "vit" in name else (2, 256, 4, 4))


def test_teacher_can_be_shown_another_size(taught):
    for name, sides in (("resnet10t", (6, 3)), ("vit_tiny_patch16_224", (6, 6))):
        teacher = teacher_of(taught("--distill", "features", "--teacher_input_size", "96", teacher=name))
        maps = teacher(torch.zeros(1, 3, 32, 32))["features"].values()
        assert tuple(values.shape[2] for values in maps) == sides


def test_only_what_is_taught_is_asked_of_a_teacher(taught, tmp_path):
    other = saved(tmp_path / "other.pth", "resnet10t", 64, classes=("a", "b"))
    options = taught("--distill", "features", "--teacher_path", str(other))
    assert set(teacher_of(options)(torch.zeros(1, 3, 32, 32))) == {"features"}
    headless = timm.create_model("resnet10t", num_classes=0)
    torch.save(headless.state_dict(), tmp_path / "headless.pth")
    assert Candidate("resnet10t", str(tmp_path / "headless.pth")).build(None, 64).num_classes == 0


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_dinov2_at_the_size_of_its_recipe_has_places_for_its_teaching(name):
    model = timm.create_model(name, depth=1, num_classes=0)
    model.set_input_size(img_size=224)
    teacher = DenseTeacher(model, Pixels(), CPU, 224, {"features"})
    maps = teacher(torch.zeros(1, 3, 224, 224))["features"]
    assert [tuple(values.shape) for values in maps.values()] == [(1, 384, 16, 16)] * 2


def test_dinov3_at_its_own_size_has_places_for_its_teaching():
    model = timm.create_model("vit_small_patch16_dinov3.lvd1689m", depth=1)
    teacher = DenseTeacher(model, Pixels(), CPU, 256, {"features"})
    maps = teacher(torch.zeros(1, 3, 224, 224))["features"]
    assert [tuple(values.shape) for values in maps.values()] == [(1, 384, 16, 16)] * 2


# -- losses


def slow_weights(size, places):
    """The share (places, size) of each cell of a row in each place of another row: a triangle as wide as two places."""
    scale = max(size / places, 1)
    rows = []
    for place in range(places):
        center = (place + 0.5) * size / places
        row = [max(0.0, 1 - abs(cell + 0.5 - center) / scale) for cell in range(size)]
        rows.append([share / sum(row) for share in row])
    return torch.tensor(rows, dtype=torch.float64)


def slow_resized(maps, rows, columns):
    maps = maps.double()
    return torch.einsum(
        "bchw,yh,xw->bcyx", maps, slow_weights(maps.shape[2], rows), slow_weights(maps.shape[3], columns)
    )


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 5), (16, 12)])
def test_targets_agree_with_a_slow_computation_border_included(grid):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 16, 12, generator=generator)
    answers = torch.randn(2, *grid, 6, generator=generator)
    wanted = slow_resized(maps, *grid)
    assert (resized(maps, grid) - wanted).abs().max() < 1e-6
    cosines, distances, entropies = [], [], []
    probabilities = maps.softmax(1)
    shares = slow_resized(probabilities, *grid)
    for image in range(2):
        for y in range(grid[0]):
            for x in range(grid[1]):
                here, there = answers[image, y, x].double(), wanted[image, :, y, x]
                cosines.append(1 - (here @ there) / here.norm() / there.norm())
                scaled = (there - there.mean()) / (there.var(correction=0) + 1e-5).sqrt()
                gap = (here - scaled).abs()
                distances.append(torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
                logs = here - math.log(sum(math.exp(value) for value in here.tolist()))
                entropies.append(-(shares[image, :, y, x] * logs).sum())
    for found, slow in (
        (feature_distance(answers, maps, "cosine"), cosines),
        (feature_distance(answers, maps, "smooth_l1"), distances),
        (token_distance(answers, probabilities), entropies),
    ):
        assert abs(found - torch.stack(slow).mean()) < 1e-6


def test_tokens_are_what_the_classifier_makes_of_each_place(taught):
    teacher = teacher_of(taught("--distill", "tokens"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = teacher.teacher.model
    with torch.no_grad():
        features = model.forward_features(images)
        expected = F.linear(features.movedim(1, -1), model.fc.weight, model.fc.bias).softmax(-1)
    torch.testing.assert_close(teacher(images)["tokens"].movedim(1, -1), expected)


def test_loss_is_the_weighted_sum_of_its_parts(taught):
    teacher = teacher_of(taught("--distill", "logits,tokens,features"))
    student = add_answers(timm.create_model("debiformer_nano", num_classes=4, img_size=64, **KWARGS), teacher, 4)
    image = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", alpha=0.25, tau=2.0)
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    outputs = student.train()(images)
    parts = DenseLoss(image, 0.5, "cosine")(images, outputs, targets)
    said = teacher(images)
    features = [feature_distance(outputs["features"][s], said["features"][s], "cosine") for s in (16, 32)]
    tokens = [token_distance(outputs["tokens"][s], said["tokens"]) for s in (16, 32)]
    assert torch.allclose(parts["loss_features"], sum(features) / 2)
    assert torch.allclose(parts["loss_tokens"], sum(tokens) / 2)
    assert torch.allclose(parts["loss_class"], image.mixed(outputs["logits"], targets, said["logits"]))
    assert torch.allclose(parts["loss"], parts["loss_class"] + 0.5 * (sum(features) / 2 + sum(tokens) / 2))
    parts["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("name", "strides"), [("resnet10t", [16, 32]), ("vit_tiny_patch16_224", [16])])
def test_any_student_with_a_map_answers_and_stays_what_it_is(taught, name, strides):
    teacher = teacher_of(taught("--distill", "features,tokens"))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"depth": 1, "img_size": 64} if "vit" in name else {}))
    images, keys = torch.randn(2, 3, 64, 64), list(model.state_dict())
    before = model.eval()(images)
    add_answers(model, teacher, 4)
    assert torch.equal(model(images), before)
    assert [key for key in model.state_dict() if not key.startswith("auxiliary.")] == keys
    outputs = model.train()(images)
    assert list(outputs["features"]) == list(outputs["tokens"]) == strides
    assert outputs["features"][16].shape == (2, 4, 4, 256)


# -- bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--distill", "feature"), "'feature' is none of logits, tokens, features"),
        (("--distill", "features", "--finetune_eval_mode", "--finetune", "a.pth"), "goes with --distill logits alone"),
        (("--distill_feature_loss", "l2"), "--distill_feature_loss"),
    ],
)
def test_options_that_contradict_each_other(capsys, argv, words):
    with pytest.raises(SystemExit):
        parse_args([*SMALL_RUN, "--data_path", "x", *argv])
    assert words in capsys.readouterr().err


def test_lessons_may_be_named_in_two_ways():
    def lessons(*argv):
        return lessons_of(parse_args([*SMALL_RUN, "--data_path", "x", *argv]))

    assert lessons() == set()
    assert lessons("--distillation_type", "hard", "--distill", "tokens") == {"logits", "tokens"}
    assert lessons("--distill", "logits+tokens,features") == ALL


def test_teachers_that_cannot_teach_are_refused_in_one_line(taught, tmp_path):
    turned = saved(tmp_path / "turned.pth", "resnet10t", 64, classes=CLASSES[::-1])
    for lesson in ("logits", "tokens"):
        options = taught("--distill", lesson, "--teacher_path", str(turned))
        assert "other classes than the data's, or in another order" in complaint(main.run, options)
    few = saved(tmp_path / "few.pth", "resnet10t", 64, classes=("a", "b"))
    assert "other classes" in complaint(main.run, taught("--distill", "tokens", "--teacher_path", str(few)))
    vit = taught("--distill", "tokens", teacher="vit_tiny_patch16_224")
    assert "its last features are no map of places" in complaint(main.run, vit)
    vit = taught("--distill", "features", "--teacher_input_size", "70", teacher="vit_tiny_patch16_224")
    assert "--teacher_input_size 70 is no multiple of the 16 pixels of vit_tiny_patch16_224's places" in complaint(
        main.run, vit
    )
    assert not (tmp_path / "run").exists()


def test_student_without_maps_is_refused(taught):
    options = taught("--distill", "features", "--model", "vit_tiny_patch16_224", "--drop_path", "0")
    options.model_kwargs = {"depth": 1, "patch_size": 8}
    assert "shows no map at stride 16 or 32" in complaint(main.run, options)
