"""What docs/EXTENDING.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image

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
