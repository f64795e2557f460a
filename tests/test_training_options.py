"""What options do to a training run: rates, average, regularisation, fine-tuning; what is refused, what is told."""

import re
import shlex

import numpy as np
import pytest
import timm
import torch
from support import ROOT, SMALL_RUN, command, complaint
from torch import nn

import main
from engine import Precision, TrainStep
from models.weights import load_checkpoint
from optim_factory import build_ema, build_optimizer, build_scheduler, check_training, training_notes
from runtime.checkpoint import BEST, LAST
from runtime.distributed import DistInfo
from runtime.meters import LossMeter
from runtime.model import build_model
from tasks.classification.task import Classification
from tasks.options import Options, load_recipe, parse_args

CPU = torch.device("cpu")


def rates_of(options, total_batch):
    """The learning rate of each epoch."""
    optimizer = build_optimizer(nn.Linear(1, 1), options, total_batch)
    scheduler, rates = build_scheduler(optimizer, options), []
    for epoch in range(options.epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


# -- refused before any data is read


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "vgg12"], "unknown --model 'vgg12'; did you mean vgg1"),
        (["--opt", "adamx"], "unknown --opt 'adamx'; did you mean --opt adamax?"),
        (["--opt", "sgd", "--opt_betas", "0.9", "0.9"], "--opt_betas: sgd takes no betas, not 2"),
        (["--opt", "adan", "--opt_betas", "0.9", "0.9"], "--opt_betas: adan takes 3 betas, not 2"),
        (["--aa", "foo"], "--aa foo is not a policy of timm; try rand-m9"),
        (["--aa", "rand-m5.5"], "--aa rand-m5.5 is not a policy"),
        (["--distillation_type", "soft", "--teacher_model", "regnety_16"], "unknown --teacher_model 'regnety_16'"),
        (["--sched", "wsd", "--decay_epochs", "299"], "--sched wsd: .*decay_epochs"),
        (["--lr", "5e-5"], "--min_lr 1e-05 is above the rate 6.25e-06 that --lr 5e-05 means for 64 images per update"),
        (["--lr", "5e-6", "--min_lr", "0"], "--warmup_lr 1e-06 is above the rate 6.25e-07"),
    ],
)
def test_names_and_rates_are_refused_before_data_is_read(argv, words):
    options = parse_args(["--model", "debiformer_nano", "--data_path", "/nowhere", "--device", "cpu", *argv])
    assert re.match(words, complaint(main.run, options))


def test_policy_of_augmentation_that_is_wrong_ends_in_one_line(tmp_path):
    done = command("main.py", "--model", "debiformer_nano", "--data_path", tmp_path, "--device", "cpu", "--aa", "foo")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("main.py: error: --aa foo")


def test_rates_are_checked_for_the_batch_of_all_processes():
    options = Options(lr=5e-5, batch_size=64)
    assert "--min_lr" in complaint(check_training, options, 64)
    check_training(options, 8 * 64)


# -- rates


@pytest.mark.parametrize(
    ("recipe", "batch", "warmup", "lowest"), [("debiformer_small", 256, 20, 5e-6), ("biformer_small", 128, 5, 1e-5)]
)
def test_recipes_at_their_batch_have_the_published_schedule(recipe, batch, warmup, lowest):
    options = load_recipe(recipe)
    assert options.batch_size == batch
    assert options.recipe_batch == 8 * batch
    top = 5e-4 * 8 * batch / 512
    epochs = np.arange(300)
    published = np.where(
        epochs < warmup,
        1e-6 + epochs * (top - 1e-6) / warmup,
        lowest + (top - lowest) * (1 + np.cos(np.pi * epochs / 300)) / 2,
    )
    np.testing.assert_allclose(rates_of(options, 8 * batch), published, rtol=1e-9)


