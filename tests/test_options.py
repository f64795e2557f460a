"""The options: one declaration, many readers."""

import dataclasses
import shlex
from typing import get_type_hints

import pytest
from support import ROOT, command, complaint

from runtime.options import (
    NAMES_ELSEWHERE,
    RECIPES,
    InertOptions,
    SlurmOptions,
    check_ranges,
    inert_notes,
    names_of,
)
from tasks.options import Options, groups_of, load_recipe, markdown_table, parse_args, validate

GROUPS = groups_of("classification")
PUBLISHED = [
    "--data_path ./data/in1k --input_size 224 --batch_size 128 --dist_eval --model biformer_small " + end
    for end in ("--eval --load_release", "--drop_path 0.15 --lr 5e-4")
]


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(list(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("line", PUBLISHED)
@pytest.mark.parametrize("rank", ["--local-rank=3", "--local_rank=3"])
def test_published_commands_parse(line, rank):
    options = parse_args([rank, *shlex.split(line)])
    assert (options.model, options.batch_size, options.dist_eval) == ("biformer_small", 128, True)


def test_both_spellings_mean_the_same():
    dashes = parse_args(["--model", "x", "--batch-size", "8", "--no-model-ema", "--opt-betas", "0.9", "0.95"])
    underscores = parse_args(["--model", "x", "--batch_size=8", "--no_model_ema", "--opt_betas", "0.9,0.95"])
    assert dashes == underscores
    assert (dashes.batch_size, dashes.model_ema, dashes.opt_betas) == (8, False, [0.9, 0.95])


def test_switches_take_a_value_too():
    assert parse_args(["--model", "x", "--eval=true"]).eval
    assert not parse_args(["--model", "x", "--repeated-aug", "false"]).repeated_aug


def test_null_switches_a_number_off():
    assert parse_args(["--model", "x", "--clip_grad", "5"]).clip_grad == 5.0
    assert parse_args(["--recipe", "debiformer_tiny", "--clip_grad", "none"]).clip_grad is None


def test_model_kwargs_become_numbers_lists_and_words():
    options = parse_args(["--model", "x", "--model_kwargs", "depths=2,2,9,3", "n_win=8", "auto_pad=false", "name=a"])
    assert options.model_kwargs == {"depths": [2, 2, 9, 3], "n_win": 8, "auto_pad": False, "name": "a"}
    options = parse_args(["--model", "x", "--model_kwargs", "depths=[2, 2, 9, 3]", "bra_topk=1,4,16,null"])
    assert options.model_kwargs == {"depths": [2, 2, 9, 3], "bra_topk": [1, 4, 16, None]}


def test_nothing_given_trains_the_small_model_on_digits_and_says_so(capsys):
    options = parse_args(["--epochs", "3"])
    assert (options.model, options.data_set, options.epochs) == ("debiformer_nano", "DIGITS", 3)
    assert "debiformer_nano_digits" in capsys.readouterr().out


def test_command_line_beats_recipe_beats_default():
    options = parse_args(["--recipe", "debiformer_small", "--warmup_epochs", "7"])
    assert (options.warmup_epochs, options.weight_decay, options.lr) == (7, 0.1, 5e-4)


def test_recipe_can_be_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: biformer_tiny\nlr: 3e-4\n")
    assert parse_args(["--recipe", str(tmp_path / "mine.yaml")]).lr == 3e-4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path):
    validate(load_recipe(path.stem))
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0] == "# @package _global_"
    assert any("main.py" in line for line in head)
    assert any(figure in line for line in head for figure in ("top-1", "mIoU", "AP"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "8"], ["--batchsize", "did you mean --batch_size"]),
        (["--workers", "8"], ["--workers", "did you mean --num_workers"]),
        (["--nb-classes", "8"], ["--nb_classes", "did you mean --num_classes"]),
        (["--model", "x", "train"], ["unexpected argument 'train'"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--model", "x", "--epochs", "0"], ["--epochs", "at least 1"]),
        (["--model", "x", "--amp", "fp8"], ["--amp", "auto, none, fp16, bf16"]),
        (["--model", "x", "--batch_size", "7"], ["--batch_size", "even"]),
        (["--recipe", "debiformer_huge"], ["debiformer_huge", "debiformer_small"]),
        (["--recipe", "debiformer_tinny"], ["did you mean debiformer_tiny? known: "]),
        (["--model", "x", "--eval=perhaps"], ["--eval", "perhaps"]),
        (["--model_kwargs", "n_win"], ["--model_kwargs", "NAME=VALUE"]),
        (["--model_kwargs", "img_size=64"], ["--model_kwargs img_size", "use --input_size"]),
        (["--model_kwargs", "depths=[2,2"], ["--model_kwargs", "cannot read 'depths=[2,2'"]),
        (["--decay_epochs", "0"], ["--decay_epochs must be at least 1"]),
        (["--opt_betas", "fast"], ["--opt_betas", "numbers"]),
        (["--model", "x", "--scale", "0.1"], ["--scale", "two numbers"]),
        (["--model", "x", "--fuse"], ["--fuse", "add --eval"]),
        (["--model", "x", "--eval_set", "real"], ["--eval_set real", "--eval"]),
        (["--model", "x", "--eval", "--eval_set", "a", "--data_set", "CIFAR"], ["--eval_set a", "no --data_set"]),
        (["--model", "x", "--eval_set", "b"], ["--eval_set", "val, real, v2, a, r, sketch"]),
        (["--model", "x", "--crop_pct", "0"], ["--crop_pct", "above 0"]),
        (["--model", "x", "--crop_pct", "1.5"], ["--crop_pct", "at most 1"]),
        (["--local_rank", "first"], ["--local_rank"]),
        (["--model", "x", "--epochs", "5"], ["--warmup_epochs 5", "--epochs 5", "at most 4"]),
        (["--model", "x", "--epochs", "9", "--start_epoch", "9"], ["--start_epoch 9", "--epochs 9"]),
        (["--model", "x", "--sched", "step", "--decay_rate", "2"], ["--decay_rate", "at most 1"]),
        (["--model", "x", "--sched", "plateau"], ["--sched", "cosine", "multistep"]),
        (["--model", "x", "--decay_milestones", "9", "4"], ["--decay_milestones", "ascending"]),
        (["--model", "x", "--scale", "0.9", "0.1"], ["--scale", "ascending"]),
        (["--model", "x", "--lr_noise", "0.1", "0.2", "0.3"], ["--lr_noise", "one or two numbers"]),
        (["--model", "x", "--finetune_eval_mode"], ["--finetune_eval_mode", "--finetune"]),
    ],
)
def test_bad_command_lines_get_one_clear_line(capsys, argv, words):
    message = error_of(capsys, *argv)
    for word in words:
        assert word in message


