"""The README.md of an exported folder is what the Hub reads: licence, paper, figures, and code that runs."""

import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from support import ROOT

from models.weights import load_checkpoint
from tools.card import citation_of, model_card
from tools.export import export
from tools.loading import load_model


def test_card_says_what_a_run_measured(checkpoint):
    best = load_checkpoint(checkpoint)["best"]
    card = ModelCard(model_card(load_model("debiformer_nano", str(checkpoint))))
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "timm",
        "image-classification",
    )
    assert {"timm", "transformers", "arxiv:2410.08582"} <= set(card.data.tags)
    assert card.data.metrics == ["accuracy"]
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {name: pytest.approx(best[name], abs=1e-3) for name in ("acc1", "acc5")}
    assert card.data.eval_results[0].dataset_name == "images0"
    assert "Trained weights of debiformer_nano" in card.text
    assert "- **Classes:** 4" in card.text


def test_untrained_weights_claim_nothing():
    card = ModelCard(model_card(load_model("biformer_tiny")))
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert "untrained weights" in card.text


@pytest.mark.parametrize(
    ("model", "title"), [("debiformer_tiny", "{DeBiFormer: "), ("biformer_stl", "{BiFormer: "), ("maxvit_stl", None)]
)
def test_each_family_is_cited_as_in_the_readme(model, title):
    found = citation_of(model)
    assert (title in found and found.count("@") == 1) if title else found == ""


@pytest.mark.parametrize("trained_on", ["", "elsewhere"])
def test_figures_that_are_none_are_left_out(checkpoint, trained_on):
    loaded = load_model("debiformer_nano", str(checkpoint))
    loaded.figures, loaded.data = {}, trained_on
    card = ModelCard(model_card(loaded))
    assert card.data.eval_results is None
    assert ("elsewhere" in card.text) is bool(trained_on)


def test_code_on_the_card_runs(checkpoint, tmp_path):
    export(load_model("debiformer_nano", str(checkpoint)), "hf", tmp_path / "repo")
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "repo" / "README.md").read_text(), re.DOTALL)
    code = code.replace("FOLDER", str(tmp_path / "repo")) + "assert model.num_classes == 4\n"
    installed = "import sys, models; sys.modules['debiformer'] = models\n"  # as `pip install .` names it
    done = subprocess.run(
        [sys.executable, "-c", installed + code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
