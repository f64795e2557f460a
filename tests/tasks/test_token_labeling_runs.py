"""Token labelling from maps to figures, through `main.run`."""

import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support import command, complaint, run_until_stopped
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3

import main
from models.weights import load_checkpoint, load_weights, weights_of
from runtime.checkpoint import BEST, LAST
from tasks.token_labeling import generate
from tasks.token_labeling.model import add_auxiliary, token_grids
from tasks.token_labeling.task import TokenLabeling, class_targets, mix_tokens, token_box
from tasks.token_labeling.transform import crop_maps
from tools.loading import load_model
from utils import seeded

KWARGS = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
SIDE = ("--input_size", "64")


@pytest.fixture(scope="session")
def shared_maps(shared_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    torch.manual_seed(3)
    model = timm.create_model("debiformer_nano", num_classes=4, img_size=64, **KWARGS)
    torch.save(
        {"model": model.state_dict(), "args": {"model_kwargs": {n: list(v) for n, v in KWARGS.items()}}},
        folder / "t.pth",
    )
    argv = ["--data_path", str(shared_images), "--teacher", "debiformer_nano", "--teacher_path", str(folder / "t.pth")]
    options = generate.parse([*argv, "--output", str(folder), "--input_size", "96", "--device", "cpu"])
    options.num_workers = 0
    generate.generate(options, generate.DistInfo())
    return folder


@pytest.fixture
def token_options(small_options, shared_maps, tmp_path):
    def build(*argv, folder="run"):
        base = [
            "--task",
            "token_labeling",
            "--tl_maps",
            str(shared_maps),
            *SIDE,
            "--output_dir",
            str(tmp_path / folder),
        ]
        return small_options(*base, *argv)

    return build


def plain(num_classes=4):
    return timm.create_model("debiformer_nano", num_classes=num_classes, img_size=64, **KWARGS)


def test_run_resumes_midway_to_the_same_bits_and_saves_a_plain_model(token_options, monkeypatch, small_options):
    whole, stopped = token_options("--tl_stage3", folder="whole"), token_options("--tl_stage3")
    main.run(whole)
    run_until_stopped(stopped, 3, monkeypatch)
    stood = load_checkpoint(main.Path(stopped.output_dir) / LAST)
    assert (stood["epoch"], stood["position"]) == (0, 24)
    main.run(stopped)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST) for options in (whole, stopped))
    for part in ("model", "model_ema"):
        assert {name for name in one[part] if name.startswith("auxiliary.")} == {
            *("auxiliary.last.weight", "auxiliary.last.bias", "auxiliary.middle.weight", "auxiliary.middle.bias")
        }
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())

    best = main.Path(whole.output_dir) / BEST
    saved = load_checkpoint(best)
    plain().load_state_dict(saved["model"], strict=True)
    for path in (best, best.with_name(LAST)):
        load_weights(plain(), weights_of(load_checkpoint(path), path), path)
        assert not hasattr(load_model("debiformer_nano", str(path)).model, "auxiliary")
        here = main.run(token_options("--eval", "--resume", str(path)))
        there = main.run(small_options(*SIDE, "--eval", "--resume", str(path)))
        assert here == there
    assert main.run(small_options(*SIDE, "--eval", "--resume", str(best)))["acc1"] == saved["best"]["acc1"]
    blended = ["--eval", "--tl_eval_blend", "--tl_stage3", "--resume"]
    assert main.run(token_options(*blended, str(best.with_name(LAST))))["images"] == 20
    assert "lacks auxiliary.last.bias" in complaint(main.run, token_options(*blended, str(best)))


def test_run_trains_from_published_maps_in_half_precision(token_options, shared_images, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for path in sorted((shared_images / "train").glob("*/*.png")):
        numbers = torch.randint(0, 4, (5, 18, 18), generator=generator)
        target = tmp_path / "published" / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.randn(5, 18, 18, generator=generator), numbers]).half(), target)
    extra = ["--tl_maps", str(tmp_path / "published"), "--amp", "bf16", "--epochs", "1", "--tl_target", "blend"]
    figures = main.run(token_options(*extra, "--layer_decay", "0.8", "--tl_eval_blend"))
    assert 0 < figures["train_loss"] < 10


