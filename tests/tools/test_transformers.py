"""An exported folder opens in Hugging Face's transformers."""

import pytest
import torch
from golden.fill import fill
from support import CLASSES
from transformers import AutoModelForImageClassification, TimmWrapperModel, pipeline

import models
from tools.export import export
from tools.loading import load_model


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("_small", "_base")) else ())
        for name in models.MODEL_NAMES
    ],
)
def test_from_pretrained_gives_the_same_logits(name, tmp_path):
    loaded = load_model(name, input_size=64)
    fill(loaded.model).float()
    export(loaded, "hf", tmp_path / "repo")
    twin = AutoModelForImageClassification.from_pretrained(tmp_path / "repo")
    images = torch.randn(2, 3, 64, 64)
    weights = twin.timm_model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.model.state_dict().items())
    # Mapped from a file, weights lie elsewhere in memory than allocated ones, and matrix products round otherwise.
    torch.testing.assert_close(twin(images).logits, loaded.model(images), rtol=1e-5, atol=1e-6 * 27_000)


@torch.no_grad()
def test_folder_saved_by_transformers_loads_again(tmp_path):
    loaded = load_model("debiformer_nano")
    export(loaded, "hf", tmp_path / "repo")
    AutoModelForImageClassification.from_pretrained(tmp_path / "repo").save_pretrained(tmp_path / "saved")
    twin = TimmWrapperModel.from_pretrained(tmp_path / "saved")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(twin(images).last_hidden_state, loaded.model.forward_features(images))


def test_pipeline_names_the_classes(checkpoint, images_by_class, tmp_path):
    loaded = load_model("debiformer_nano", str(checkpoint))
    export(loaded, "hf", tmp_path / "repo")
    classify = pipeline("image-classification", str(tmp_path / "repo"))
    found = {name: classify(str(path))[0]["label"] for name, path in images_by_class.items()}
    assert found == {name: name for name in CLASSES}
