"""Arguments of models: which there are, from whom they may come, and what constructors say to those that cannot be."""

import json
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import timm
import torch
from support import complaint

from models import biformer, debiformer, stl
from models.arguments import RESERVED, argument_names, check_arguments
from tools.loading import load_model
from visualize.subject import load_subject


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (
            "debiformer_nano",
            {"num_heads": [2, 4, 8]},
            r"num_heads takes one value for each of the 4 stages, not \[2, 4",
        ),
        ("debiformer_nano", {"agent_topk": 4}, "agent_topk takes one value for each of the 4 stages, not 4"),
        ("biformer_tiny", {"depths": (1, 1, 1, 1, 1)}, "depths takes one value"),
        ("biformer_stl", {"topk": "1234"}, "topk takes one value"),
        ("maxvit_stl", {"mlp_ratios": ()}, "mlp_ratios takes one value"),
        ("debiformer_nano", {"num_heads": (1, 2, 5, 4)}, "5 heads do not divide the width 96"),
        ("debiformer_nano", {"offset_groups": (1, 0, 3, 4)}, "0 offset groups must divide"),
        ("biformer_tiny", {"num_heads": (2, 4, 8, 9)}, "9 heads do not divide the width 512"),
        ("biformer_tiny", {"topk": (1, 4, 50, None)}, r"top-k must lie in 1..49"),
        ("debiformer_nano", {"n_win": 0}, "n_win must be at least 1, not 0"),
        ("biformer_stl_nchw", {"num_heads": (0, 6, 12, 8)}, "0 heads do not divide the width 96"),
    ],
)
def test_check_arguments_names_those_that_do_not_fit(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model(name, **arguments)


# -- arguments that others give -----------------------------------------------------------------------------------

FOREIGN = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:1/x.pth"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "pretrained_tag": "in1k",
    "pretrained_strict": False,
    "cache_dir": "/nowhere",
    "checkpoint_path": "/etc/passwd",
    "features_only": True,
    "out_indices": [0],
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "img_size": 64,
    "num_classes": 3,
    "drop_path_rate": 0.1,
    "device": "cuda",
    "make_block": "x",
    "self": 1,
    "kwargs": 1,
    "__class__": 1,
}


@pytest.mark.parametrize(
    "model",
    [
        "debiformer_nano",
        "debi_tiny",
        "biformer_tiny",
        "biformer_stl",
        "maxvit_stl",
        "resnet18",
        "vit_tiny_patch16_224",
        "maxvit_tiny_tf_224",
    ],
)
def test_check_arguments_takes_a_models_own_only(model):
    for name, value in FOREIGN.items():
        with pytest.raises(ValueError, match=name):
            check_arguments(model, {name: value})


def test_check_arguments_takes_all_of_the_variants():
    for variants in (debiformer.VARIANTS, biformer.VARIANTS, stl.VARIANTS):
        for model, arguments in variants.items():
            check_arguments(model, {name: value for name, value in arguments.items() if name not in RESERVED})
    assert {"depths", "n_win", "agent_topk", "auto_pad", "in_chans", "global_pool"} <= argument_names("debiformer_tiny")
    assert "agent_topk" not in argument_names("biformer_tiny")
    assert {"nchw", "topk"} <= argument_names("biformer_stl")
    assert "qkv_bias" in argument_names("vit_tiny_patch16_224")


def test_argument_names_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    argument_names.cache_clear()
    argument_names("debiformer_nano")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", [300, 1, 1, 1]),
        ("depths", (1, 1, 10**6, 1)),
        ("depths", [-5, 1, 1, 1]),
        ("n_win", float("nan")),
        ("n_win", 2**62),
        ("embed_dims", [10**9] * 4),
        ("embed_dims", [[64]] * 4),
        ("embed_dims", [64] * 1000),
        ("embed_dims", {"a": 1}),
        ("global_pool", "x" * 1000),
        ("n_win", b"7"),
    ],
    ids=range(11),
)
def test_check_arguments_refuses_values_not_plain_or_too_large(name, value):
    with pytest.raises(ValueError, match=f"argument {name} (takes|is for)") as error:
        check_arguments("debiformer_nano", {name: value})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("load", [load_model, load_subject], ids=["tools", "visualize"])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_load_of_a_foreign_checkpoint_downloads_and_opens_nothing(load, kind, tmp_path, server):
    weights = timm.create_model("debiformer_nano", num_classes=4).state_dict()
    server.files["/evil.pth"] = b"import os"
    sources = (
        {"pretrained": True, "cache_dir": str(tmp_path / "cache"), "pretrained_cfg": {"url": f"{server.url}/evil.pth"}},
        {"pretrained": True, "pretrained_cfg": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
    )
    for arguments in sources:
        described = {"model": "debiformer_nano", "input_size": 64, "model_kwargs": arguments}
        path = tmp_path / f"foreign.{kind}"
        if kind == "pth":
            torch.save({"model": weights, "args": described}, path)
        else:
            safetensors.torch.save_file(weights, path, {name: json.dumps(value) for name, value in described.items()})
        message = complaint(load, "debiformer_nano", str(path))
        assert "it takes no argument" in message
        assert urlsplit(server.url).netloc not in message
    assert server.asked == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("load", [load_model, load_subject], ids=["tools", "visualize"])
def test_load_refuses_a_model_larger_than_its_weights_before_building_it(load, tmp_path):
    weights = timm.create_model("debiformer_nano", num_classes=4).state_dict()
    for arguments in ({"embed_dims": [8192] * 4, "num_heads": [1] * 4, "offset_groups": [1] * 4}, {"n_win": 8192}):
        args = {"model": "debiformer_nano", "input_size": 64, "model_kwargs": arguments}
        if "n_win" in arguments:
            args["input_size"] = 4096 if load is load_model else 512
        torch.save({"model": weights, "args": args}, tmp_path / "x.pth")
        complaint(load, "debiformer_nano", str(tmp_path / "x.pth"))
