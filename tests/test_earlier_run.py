"""A run that an earlier version began, stopped in its second epoch, goes on and is evaluated as it would have been."""

import json
import shutil
from pathlib import Path

import pytest

import main
from tasks.options import parse_args

EARLIER = Path(__file__).parent / "earlier_run"
SMALL = ("embed_dims=16,16,32,32", "num_heads=1,1,1,1", "offset_groups=1,1,1,1", "mlp_ratios=1,1,1,1")
OPTIONS = [
    *("--data_set", "DIGITS", "--model", "debiformer_nano", "--input_size", "32", "--batch_size", "64"),
    *("--model_kwargs", *SMALL, "agent_mlp_ratios=1,1,1,1", "--num_workers", "0", "--device", "cpu"),
    *("--epochs", "3", "--warmup_epochs", "1", "--lr", "8e-3", "--aa", "none", "--no_repeated_aug"),
    *("--model_ema_decay", "0.9", "--no_model_ema_warmup"),
]
"""As the run was started, but for the average's warm-up, which came later."""


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_earlier_run_goes_on_to_the_same_figures(tmp_path):
    run = Path(shutil.copytree(EARLIER, tmp_path / "run"))
    main.run(parse_args([*OPTIONS, "--output_dir", str(run)]))
    for found, expected in zip(log_of(run / "log.txt"), log_of(EARLIER / "log_at_the_end.txt"), strict=True):
        for name in expected.keys() - {"seconds"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=0.3), name


def test_earlier_best_weights_evaluate_to_the_same_figures():
    metrics = main.run(parse_args([*OPTIONS, "--eval", "--resume", str(EARLIER / "best.pth")]))
    expected = log_of(EARLIER / "log.txt")[0]
    assert metrics["acc1"] == pytest.approx(expected["test_ema_acc1"], abs=0.3)
    assert metrics["loss"] == pytest.approx(expected["test_ema_loss"], rel=1e-4)