def out_of_range():
    """(option, value) just outside each bound that an option declares; floats also where they are no number."""
    for group in (*GROUPS, SlurmOptions):
        hints = get_type_hints(group)
        for spec in dataclasses.fields(group):
            step = 1 if "int" in str(hints[spec.name]) else 1e-6
            bounds = {name: spec.metadata[name] for name in ("at_least", "above", "at_most", "below")}
            beyond = {"at_least": -step, "above": 0, "at_most": step, "below": 0}
            values = [bound + beyond[name] for name, bound in bounds.items() if bound is not None]
            if "float" in str(hints[spec.name]):
                values += [float("nan"), float("inf")]
            for value in values:
                yield pytest.param(group, spec.name, value, id=f"{spec.name}={value}")


@pytest.mark.parametrize(("group", "name", "value"), list(out_of_range()))
def test_values_out_of_range_get_one_clear_line(capsys, group, name, value):
    if group is SlurmOptions:
        assert f"slurm.{name} must be " in complaint(check_ranges, SlurmOptions(**{name: value}), "slurm.")
        return
    numbers = max(next(s for s in dataclasses.fields(group) if s.name == name).metadata["counts"], default=1)
    message = error_of(capsys, "--model", "x", f"--{name}={','.join([str(value)] * numbers)}")
    assert f"--{name} must be " in message


def test_numbers_have_bounds_where_any_value_would_be_taken():
    """Also guards the test above, which has nothing to try where nothing is declared."""
    for group in set(GROUPS) - {InertOptions}:
        for spec, hint in zip(dataclasses.fields(group), get_type_hints(group).values(), strict=True):
            if "int" in str(hint) or "float" in str(hint):
                assert spec.metadata["at_least"] is not None or spec.metadata["above"] is not None, spec.name


def test_bounds_themselves_are_allowed():
    for spec in dataclasses.fields(Options):
        for bound in (spec.metadata["at_least"], spec.metadata["at_most"]):
            if bound is not None:
                count = max(spec.metadata["counts"], default=1)
                is_list = spec.default_factory is not dataclasses.MISSING or spec.metadata["counts"]
                check_ranges(Options(**{spec.name: [bound] * count if is_list else bound}), "--")


def test_options_without_effect_are_told_when_given():
    assert inert_notes(parse_args(["--model", "x", "--world_size", "1"])) == []
    notes = inert_notes(parse_args(["--model", "x", "--world_size", "8", "--resplit"]))
    assert notes[0].startswith("--world_size has no effect: the launcher")
    assert notes[1].startswith("--resplit has no effect")


@pytest.mark.parametrize(
    ("text", "word"),
    [("modle: x\n", "modle"), ("epochs: many\n", "many"), ("a: [", "recipe"), ("- 1\n", "recipe")],
)
def test_bad_recipes_get_one_clear_line(capsys, tmp_path, text, word):
    (tmp_path / "bad.yaml").write_text(text)
    assert word in error_of(capsys, "--recipe", str(tmp_path / "bad.yaml"))


def test_every_option_is_in_exactly_one_group_and_has_help():
    names = [spec.name for group in GROUPS for spec in dataclasses.fields(group)]
    assert sorted(names) == sorted(spec.name for spec in dataclasses.fields(Options))
    assert len(names) == len(set(names))
    assert all(spec.metadata["help"] for spec in dataclasses.fields(Options))


def test_documentation_table_is_up_to_date():
    assert (ROOT / "docs" / "OPTIONS.md").read_text() == markdown_table()


def test_help_teaches():
    printed = command("main.py", "--help")
    assert printed.returncode == 0
    for word in ("--drop_path", "(default: 0.1)", "Without any option", "--recipe debiformer_small"):
        assert word in printed.stdout


def test_names_of_other_programs_lead_to_options_that_exist():
    known = set(names_of(*GROUPS))
    assert set(NAMES_ELSEWHERE.values()) <= known
    assert NAMES_ELSEWHERE.keys() & known == {"num_classes"}  # as an argument of a model
