"""Weights from files: every format is read, code never, and what does not fit is told in one sentence."""

import argparse
import os
import pathlib
import pickle
import tarfile
import zipfile

import pytest
import safetensors.torch
import timm
import torch
from support import complaint, save_as_authors, scrambled

import models  # noqa: F401
from models.weights import WeightsMismatch, load_checkpoint, load_to_finetune, load_weights, weights_of
from models.weights.pickles import SAFE_CLASSES
from runtime.errors import message_of


def nano(**kwargs):
    return timm.create_model("debiformer_nano", **{"num_classes": 4, **kwargs})


def outline(name, **kwargs):
    """The state dict of a model without memory behind it."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def assert_same(model, weights):
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# -- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_load_checkpoint_reads_what_the_authors_save(tmp_path, zipped):
    model, ema = scrambled(nano(), 1), scrambled(nano(), 2)
    path = save_as_authors(tmp_path / "best.pth", model, ema, zipped)
    content = load_checkpoint(path)
    assert (content["args"].lr, str(content["args"].output_dir)) == (5e-4, "outputs/cls")
    for expected, use_ema in ((model, False), (ema, True)):
        loaded = nano()
        load_weights(loaded, weights_of(content, path, use_ema), path)
        assert_same(loaded, expected.state_dict())


def test_load_checkpoint_reads_other_kinds_of_file(tmp_path):
    weights = nano().state_dict()
    kinds = {
        "ddp": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        "compiled": {"model": {f"_orig_mod.module.{name}": value for name, value in weights.items()}},
        "bare": dict(weights),
    }
    for name, content in kinds.items():
        torch.save(content, tmp_path / name)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    for name in (*kinds, "model.safetensors"):
        model = nano()
        load_weights(model, weights_of(load_checkpoint(tmp_path / name), name), name)
        assert_same(model, weights)


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
@pytest.mark.parametrize("name", [b"PosixPath", b"PurePosixPath", b"WindowsPath", b"PureWindowsPath"])
def test_load_checkpoint_reads_paths_of_another_system_or_python(tmp_path, module, name):
    torch.save({"args": argparse.Namespace(data_path=pathlib.PurePosixPath("a/b"))}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as source, zipfile.ZipFile(tmp_path / "y.pth", "w") as target:
        for entry in source.namelist():
            written = pathlib.PurePosixPath.__module__.encode() + b"\nPurePosixPath"
            content = source.read(entry).replace(written, module + b"\n" + name)
            target.writestr(entry, content)
    parts = load_checkpoint(tmp_path / "y.pth")["args"].data_path.parts
    assert parts == ("a", "b")


def test_safe_classes_are_options_and_paths_only():
    kinds = {kind if isinstance(kind, type) else kind[0] for kind in SAFE_CLASSES}
    assert kinds == {argparse.Namespace, pathlib.PurePosixPath, pathlib.PureWindowsPath}


def test_weights_of_refuses_averaged_weights_that_are_not_there(tmp_path):
    path = save_as_authors(tmp_path / "x.pth", nano())
    assert "holds no averaged weights" in complaint(weights_of, load_checkpoint(path), path, True)


# -- files that are refused ---------------------------------------------------------------------------------------


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def save_newest_pickle_in_zip(content, path):
    torch.save(content, path, pickle_protocol=4)


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle, save_newest_pickle_in_zip])
def test_load_checkpoint_refuses_code_by_name_and_does_not_run_it(tmp_path, save):
    save({"model": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    message = complaint(load_checkpoint, tmp_path / "evil.pth")
    assert f"{tmp_path / 'evil.pth'} holds posix.system, which is code" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Exploit(tmp_path / "ran")))  # the trap is a real one
    assert (tmp_path / "ran").exists()


def test_load_checkpoint_refuses_a_pickled_model_by_name(tmp_path):
    torch.save({"model": nano()}, tmp_path / "model.pth")
    assert "holds models.debiformer.DeBiFormer, which is code" in complaint(load_checkpoint, tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_load_checkpoint_refuses_a_program(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    assert "which is code" in complaint(load_checkpoint, tmp_path / "program.pt")


def test_load_checkpoint_refuses_torchs_tar_format_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
            archive.add(tmp_path / name, name)
    assert "tar format of 2016" in complaint(load_checkpoint, tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50, bytes(range(256)) * 8], ids=range(4))
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_load_checkpoint_refuses_other_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert f"{name} is not a checkpoint" in complaint(load_checkpoint, tmp_path / name)


def test_load_checkpoint_refuses_what_is_no_file(tmp_path):
    assert "does not exist" in complaint(load_checkpoint, tmp_path / "nowhere.pth")
    assert "is a folder" in complaint(load_checkpoint, tmp_path)


def test_load_checkpoint_does_not_unpack_an_archive_that_expands(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert "claims to hold 10,000,000" in complaint(load_checkpoint, tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3},
        {"model": {}},
        {"model": {"head.bias": "four"}},
        {"model": {3: torch.zeros(4)}},
        {"a\nb" * 1000: 1},
    ],
    ids=range(5),
)
def test_weights_of_refuses_a_checkpoint_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    message = complaint(weights_of, load_checkpoint(tmp_path / "x.pth"), "x.pth")
    assert "holds no weights" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4).to_sparse(),
        torch.zeros(4, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(1).expand(4),
    ],
    ids=["sparse", "meta", "nested", "quantized", "float8", "expanded"],
)
def test_weights_of_refuses_tensors_that_are_not_dense_numbers(tmp_path, tensor):
    torch.save({"model": {"head.bias": tensor}}, tmp_path / "x.pth")
    message = complaint(load_checkpoint, tmp_path / "x.pth")
    assert "only plain dense tensors" in message or "claims a tensor of shape" in message


def test_load_checkpoint_refuses_other_content(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in complaint(load_checkpoint, tmp_path / "list.pth")


# -- weights that do not fit --------------------------------------------------------------------------------------


def refusal(model, weights):
    """What load_weights says, having changed nothing."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = complaint(load_weights, model, weights, "x.pth")
    assert len(message) < 500
    if not any(value.is_meta for value in before.values()):
        assert_same(model, before)
    return message


