"""What docs/EXTENDING.md shows runs as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import ROOT, command

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
    row = names["found"].block(1)[0]
    parts = row.maps.contributions(3, 5).sum((0, 1, 2)) + row.maps.rest[3, 5]
    torch.testing.assert_close(parts, row.output[3, 5], atol=1e-6, rtol=1e-5)
    with Image.open("token_attention.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 100
    monkeypatch.delitem(ATTENTIONS, "row")


def test_page_attention_in_a_file_of_models_is_found_by_its_name(tmp_path):
    definition = code_of("A new attention")[0]
    own = "from .attention_maps import AttentionMaps\nfrom .attention_table import register_attention\n"
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models/row.py").write_text(definition.replace("import models\n", own).replace("models.", ""))
    package = tmp_path / "models/__init__.py"
    first, later = "from . import biformer, debiformer, stl", "from . import biformer, debiformer, row, stl"
    assert first in package.read_text()
    assert later in PAGE.read_text()
    package.write_text(package.read_text().replace(first, later))
    build = "import timm, models; print(timm.create_model('biformer_tiny', attn_layer=['row', 'row', 'row', None]))"
    done = command("-c", build, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "RowAttention" in done.stdout


def test_page_data_set_reads_classes_from_names(tmp_path):
    (definition,) = code_of("A new data set")
    names = {}
    exec(compile(definition, PAGE.name, "exec"), names)
    (tmp_path / "train.csv").write_text("a/1.png,dog\n2.png,cat\n3.png,dog\n")
    found = names["from_table"](tmp_path, "train")
    assert found.classes == ["cat", "dog"]
    assert [found[number] for number in range(2)] == [(str(tmp_path / "a/1.png"), 1), (str(tmp_path / "2.png"), 0)]


def test_page_task_trains(tmp_path):
    (program,) = code_of("A new task")
    (tmp_path / "brightness.py").write_text(program)
    done = command("brightness.py", cwd=tmp_path, PYTHONPATH=str(PAGE.parent.parent))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 50
    assert (tmp_path / "bright" / "best.pth").is_file()
