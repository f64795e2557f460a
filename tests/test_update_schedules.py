"""Rates that change with every update, and trainings counted in updates."""

import pytest
import torch

from optim_factory import build_optimizer, build_scheduler, check_training, scaled_rate
from runtime.distributed import DistInfo
from runtime.options import RECIPES
from runtime.samplers import TrainSampler
from tasks.options import parse_args

DETECTION = ["--epochs", "12", "--sched", "multistep", "--decay_milestones", "9", "12", "--warmup_updates", "500"]
POLY = ["--iterations", "160000", "--eval_every", "16000", "--sched", "poly"]
CASES = {
    # What mmengine's schedulers give, as the published configurations set them.
    "detection": (
        [*DETECTION, "--lr", "0.02", "--warmup_lr", "2e-5"],
        2000,
        {
            0: 2e-05,
            1: 6.004008016032065e-05,
            100: 0.0040240080160320645,
            498: 0.01995995991983963,
            499: 0.02,
            15999: 0.02,
            16000: 0.002,
            21999: 0.002,
            22000: 0.0002,
        },
    ),
    "upernet": (
        [*POLY, "--decay_rate", "1", "--lr", "6e-5", "--min_lr", "0", "--warmup_updates", "1500", "--warmup_lr=6e-11"],
        16000,
        {
            0: 6e-11,
            1: 4.008664442961975e-08,
            1498: 5.995997335557046e-05,
            1500: 6e-05,
            1501: 5.999962144871585e-05,
            20000: 5.2996801241648833e-05,
            79999: 3.028410273882096e-05,
        },
    ),
    "semantic_fpn": (
        [*POLY, "--iterations", "80000", "--decay_rate", "0.9", "--lr", "1e-4", "--min_lr", "0"],
        16000,
        {1: 9.999887498523418e-05, 40000: 5.358807024632918e-05, 79998: 3.8656621726139826e-09, 79999: 0.0},
    ),
}


@pytest.mark.parametrize(("argv", "updates", "expected"), CASES.values(), ids=CASES)
def test_update_schedules_give_the_published_rates(argv, updates, expected):
    options = parse_args(["--model", "debiformer_nano", "--warmup_epochs", "0", "--opt", "sgd", *argv])
    optimizer = build_optimizer(torch.nn.Linear(2, 2), options, 512)
    scheduler = build_scheduler(optimizer, options, options.epochs * updates)
    for number, rate in expected.items():
        scheduler.step(number // updates)
        scheduler.step_update(number)
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(rate, rel=1e-9, abs=1e-18), number


def test_endless_stream_is_one_permutation_after_another_wherever_it_is_entered():
    def keys(epoch, start=0, info=DistInfo()):  # noqa: B008
        sampler = TrainSampler(10, 4, 0, 1, info, updates=3)
        sampler.set_position(epoch, start)
        return list(sampler)

    stream = [key for epoch in range(5) for key in keys(epoch)]
    turns = [[key.index for key in stream[number : number + 10]] for number in range(0, 60, 10)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert turns[0] != turns[1]
    assert len({(key.epoch, key.position) for key in stream}) == 60
    assert keys(3, 8) == keys(3)[8:]
    shares = [keys(2, info=DistInfo(rank, 2)) for rank in range(2)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == keys(2)
    assert len(list(TrainSampler(3, 8, 0, 1, DistInfo(), updates=2))) == 16  # fewer images than a batch takes


def test_contradictions_of_updates_are_refused(capsys):
    for argv, words in {
        ("--iterations", "10"): "needs --eval_every",
        ("--iterations", "10", "--eval_every", "4"): "needs --eval_every",
        ("--iterations", "10", "--eval_every", "5"): "set --warmup_epochs 0",
        ("--iterations", "10", "--eval_every", "5", "--warmup_epochs", "0", "--sched", "step"): "goes with --sched",
        ("--iterations=10", "--eval_every=5", "--warmup_epochs=0", "--warmup_updates=10"): "leaves nothing",
    }.items():
        with pytest.raises(SystemExit):
            parse_args(["--model", "debiformer_nano", *argv])
        assert words in capsys.readouterr().err


def test_dense_recipes_are_valid_and_named_after_what_they_train():
    recipes = sorted(path.stem for path in RECIPES.glob("*_*_*_*.yaml") if path.stem.endswith(("ade20k", "coco")))
    assert len(recipes) == 12
    for name in recipes:
        options = parse_args(["--recipe", name, "--data_path", "somewhere"])
        assert name.startswith(f"{options.model}_{options.head}")
        assert options.batch_size * 8 == options.recipe_batch
        rate = scaled_rate(options, options.recipe_batch)
        assert rate == pytest.approx(6e-5 if options.head == "upernet" else 1e-4)
        check_training(options, options.recipe_batch)
