"""All options of a run: the common ones and its task's, as one flat set of names.

`python -m tasks.options` prints the documentation.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optim_factory import OptimizerOptions, ScheduleOptions, check_schedule
from runtime.command_line import build_parser, unknown_option, with_underscores
from runtime.errors import UsageError, did_you_mean
from runtime.options import (
    RECIPES,
    InertOptions,
    ModelOptions,
    RunOptions,
    SlurmOptions,
    check_model,
    check_ranges,
    table_of,
)

from . import DEFAULT_TASK, TASKS, find_task

DEFAULT_RECIPE = "debiformer_nano_digits"
COMMON = (RunOptions, ModelOptions, OptimizerOptions, ScheduleOptions)


def groups_of(task: str) -> tuple[type, ...]:
    """Return the dataclasses of options that a run of a task has. UsageError if there is no such task."""
    return (*COMMON, *find_task(task).options, InertOptions)


@cache
def options_of_task(task: str = DEFAULT_TASK) -> type:
    """Return one dataclass with all options of a task's runs. UsageError if there is no such task."""
    return make_dataclass("Options", [], bases=tuple(reversed(groups_of(task))), namespace={"__module__": __name__})


Options = options_of_task()


def parse_args(argv: Sequence[str] | None = None, program: str = "main.py") -> Options:
    """Return the options of a command line. Exits with code 2 on a bad one, and with 0 after --help.

    Both spellings, --batch-size and --batch_size, are taken. Later beats earlier, the command line beats the recipe.
    """
    argv = [with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(program, COMMON)
    try:
        task = task_of(vars(parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0]))
        groups = groups_of(task)
        parser = build_parser(program, groups)
        given, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(unknown_option(unknown[0], groups))
        values = vars(given)
        values.pop("local_rank", None)
        return with_recipe({**values, "task": task})
    except UsageError as error:
        parser.error(str(error))


def task_of(values: dict[str, Any]) -> str:
    """Return the task that values, or else the recipe that they name, ask for. UsageError if there is none such."""
    task = values.get("task") or (read_recipe(values["recipe"]).get("task") if values.get("recipe") else None)
    find_task(str(task or DEFAULT_TASK))
    return str(task or DEFAULT_TASK)


def with_recipe(values: dict[str, Any]) -> Options:
    """Return options from the values that were given, on top of their recipe (or the default one), validated."""
    recipe = values.get("recipe", "")
    if not values.keys() & {"recipe", "model", "data_path", "data_set"} and task_of(values) == DEFAULT_TASK:
        recipe = DEFAULT_RECIPE
        if os.environ.get("RANK", "0") == "0":
            print(f"No --data_path, --data_set, --model or --recipe given: using --recipe {recipe}", flush=True)
    task = task_of({**values, "recipe": recipe})
    options = load_recipe(recipe, task) if recipe else options_of_task(task)()
    for name, value in values.items():
        setattr(options, name, value)
    options.recipe, options.task = recipe, task
    validate(options)
    return options


def read_recipe(name: str) -> dict[str, Any]:
    """Read configs/recipe/NAME.yaml, or a YAML file at path `name`. UsageError if there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        closest = did_you_mean(name, known, "")
        raise UsageError(f"there is no recipe {name!r}; {closest and f'{closest} '}known: {', '.join(known)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"recipe {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path} holds no options; write a line NAME: VALUE for each")
    return content


def load_recipe(name: str, task: str | None = None) -> Options:
    """Return a recipe's values over the defaults. UsageError if it is wrong. task: the recipe's own by default."""
    content = read_recipe(name)
    schema = options_of_task(task or task_of(content))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))
    except OmegaConfBaseException as error:
        raise UsageError(f"recipe {name}: {str(error).splitlines()[0]}") from error


def validate(options: Options) -> None:
    """Raise UsageError if a value is out of its range or contradicts another."""
    check_ranges(options, prefix="--")
    settle_epochs(options)
    for check in (check_model, check_schedule, *find_task(options.task).checks):
        check(options)


def settle_epochs(options: RunOptions) -> None:
    """Set --epochs to the evaluations of --iterations. UsageError if they do not come out even."""
    if not options.iterations:
        return
    if not options.eval_every or options.iterations % options.eval_every:
        raise UsageError(
            f"--iterations {options.iterations} needs --eval_every, a part of it without remainder, "
            f"not {options.eval_every}"
        )
    options.epochs = options.iterations // options.eval_every


def markdown_table() -> str:
    """Return all options with defaults and help, grouped, for the documentation."""
    lines = ["# Options", "", "Written by `python -m tasks.options`. Hydra spells them the same way.", ""]
    for group in COMMON:
        lines += table_of(group)
    groups = dict.fromkeys(group for task in TASKS for group in find_task(task).options)
    for group in (*groups, InertOptions, SlurmOptions):
        lines += table_of(group)
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table(), end="")
