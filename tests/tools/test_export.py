"""Exported models compute what the model computes, in the library they were exported for."""

import functools
import itertools
import json
import os
import shutil

import onnx
import onnxruntime
import openvino
import pytest
import safetensors
import timm
import torch
from golden.fill import fill
from support import CLASSES, command

from models.fusion import fuse
from models.weights import weights_of
from runtime.errors import UsageError
from tools import export, onnx_format, runtime_formats
from tools.loading import UNTRAINED, Loaded, load_model

FAMILIES = ["debiformer_nano", "biformer_tiny", "biformer_stl", "biformer_stl_nchw", "maxvit_stl"]
DEPTHS = dict.fromkeys(FAMILIES, (1, 1, 1, 1)) | {"maxvit_stl": (2, 1, 1, 1)}
"""Of models with one block of every kind that a family has."""


def loaded_with_varied_weights(name: str, **kwargs) -> Loaded:
    loaded = load_model(name, **kwargs)
    fill(loaded.model).float()
    return loaded


def small(name: str) -> dict:
    """Arguments of a small model with one block of every kind; with nothing for what is small already."""
    return {} if name == "debiformer_nano" else {"embed_dims": (96, 192, 288, 384), "depths": DEPTHS[name]}


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


# -- ONNX


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_gives_the_same_logits_for_any_batch_and_image_size(name, tmp_path):
    loaded = loaded_with_varied_weights(name, input_size=64, model_kwargs=small(name))
    path = tmp_path / "model.onnx"
    assert export.export(loaded, "onnx", path) < 1e-4
    assert os.listdir(tmp_path) == ["model.onnx"]
    onnx.checker.check_model(path)
    for batch, size in ((1, (64, 64)), (2, (64, 64)), (5, (33, 95)), (3, (150, 41)), (1, (224, 224))):
        images = export.random_images(loaded, batch, size)
        assert relative(run_onnx(path, images), loaded.model(images)) < 1e-4


@torch.no_grad()
@pytest.mark.slow
def test_openvino_gives_the_same_logits_for_any_batch_and_image_size(tmp_path):
    loaded = loaded_with_varied_weights("biformer_tiny", input_size=64, model_kwargs=small("biformer_tiny"))
    assert export.export(loaded, "openvino", tmp_path / "model") < 1e-4
    assert sorted(os.listdir(tmp_path / "model")) == ["model.bin", "model.xml"]
    compiled = openvino.Core().compile_model(tmp_path / "model/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, size in ((1, (64, 64)), (5, (33, 95))):
        images = export.random_images(loaded, batch, size)
        assert relative(torch.from_numpy(compiled(images.numpy())[0]), loaded.model(images)) < 1e-4


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed (apt-get install g++)")
def test_aotinductor_gives_the_same_logits_for_any_batch(tmp_path):
    loaded = loaded_with_varied_weights("debiformer_nano", model_kwargs={"depths": (1, 1, 1, 1)})
    path = tmp_path / "model.pt2"
    assert export.export(loaded, "aoti", path) < 1e-4
    run = torch._inductor.aoti_load_package(str(path))
    images = export.random_images(loaded, 5)
    assert relative(run(images), loaded.model(images)) < 1e-4


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed (apt-get install g++)")
def test_modules_are_packaged_for_any_batch_and_image_size(tmp_path):
    """A model's first two, for the others take minutes more."""
    path = tmp_path / "model.pt2"
    model = fuse(loaded_with_varied_weights("debiformer_nano").model)
    modules = list(itertools.islice(onnx_format.with_examples(model), 2))
    runtime_formats.package(modules, path)
    run = runtime_formats.FORMATS["aoti_dynamic"].load(path)
    for shape in ((1, 3, 64, 64), (5, 3, 33, 95)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = functools.reduce(lambda x, module: module[0](x), modules, images)
        assert relative(torch.from_numpy(run(images.numpy())), expected) < 1e-4


def test_dynamic_packages_are_for_models_of_this_project(tmp_path):
    with pytest.raises(UsageError, match="one size: --format aoti"):
        export.export(load_model("resnet18"), "aoti_dynamic", tmp_path / "model.pt2")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "package"), [("executorch", "executorch"), ("litert", "litert_torch")])
