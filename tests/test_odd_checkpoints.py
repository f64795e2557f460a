"""Checkpoints that can be read, but that no run has written: refused in one line, with the run left as it was."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_state import RECORD, state_of, train
from support import complaint

from models.weights import WeightsError
from runtime.checkpoint import TrainingState, build_checkpoint
from runtime.errors import UsageError


@pytest.fixture(scope="module")
def sound():
    """A checkpoint after an epoch and two updates."""
    state = state_of()
    train(state, 0, 2)
    state.epoch, state.position, state.best = 1, 16, {"acc1": 50.0, "epoch": 0, "weights": "model"}
    state.meter.add(torch.tensor(1.5), update=1)
    state.meter.gather()
    state.history.epochs.append(dict(RECORD))
    state.history.points.append(("loss", 0.5, 3))
    return build_checkpoint(state)


def fresh() -> TrainingState:
    return state_of()


def put(checkpoint: dict, path: tuple, value: object) -> dict:
    """A copy with the value at the end of a path of keys; `...` removes what is there."""
    copied = copy.deepcopy(checkpoint)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


ODD = {
    "epoch is a word": (("epoch",), "3"),
    "epoch below zero": (("epoch",), -1),
    "epoch is a truth value": (("epoch",), True),
    "position is a fraction": (("position",), 8.0),
    "position beyond the epoch": (("position",), 4800),
    "position between updates": (("position",), 13),
    "evaluated is a number": (("evaluated",), 7),
    "args is missing": (("args",), ...),
    "args is nothing": (("args",), None),
    "args is a list": (("args",), ["model"]),
    "best is nothing": (("best",), None),
    "best in no epoch": (("best", "epoch"), "last"),
    "best without weights": (("best", "weights"), ...),
    "meter without sums": (("meter",), {}),
    "meter of one number each": (("meter", "sums"), [[1.0]]),
    "meter of words": (("meter", "sums"), [["a", "b"]]),
    "history without points": (("history", "points"), ...),
    "history of numbers": (("history", "epochs"), [1, 2]),
    "history without seconds": (("history", "epochs", 0, "seconds"), ...),
    "history with a short point": (("history", "points"), [("loss", 0.5)]),
    "data is a number": (("data",), 3),
    "classes is a word": (("classes",), "cat"),
    "scaler is a list": (("scaler",), []),
    "scaler without growth": (("scaler",), {"scale": 2.0}),
    "model_ema is a list": (("model_ema",), []),
    "optimizer is empty": (("optimizer",), {}),
    "optimizer without memory": (("optimizer", "state"), {}),
    "optimizer's memory is a list": (("optimizer", "state"), []),
    "memory of another shape": (("optimizer", "state", 0, "exp_avg"), torch.zeros(1)),
    "memory is a number": (("optimizer", "state", 0, "exp_avg"), 3.0),
    "memory without a part": (("optimizer", "state", 0, "exp_avg_sq"), ...),
    "memory of no parameter": (("optimizer", "state", 10_000), {}),
    "groups are nothing": (("optimizer", "param_groups"), None),
    "groups are numbers": (("optimizer", "param_groups"), [1, 2]),
    "groups without parameters": (("optimizer", "param_groups", 0, "params"), ...),
}


@pytest.mark.parametrize("name", ODD)
def test_restore_refuses_an_odd_checkpoint_in_one_line(sound, tmp_path, name):
    path, value = ODD[name]
    state = fresh()
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    assert str(tmp_path) in complaint(state.restore, put(sound, path, value), tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in state.model.state_dict().items())


def test_restore_takes_the_sound_one(sound, tmp_path):
    state = fresh()
    state.restore(sound, tmp_path)
    assert (state.epoch, state.position, state.evaluated) == (1, 16, True)


def paths_in(value: object, depth: int = 4) -> list[tuple]:
    """All paths of keys into a checkpoint, down to a depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [(key, path) for key, each in items for path in ([()] + (paths_in(each, depth - 1) if depth else []))]
    return [(key, *path) for key, path in inner]


ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(...)),
    *(st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)),
    st.sampled_from([torch.zeros(1), torch.zeros(0), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(torch.nan)]),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_restore_of_any_change_works_or_is_one_line(sound, tmp_path, data):
    """What is taken trains on, evaluates and is written into the log without an error of its own."""
    path = data.draw(st.sampled_from(paths_in(sound)))
    state = fresh()
    try:
        state.restore(put(sound, path, data.draw(ANYTHING)), tmp_path)
    except (UsageError, WeightsError):  # whose messages are one line
        return
    train(state, 2, 4)
    state.meter.average()
    state.history.draw_curves()
    sum(record["seconds"] for record in state.history.epochs)
    build_checkpoint(state)