def test_multistep_decays_at_its_milestones():
    options = Options(sched="multistep", epochs=8, warmup_epochs=0, decay_milestones=[3, 6], lr=1.0)
    assert rates_of(options, 512) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_schedule_that_hardly_decays_is_told():
    options = Options(lr=1e-4, model_ema=False)
    (note,) = training_notes(options, 64, 1000)
    assert "only falls from 1.25e-05 (--lr 0.0001 for 64 images per update) to --min_lr 1e-05" in note
    assert training_notes(options, 512, 1000) == []


def test_position_tables_decay_where_the_published_code_lets_them():
    model = timm.create_model("debiformer_nano", num_classes=10)
    tables = {id(p) for name, p in model.named_parameters() if name.endswith("rpe_table")}
    for options, decay in (
        (Options(), 0.0),
        (Options(decay_position_tables=True), 0.05),
        (Options(decay_position_tables=True, layer_decay=0.9), 0.05),
        (load_recipe("debiformer_small"), 0.1),
    ):
        groups = build_optimizer(model, options, 512).param_groups
        assert {g["weight_decay"] for g in groups for p in g["params"] if id(p) in tables} == {decay}


def test_bound_of_0_clips_no_gradient(run_small, small_options):
    plain = run_small("--epochs", "1")
    options = small_options("--epochs", "1", "--clip_grad", "0")
    options.output_dir += "-0"
    main.run(options)
    one, two = (load_checkpoint(folder / LAST)["model"] for folder in (plain, main.Path(options.output_dir)))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- the average


