"""What the documents say of segmentation and detection fits the options and recipes."""

import re
import shlex

import pytest
from support import ROOT

from tasks.options import parse_args

COMMANDS = [
    (path.name, line.strip())
    for path in (ROOT / "README.md", ROOT / "docs" / "DENSE.md")
    for line in path.read_text().splitlines()
    if line.startswith("    ") and "main.py" in line and re.search("ade20k|coco", line)
]


def test_documents_have_commands():
    assert {name for name, _ in COMMANDS} == {"README.md", "DENSE.md"}


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_documented_command_keeps_to_its_recipes_batch(name, line):
    launcher, _, rest = line.partition("main.py ")
    options = parse_args(shlex.split(rest))
    processes = int(re.search(r"nproc_per_node=(\d+)", launcher)[1]) if "torchrun" in launcher else 1
    if not options.eval:
        assert processes * options.batch_size * options.accum_steps == options.recipe_batch


def test_published_figures_are_those_of_the_recipes():
    rows = re.findall(r"^\| (?:ADE20K|COCO) \|.*\| ([^|]+) \| `(\w+)` \|$", (ROOT / "README.md").read_text(), re.M)
    recipes = {path.stem: path.read_text().splitlines()[1] for path in (ROOT / "configs" / "recipe").glob("*_*_*.yaml")}
    known = {name for name, line in recipes.items() if re.search("(ade20k|coco)$", name) and "not known" not in line}
    assert {recipe for _, recipe in rows} == known
    for figures, recipe in rows:
        assert all(figure in recipes[recipe] for figure in re.findall(r"\d+\.\d", figures)), recipe