def test_runtimes_of_small_devices_give_the_same_logits(kind, package, tmp_path):
    pytest.importorskip(package, reason=f"an extra (pip install {package})")
    loaded = loaded_with_varied_weights("debiformer_nano", model_kwargs={"depths": (1, 1, 1, 1)})
    assert export.export(loaded, kind, tmp_path / "model") < 1e-4


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TensorRT builds for a GPU, and there is none")
def test_tensorrt_gives_the_same_logits_for_any_batch_and_image_size(tmp_path):
    pytest.importorskip("tensorrt", reason="TensorRT is an extra (pip install tensorrt)")
    loaded = loaded_with_varied_weights("debiformer_nano")
    assert export.export(loaded, "tensorrt", tmp_path / "model.engine") < 1e-4


@pytest.mark.parametrize(
    ("kind", "words"),
    [("aoti", r"g\+\+, which is missing"), ("tensorrt", "for the GPU it finds, and finds none")],
)
def test_what_a_format_needs_of_the_machine_is_named(kind, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(export, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match=rf"^--format {kind} .*{words}") as error:
        export.export(load_model("debiformer_nano"), kind, tmp_path / "model")
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_modules_of_a_model_in_sequence_are_the_model(name):
    loaded = loaded_with_varied_weights(name, input_size=64, model_kwargs={"depths": DEPTHS[name]})
    images = export.random_images(loaded, 2, (50, 71))
    modules = onnx_format.in_sequence(onnx_format.for_export(loaded.model))
    actual = functools.reduce(lambda x, module: module(x), modules, images)
    assert relative(actual, loaded.model(images)) < 1e-5


@torch.no_grad()
def test_programs_are_chained(tmp_path):
    """Parts whose values have the same names, and whose sides are known by the same symbols."""
    parts = [torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.Conv2d(4, 5, 3), torch.nn.AdaptiveAvgPool2d(1)]
    images = torch.randn(2, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    examples = [images, torch.zeros(2, 4, 11, 13), torch.zeros(2, 5, 7, 9)]
    programs = [onnx_format.exported(part, x, varied=(0, 2, 3)) for part, x in zip(parts, examples, strict=True)]
    path = tmp_path / "chain.onnx"
    onnx_format.save(onnx_format.chained(programs), (17, 19), path)
    onnx.checker.check_model(path)
    expected = torch.nn.Sequential(*parts)(images)
    assert relative(run_onnx(path, images), expected) < 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_models_of_others_are_exported_for_any_batch_size(tmp_path):
    loaded = load_model("mobilenetv3_small_050", input_size=64)
    assert export.export(loaded, "onnx", tmp_path / "model.onnx") < 1e-4


@pytest.mark.parametrize("kind", ["onnx", "openvino", "tensorrt"])
def test_packages_that_are_missing_are_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=rf"--format {kind} needs onnxscript: pip install onnxscript$"):
        export.export(load_model("debiformer_nano"), kind, tmp_path / "model")


def test_model_that_torch_cannot_export_is_reported_in_one_line(tmp_path):
    loaded = load_model("debiformer_nano")
    loaded.model.head.forward = lambda x: x if x.sum() > 0 else -x
    with pytest.raises(UsageError, match=r"^torch\.onnx cannot export debiformer_nano: .+") as error:
        export.export(loaded, "onnx", tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


# -- safetensors


@torch.no_grad()
def test_safetensors_load_into_timm(checkpoint, tmp_path):
    loaded = load_model("debiformer_nano", str(checkpoint))
    path = tmp_path / "model.safetensors"
    assert export.export(loaded, "safetensors", path) < 1e-6
    with safetensors.safe_open(path, "pt") as file:
        description = {name: json.loads(value) for name, value in file.metadata().items()}
    assert description["classes"] == list(CLASSES)
    assert description["input_size"] == 32
    twin = timm.create_model(
        description["model"],
        num_classes=4,
        img_size=description["input_size"],
        checkpoint_path=path,
        **description["model_kwargs"],
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin.eval()(images), loaded.model(images))
    weights = weights_of(torch.load(checkpoint, weights_only=True), checkpoint)
    assert all(torch.equal(value, weights[name]) for name, value in twin.state_dict().items())
    again = load_model("debiformer_nano", str(path))
    assert (again.labels, again.options.input_size) == (list(CLASSES), 32)
    assert torch.equal(again.model(images), loaded.model(images))


# -- Hugging Face


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_timm_builds_every_family_from_an_exported_folder(name, tmp_path):
    loaded = loaded_with_varied_weights(name, input_size=64)
    export.export(loaded, "hf", tmp_path / "repo")
    twin = timm.create_model(f"local-dir:{tmp_path / 'repo'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(twin(images), loaded.model(images))


@torch.no_grad()
def test_hugging_face_folder_says_all_about_a_trained_model(checkpoint, tmp_path):
    loaded = load_model("debiformer_nano", str(checkpoint))
    folder = tmp_path / "repo"
    export.export(loaded, "hf", folder)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "debiformer_nano"
    assert config["label_names"] == list(CLASSES)
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    twin = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(images), loaded.model(images))
    assert config["pretrained_cfg"]["tag"] == ""
    assert "arxiv:2410.08582" in (folder / "README.md").read_text()
    data = timm.data.resolve_model_data_config(twin)
    assert (data["input_size"], data["crop_pct"]) == ((3, 32, 32), 0.875)
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert torch.equal(tuned.stages[0][0].attn1.wo.weight, loaded.model.stages[0][0].attn1.wo.weight)
    assert tuned.head.out_features == 7


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_exported_files_have_the_permissions_of_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for kind in ("safetensors", "hf"):
            export.export(load_model("debiformer_nano"), kind, tmp_path / kind)
    finally:
        os.umask(before)
    files = [tmp_path / "safetensors", *(tmp_path / "hf").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


# -- what is refused


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1)
    for kind in ("safetensors", "hf"):
        with pytest.raises(UsageError, match=r"off by .* not kept"):
            export.export(load_model("debiformer_nano"), kind, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_folders_and_files_in_the_way(tmp_path):
    loaded = load_model("debiformer_nano")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for kind, name, words in (
        ("hf", "full", "exists already"),
        ("hf", "full/file", "exists already"),
        ("safetensors", "full", "is a folder"),
        ("safetensors", "full/file/model", "cannot write"),
    ):
        with pytest.raises(UsageError, match=words):
            export.export(loaded, kind, tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["file"]
    (tmp_path / "empty").mkdir()
    export.export(loaded, "hf", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--format", "tflite", "--output", "x"], "invalid choice: 'tflite'"),
        (["--format", "hf"], "--output"),
        (["--output", "x"], "--format"),
    ],
)
def test_bad_command_lines_get_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        export.main(["--model", "debiformer_nano", *argv])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_command_prints_and_ends_as_documented(tmp_path):
    run = ["-m", "tools.export", "--model", "debiformer_nano", "--format", "safetensors", "--output"]
    printed = command(*run, tmp_path / "new" / "model.safetensors")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout.splitlines()[0] == UNTRAINED
    assert f"Wrote {tmp_path}/new/model.safetensors" in printed.stdout
    printed = command(*run, tmp_path)
    assert printed.returncode == 2
    assert printed.stderr.startswith(f"tools.export: error: {tmp_path} is a folder")
    assert len(printed.stderr.splitlines()) == 1
