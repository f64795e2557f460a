"""What docs/EXTENDING.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support import command

from models.attention_table import ATTENTIONS

PAGE = Path(__file__).parent.parent / "docs" / "EXTENDING.md"


def code_of(heading: str) -> list[str]:
    """The Python code under a heading of the page."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_page_attention_trains_and_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 50).convert("RGB").save("photo.jpg")
    monkeypatch.delitem(ATTENTIONS, "row", raising=False)
    definition, training, drawing = code_of("A new attention")
    assert len([line for line in definition.splitlines() if line.strip()]) <= 40
    names = {"__name__": "page"}
    exec(compile(definition + training, PAGE.name, "exec"), names)
    assert isinstance(names["model"].stages[0][0].attn1, names["RowAttention"])
    assert not isinstance(names["model"].stages[2][0].attn1, names["RowAttention"])
    exec(compile(drawing, PAGE.name, "exec"), names)
    for layer in names["found"].layers:
        attention = layer.maps.token_attention(0, 0)
        assert attention.sum((1, 2)).tolist() == pytest.approx([1.0] * layer.maps.num_heads, abs=1e-5)
    with Image.open("token_attention.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 100
    monkeypatch.delitem(ATTENTIONS, "row")


def test_page_data_set_reads_classes_from_names(tmp_path):
    (definition,) = code_of("A new data set")
    names = {}
    exec(compile(definition, PAGE.name, "exec"), names)
    for name in ("dog_1.png", "cat_1.png", "dog_2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = names["by_prefix"](tmp_path)
    assert found.classes == ["cat", "dog"]
    assert [found[number][1] for number in range(3)] == [0, 1, 1]


def test_page_task_trains(tmp_path):
    (program,) = code_of("A new task")
    (tmp_path / "brightness.py").write_text(program)
    done = command("brightness.py", cwd=tmp_path, PYTHONPATH=str(PAGE.parent.parent))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 50
    assert (tmp_path / "bright" / "best.pth").is_file()