def test_fine_tuning_starts_from_a_plain_model(token_options, tmp_path):
    torch.manual_seed(5)
    model = plain(num_classes=9)
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    options = token_options("--finetune", str(tmp_path / "plain.pth"), "--lr", "0", "--min_lr", "0", "--epochs", "1")
    main.run(options)
    trained = load_checkpoint(main.Path(options.output_dir) / LAST)["model"]
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters() if "stages" in name)
    assert trained["head.bias"].shape == (4,)


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(shared_maps, shared_images, tmp_path):
    from support import SMALL_RUN

    def launch(processes, *argv):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "main.py"]
        run = [*SMALL_RUN, "--task", "token_labeling", "--tl_maps", shared_maps, "--data_path", shared_images, *SIDE]
        done = command(*torchrun, *run, "--dist_eval", "--batch_size", "4", "--no_model_ema", *argv, timeout=900)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("* ")]

    trained = launch(2, "--output_dir", tmp_path / "run", "--tl_stage3")
    alone = launch(1, "--eval", "--resume", tmp_path / "run" / LAST)
    assert trained[-1:] == alone


# -- stored features


@pytest.fixture(scope="session")
def feature_maps(shared_images, shared_maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    argv = ["--data_path", str(shared_images), "--teacher", "debiformer_nano", "--num_workers", "0", "--device", "cpu"]
    argv += ["--teacher_path", str(shared_maps / "t.pth"), "--input_size", "96", "--features", "24"]
    for name, more in (("both", []), ("features", ["--no_labels"])):
        generate.generate(generate.parse([*argv, *more, "--output", str(folder / name)]), generate.DistInfo())
    return folder


def test_run_learns_stored_features_and_resumes_to_the_same_bits(
    token_options, feature_maps, monkeypatch, small_options
):
    argv = ("--tl_maps", str(feature_maps / "both"), "--tl_feature_weight", "1", "--tl_stage3", "--aa", "rand-m9-n2")
    whole, stopped = token_options(*argv, folder="whole"), token_options(*argv)
    main.run(whole)
    run_until_stopped(stopped, 3, monkeypatch)
    main.run(stopped)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST)["model"] for options in (whole, stopped))
    assert one["auxiliary.features_last.weight"].shape == (64, 64)
    assert one["auxiliary.features_middle.weight"].shape == (64, 48)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    best = main.Path(whole.output_dir) / BEST
    plain().load_state_dict(load_checkpoint(best)["model"], strict=True)
    blended = ("--eval", "--tl_eval_blend", "--tl_stage3", "--resume", str(best.with_name(LAST)))
    assert main.run(token_options(*blended))["images"] == 20


def test_features_alone_teach_beside_labels(token_options, feature_maps):
    argv = ("--tl_maps", str(feature_maps / "features"), "--tl_feature_weight", "1", "--epochs", "1")
    alone = ("--tl_dense_weight", "0", "--tl_target", "label", "--tl_feature_loss", "smooth_l1", "--amp", "bf16")
    options = token_options(*argv, *alone)
    assert 0 < main.run(options)["train_loss"] < 10
    assert not any(".last." in name for name in load_checkpoint(main.Path(options.output_dir) / LAST)["model"])
    assert "holds features alone; pass --tl_dense_weight 0" in complaint(main.run, token_options(*argv, folder="other"))


def test_maps_without_features_are_refused_where_these_are_to_be_learnt(token_options):
    assert "holds no features" in complaint(main.run, token_options("--tl_feature_weight", "1"))