def test_load_weights_tells_other_depths_with_the_remedy():
    base, deeper = outline("debiformer_base"), outline("debiformer_base", depths=(2, 2, 9, 3))
    sentence = "checkpoint has 3 blocks in stage 4, debiformer_base has 2: create the model with depths=(2, 2, 9, 3)"
    assert refusal(base, deeper.state_dict()) == f"x.pth: {sentence}"
    sentence = "checkpoint has 2 blocks in stage 4, debiformer_base has 3: create the model with depths=(2, 2, 9, 2)"
    assert refusal(deeper, base.state_dict()) == f"x.pth: {sentence}"
    tiny = outline("debiformer_tiny")
    assert refusal(tiny, outline("debiformer_tiny", depths=(2, 2, 9, 3)).state_dict()) == (
        "x.pth: checkpoint has 2,2,9,3 blocks in its stages, debiformer_tiny has 1,1,4,1: "
        "create the model with depths=(2, 2, 9, 3)"
    )


def test_mismatch_arguments_build_the_model_that_fits():
    weights = nano(depths=(1, 2, 1, 1)).state_dict()
    with pytest.raises(WeightsMismatch) as error:
        load_weights(nano(), weights, "x.pth")
    load_weights(nano(**error.value.arguments), weights, "x.pth")


def test_load_weights_tells_other_widths_classes_and_sizes():
    assert "checkpoint has widths 96,192,384,768, biformer_small has 64,128,256,512: choose the model" in refusal(
        outline("biformer_small"), outline("biformer_base").state_dict()
    )
    assert "checkpoint has 1000 classes, debiformer_nano has 4: create the model with num_classes" in refusal(
        nano(), nano(num_classes=1000).state_dict()
    )
    assert "checkpoint is for images of 96 x 128, debiformer_nano was built for 64 x 64: create" in refusal(
        nano(), nano(img_size=(96, 128)).state_dict()
    )
    assert "has downsample_layers.0.0.weight [16, 1, 3, 3] of torch.float32, debiformer_nano has [16, 3, 3, 3]" in (
        refusal(nano(), nano(in_chans=1).state_dict())
    )


def test_load_weights_tells_missing_and_additional_weights_by_place():
    weights = nano().state_dict()
    for name in [name for name in weights if name.startswith("stages.2.0.mlp1.")]:
        weights[name.replace("mlp1", "mlp3")] = weights.pop(name)
    message = refusal(nano(), weights)
    assert "another model than debiformer_nano: it lacks stages.2.0.mlp1" in message
    assert message.count("(stage 3 block 1)") == 2
    assert "it lacks head.bias (head)" in refusal(
        nano(), {k: v for k, v in nano().state_dict().items() if k != "head.bias"}
    )