def averaged(warmup, updates, decay):
    """The average's weights after each update, and the weights themselves; two updates an epoch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = build_ema(model, Options(model_ema_warmup=warmup, model_ema_decay=decay))
    task = Classification(Options(mixup=0, cutmix=0, reprob=0))
    flat = nn.Sequential(nn.Flatten(), model)
    ema.module = nn.Sequential(nn.Flatten(), ema.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stepper = TrainStep(task, flat, optimizer, Precision(CPU), DistInfo(), ema=ema, updates=2)
    averages, weights = [], [model.weight.detach().clone()]
    for update in range(updates):
        stepper.step(
            [{"images": torch.randn(4, 2, 1, 1), "targets": torch.tensor([0, 1, 0, 1])}],
            update // 2,
            update % 2,
            LossMeter(CPU, DistInfo()),
        )
        averages.append(ema.module[1].weight.clone())
        weights.append(model.weight.detach().clone())
    return averages, weights


@pytest.mark.parametrize("warmup", [True, False])
def test_average_warms_up_unless_it_shall_be_as_published(warmup):
    averages, weights = averaged(warmup, 12, decay=0.6)
    expected = weights[0]
    for count, (average, new) in enumerate(zip(averages, weights[1:], strict=True), start=1):
        decay = min(0.6, (count - 1) / (count - 1 + 5)) if warmup else 0.6
        expected = decay * expected + (1 - decay) * new
        torch.testing.assert_close(average, expected)


def test_what_is_averaged_is_told():
    said = lambda updates, **given: " ".join(training_notes(Options(**given), 512, updates))  # noqa: E731
    assert "averaging the weights over about 25000 of 375300 updates" in said(375_300)
    assert "averaging the weights over about 100 of 600 updates" in said(600)
    assert "98% of the averaged weights will still be the initial ones" in said(600, model_ema_warmup=False)
    assert "averaging the weights over about 25000 of" in said(375_300, model_ema_warmup=False)
    assert said(600, model_ema=False) == ""


def test_another_batch_than_the_recipes_is_told(run_small, capsys):
    options = load_recipe("debiformer_small")
    assert training_notes(options, 2048, 1000) == []
    (note,) = training_notes(options, 4096, 1000)
    assert note.startswith("4096 images per update")
    assert "meant for 2048" in note
    run_small("--epochs", "1", "--recipe_batch", "64", "--world_size", "4")
    printed = capsys.readouterr().err
    assert "note: 8 images per update" in printed
    assert "note: --world_size has no effect" in printed
    assert "note: averaging the weights" in printed


# -- the model


def drop_rates(model):
    return [module.drop_prob for module in model.modules() if "DropPath" in type(module).__name__]


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_drop_path_is_what_was_given_0_included(rate):
    with torch.device("meta"):
        assert max(drop_rates(timm.create_model("debiformer_small"))) == pytest.approx(0.3)
        assert max(drop_rates(build_model(Options(model="debiformer_small", drop_path=rate), 10))) == pytest.approx(
            rate
        )


def test_model_without_drop_path_is_refused_only_if_it_was_asked_for(capsys):
    with torch.device("meta"):
        assert isinstance(build_model(Options(model="vgg11"), 10), timm.models.VGG)
        assert "vgg11 has no stochastic depth: --drop_path 0.1 has no effect" in capsys.readouterr().err
        build_model(Options(model="vgg11", drop_path=0.0), 10)
        assert capsys.readouterr().err == ""
        message = complaint(build_model, Options(model="vgg11", drop_path=0.3), 10)
    assert message == "--drop_path 0.3: vgg11 has no stochastic depth; leave the option out"


@pytest.mark.parametrize(
    ("model", "close"), [("debiformer_nano", "n_win"), ("biformer_tiny", "n_win"), ("hrnet_w18", None)]
)
def test_unknown_argument_of_the_model_is_named_with_the_closest(model, close):
    message = complaint(build_model, Options(model=model, drop_path=0.0, model_kwargs={"nwin": 5}), 10)
    assert message.startswith(f"--model_kwargs: {model}: it takes no argument nwin; ")
    assert close is None or message.endswith(f"did you mean {close}?")


def test_teacher_that_cannot_be_downloaded_is_told_in_one_line(shared_images, tmp_path):
    run = ["main.py", *SMALL_RUN, "--data_path", shared_images, "--output_dir", tmp_path / "run"]
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = command(*run, "--distillation_type", "soft", "--num_classes", "1000", **unreachable)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--teacher_model regnety_160 cannot be had" in line
    assert line.endswith("pass --teacher_path")


# -- fine-tuning


def test_fine_tuning_in_evaluation_mode_keeps_the_statistics(run_small, small_options):
    weights = run_small("--epochs", "1") / BEST
    for switch, kept in (("--finetune_eval_mode", True), ("--no_finetune_eval_mode", False)):
        options = small_options("--finetune", str(weights), "--epochs", "1", switch)
        options.output_dir += switch
        main.run(options)
        before, after = (load_checkpoint(path)["model"] for path in (weights, main.Path(options.output_dir) / LAST))
        means = [name for name in before if name.endswith("running_mean")]
        assert means
        assert all(torch.equal(before[name], after[name]) for name in means) is kept


# -- documents


def documented_commands():
    """The training commands with a recipe in the documents: (recipe, processes, batch_size or None)."""
    for path in (
        ROOT / "README.md",
        ROOT / "INSTALL.md",
        ROOT / "hydra_main.py",
        *(ROOT / "configs" / "recipe").glob("*.yaml"),
    ):
        for line in path.read_text().replace("\\\n", " ").splitlines():
            words = (
                shlex.split(line.lstrip("# ").replace("`", " "), posix=False)
                if "recipe" in line and ".py" in line
                else []
            )
            given = dict(re.findall(r"(?:--|\+|slurm\.)?(\w[\w-]*)[= ]([^\s-]\S*)", " ".join(words)))
            if given.get("recipe", "") in {p.stem for p in (ROOT / "configs" / "recipe").glob("*.yaml")}:
                default = 8 if "hydra_main.py" in line else 1
                per_node = int(
                    given.get("nproc_per_node") or given.get("gpus-per-node") or given.get("ngpus") or default
                )
                yield path.name, given["recipe"], per_node * int(given.get("nodes", 1)), given.get("batch_size")


def test_documented_commands_keep_to_their_recipes_batch():
    commands = list(documented_commands())
    assert len(commands) >= 8
    assert {"README.md", "INSTALL.md"} <= {name for name, *_ in commands}
    for name, recipe, processes, batch in commands:
        options = load_recipe(recipe)
        assert processes * int(batch or options.batch_size) == options.recipe_batch, (name, recipe)