def test_feature_targets_are_what_the_image_shows_and_count_by_how_much_of_it(token_options, feature_maps):
    task = TokenLabeling(token_options("--tl_maps", str(feature_maps / "both"), "--tl_feature_weight", "1"))
    train, _ = task.sources()
    task.build_model()
    stored = torch.stack([train[number]["features"] for number in (0, 1)])
    batch = {
        **{"images": torch.zeros(2, 3, 64, 64), "targets": torch.tensor([0, 1]), "features": stored, "moved": [1]},
        **{"values": torch.zeros(2, 4, 3, 3), "indices": torch.zeros(2, 4, 3, 3), "flip": torch.tensor([True, False])},
        **{"box": torch.tensor([[0.1, 0.2, 0.9, 0.7]] * 2), "moves": torch.eye(2, 3).repeat(2, 1, 1, 1)},
    }
    batch["moves"][1, 0, 0, 2] = 0.5  # half of it is moved out of its frame
    task.opts.tl_mix = False
    (seen,) = task.preprocess(batch, train=True)["features"]
    assert torch.allclose(seen[0, -1], torch.ones(2, 2))
    assert torch.equal(seen[1, -1], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    alone = {"box": batch["box"][:1], "flip": batch["flip"][:1], "moved": []}
    whole = crop_maps(task.maps.basis.decode(stored)[:1], alone, (2, 2))
    assert torch.allclose(task.maps.basis.decode(seen[:1, :-1]), whole, atol=1e-4)
    answers = torch.randn(2, 2, 2, 64)
    wanted = task.maps.basis.decode(seen[:, :-1]).movedim(1, -1)
    distances = (1 - F.cosine_similarity(answers, wanted, dim=-1)) * seen[:, -1]
    logits = torch.randn(2, 4)
    parts = task.loss(
        {"logits": logits, "features": [answers]}, {"targets": torch.rand(2, 4), "features": [seen], "tokens": []}
    )
    assert torch.allclose(parts["loss_features"], distances.mean(), atol=1e-6)


# -- the model


@pytest.mark.parametrize("name", ["debiformer_nano", "resnet10t"])
def test_auxiliary_classifiers_leave_the_model_what_it_is(name):
    torch.manual_seed(0)
    kwargs = {**KWARGS, "img_size": 64} if name == "debiformer_nano" else {}
    model = timm.create_model(name, num_classes=4, **kwargs)
    images, keys = torch.randn(2, 3, 64, 64), list(model.state_dict())
    before = model.eval()(images)
    add_auxiliary(model, {"tokens": 4, "features": 6}, middle=True)
    assert torch.equal(model(images), before)
    assert [key for key in model.state_dict() if not key.startswith("auxiliary.")] == keys
    assert token_grids(model, 64) == [(2, 2), (4, 4)]
    copy = ModelEmaV3(model).module
    assert torch.equal(copy.eval()(images), before)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert all(scales[id(p)] == 1 for p in model.auxiliary.parameters())

    model.train()
    statistics = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    outputs = model(images)
    assert {int(m.num_batches_tracked) for m in statistics} == {1}
    assert [tuple(tokens.shape) for tokens in outputs["tokens"]] == [(2, 2, 2, 4), (2, 4, 4, 4)]
    assert [tuple(values.shape) for values in outputs["features"]] == [(2, 2, 2, 6), (2, 4, 4, 6)]
    answers = [*outputs["tokens"], *outputs["features"]]
    (outputs["logits"].sum() + sum(values.square().sum() for values in answers)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_model_without_maps_is_refused(token_options):
    options = token_options("--model", "vit_tiny_patch16_224", "--drop_path", "0")
    options.model_kwargs = {"depth": 1}
    assert "its last features are no map" in complaint(main.run, options)


# -- targets and mixing


def test_class_targets_trust_the_map_more_where_it_agrees():
    seen, labels = torch.tensor([[0.6, 0.2, 0.0], [0.6, 0.2, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 1, 2])
    taught = torch.tensor([[0.75, 0.25, 0], [0.75, 0.25, 0], [0, 0, 1.0]])
    truth = F.one_hot(labels, 3).float()
    assert torch.allclose(class_targets(seen, labels, "map", 0.0), taught)
    assert torch.equal(class_targets(seen, labels, "label", 0.0), truth)
    blend = class_targets(seen, labels, "blend", 0.0)
    assert torch.allclose(blend[0], 0.9 * taught[0] + 0.1 * truth[0])
    assert torch.allclose(blend[1], 0.5 * taught[1] + 0.5 * truth[1])
    assert torch.allclose(class_targets(seen, labels, "blend", 0.1).sum(1), torch.ones(3))


def test_mixed_tokens_come_from_where_their_pixels_do():
    batch = torch.arange(4.0).view(4, 1, 1, 1)
    images, targets = batch.expand(4, 3, 224, 224), torch.eye(4)
    mixed = set()
    for number in range(20):
        with seeded(number):
            seen, shares, tokens = mix_tokens(images, targets, [batch.expand(4, 5, 7, 7), batch.expand(4, 5, 14, 14)])
        for values, stride in zip(tokens, (32, 16), strict=True):
            assert torch.equal(seen[:, 0], values[:, 0].repeat_interleave(stride, 1).repeat_interleave(stride, 2))
        for image in range(4):
            share = (seen[image, 0] == image).float().mean()
            assert torch.allclose(shares[image], share * targets[image] + (1 - share) * targets[3 - image])
        mixed.add(round(float(share), 3))
    assert len(mixed) > 8


def test_mixing_targets_is_to_the_loss_what_undoing_the_mix_of_answers_is():
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(4, 7, 7, 5, generator=generator).log_softmax(-1)
    targets = torch.rand(4, 5, 7, 7, generator=generator)
    with seeded(1):
        _, _, (mixed,) = mix_tokens(torch.zeros(4, 3, 224, 224), torch.eye(4), [targets])
    with seeded(1):
        rows, columns = (slice(*span) for span in token_box((7, 7), 1 - np.random.beta(1.0, 1.0)))
    undone = answers.clone()
    undone[:, rows, columns] = answers.flip(0)[:, rows, columns]
    assert not torch.equal(mixed, targets)
    assert torch.allclose((mixed.movedim(1, -1) * answers).sum(), (targets.movedim(1, -1) * undone).sum())


def test_loss_is_the_weighted_sum_of_its_parts(token_options):
    task = TokenLabeling(token_options("--tl_cls_weight", "2", "--tl_dense_weight", "0.25"))
    logits, tokens = torch.randn(2, 4), [torch.randn(2, 2, 2, 4), torch.randn(2, 4, 4, 4)]
    batch = {"targets": torch.rand(2, 4), "tokens": [torch.rand(2, 4, 2, 2), torch.rand(2, 4, 4, 4)]}
    parts = task.loss({"logits": logits, "tokens": tokens}, batch)
    assert torch.allclose(parts["loss_class"], F.cross_entropy(logits, batch["targets"]))
    dense = [F.cross_entropy(t.movedim(-1, 1), target) for t, target in zip(tokens, batch["tokens"], strict=True)]
    assert torch.allclose(parts["loss_tokens"], sum(dense) / 2)
    assert torch.allclose(parts["loss"], 2 * parts["loss_class"] + 0.25 * parts["loss_tokens"])


# -- bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--tl_maps", ""), "needs --tl_maps"),
        (("--tl_cls_weight", "0", "--tl_dense_weight", "0"), "leave nothing to learn"),
        (("--finetune_eval_mode", "--finetune", "a.pth"), "--finetune_eval_mode goes with"),
        (("--input_size", "72"), "--input_size 72: tokens fill"),
    ],
)
def test_options_that_contradict_each_other(token_options, capsys, argv, words):
    with pytest.raises(SystemExit):
        token_options(*argv)
    assert words in capsys.readouterr().err


def test_run_with_maps_of_other_data_ends_before_it_begins(token_options, image_folder, tmp_path):
    shutil.copy(image_folder / "train/cat/0.png", image_folder / "train/cat/another.png")
    options = token_options("--data_path", str(image_folder))
    assert "no map of train/cat/another.png, the first of 1 of 49" in complaint(main.run, options)
    assert not (tmp_path / "run").exists()