def test_load_weights_refuses_another_family_in_one_sentence():
    assert "is of another model than debiformer_nano" in refusal(nano(), outline("biformer_tiny").state_dict())
    assert "is of another model than resnet18" in refusal(outline("resnet18"), nano().state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("name", ["stages.1.0.norm1.weight", "norm.running_var", "head.bias"])
def test_load_weights_refuses_weights_that_are_not_finite(value, name):
    weights = nano().state_dict()
    weights[name] = weights[name].double()
    weights[name][1] = value
    assert f"NaN or infinity in {name}" in refusal(nano(), weights)


def test_load_weights_refuses_numbers_of_another_kind():
    weights = nano().state_dict()
    weights["head.bias"] = weights["head.bias"].to(torch.complex64)
    assert "head.bias [4] of torch.complex64" in refusal(nano(), weights)


# -- fine-tuning --------------------------------------------------------------------------------------------------


def test_load_to_finetune_adapts_classes_input_size_and_channels():
    source, target = nano(), nano(num_classes=7, img_size=128, in_chans=1)
    fresh = load_to_finetune(target, source.state_dict(), "x")
    assert fresh == ["head.weight", "head.bias"]
    table = target.stages[0][0].attn2.rpe_table
    original = source.stages[0][0].attn2.rpe_table
    assert table.shape == (1, 63, 63)
    assert original.shape == (1, 31, 31)
    torch.testing.assert_close(table[:, 0, 0], original[:, 0, 0])
    torch.testing.assert_close(table[:, 31, 31], original[:, 15, 15])
    same = target.stages[1][0].mlp1.linear1[0].weight
    assert torch.equal(same, source.stages[1][0].mlp1.linear1[0].weight)
    torch.testing.assert_close(
        target.downsample_layers[0][0].weight, source.downsample_layers[0][0].weight.sum(1, True)
    )


def test_load_to_finetune_refuses_another_model():
    assert "another model" in complaint(load_to_finetune, nano(), timm.create_model("biformer_tiny").state_dict(), "x")


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(1, 0, 0),
        torch.zeros(1).expand(1, 10**6, 10**6),
        torch.zeros(1, 1, 10**5),
        torch.zeros(1, 9, 9, dtype=torch.int64),
        torch.zeros(1, 9, 9).to(torch.float8_e4m3fn),
        torch.zeros(1, 9, 9).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(1, 9, 9), 1.0, 0, torch.qint8),
        torch.zeros(7, 9, 9),
    ],
    ids=["empty", "expanded", "long", "integers", "float8", "sparse", "quantized", "other heads"],
)
def test_load_to_finetune_refuses_tables_that_cannot_be_resampled(table):
    model = nano()
    assert model.state_dict()["stages.0.0.attn2.rpe_table"].shape[0] == 1
    weights = {**model.state_dict(), "stages.0.0.attn2.rpe_table": table}
    complaint(load_to_finetune, model, weights, "x")


@pytest.mark.parametrize("shape", [(16, 2, 3, 3), (16, 6, 3, 3), (16, 10**4, 3, 3), (8, 3, 3, 3), (16, 0, 3, 3)])
def test_load_to_finetune_refuses_first_filters_that_take_no_rgb(shape):
    for in_chans in (1, 3, 5):
        model = nano(in_chans=in_chans)
        weights = {**model.state_dict(), "downsample_layers.0.0.weight": torch.zeros(shape)}
        complaint(load_to_finetune, model, weights, "x")


def test_mismatch_names_what_differs():
    weights = nano(num_classes=7).state_dict()
    weights["extra"] = weights.pop("norm.weight")
    with pytest.raises(WeightsMismatch) as error:
        load_weights(nano(), weights, "x")
    assert (error.value.missing, error.value.unexpected) == ({"norm.weight"}, {"extra"})
    assert error.value.shapes["head.bias"] == ((7,), (4,))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"depths": (1, 2, 1, 1)}, "pass --model_kwargs depths=1,2,1,1"),
        ({"num_classes": 7}, "pass --num_classes 7, or --finetune, which begins with a new classifier"),
        ({"img_size": (96, 128)}, "pass --input_size 96, or --finetune, which resamples its position tables"),
    ],
)
def test_message_of_tells_the_remedy_as_options(arguments, remedy):
    weights = nano(**arguments).state_dict()
    with pytest.raises(WeightsMismatch) as error:
        load_weights(nano(), weights, "x\n.pth")
    assert (error.value.arguments, "--" in str(error.value)) == (arguments, False)
    assert message_of(error.value).endswith(f": {remedy}")
    assert message_of(error.value).startswith("x\\n.pth: checkpoint ")
    load_weights(nano(**error.value.arguments), weights, "x.pth")
