"""The models installed as `debiformer`, or loaded by torch.hub, beside folders that use the same names."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from models import MODEL_NAMES, __version__

NAMES_OF_USERS = ("models", "ops", "utils", "datasets")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip install .` builds and installs."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "models", source / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built, source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of a new environment with the package in it, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    path = folder / "bin" / "python"
    pip("--python", path, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    return path


@pytest.fixture
def folder_of_user(tmp_path):
    """A folder that has the names of this project's top folder in use."""
    (tmp_path / "models").mkdir()
    for name in ("models/__init__.py", "ops.py", "utils.py", "datasets.py"):
        (tmp_path / name).write_text("whose = 'the user'")
    return tmp_path


def pip(*argv):
    argv = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, argv)]
    finished = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def run(python, folder, script):
    """Run a script that lies in a folder, as users run theirs; returns its last line on stderr, "" if it succeeds."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run([python, path], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return finished.stderr.strip().rpartition("\n")[2] if finished.returncode else ""


def check_users_names() -> str:
    return "".join(f"import {name}; assert {name}.whose == 'the user'\n" for name in NAMES_OF_USERS)


def test_wheel_takes_one_name_and_holds_every_module(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names} == {"debiformer", f"debiformer-{__version__}.dist-info"}
    modules = {path.relative_to(ROOT / "models") for path in (ROOT / "models").rglob("*.py")}
    installed = {name.relative_to("debiformer") for name in names if name.parts[0] == "debiformer"}
    assert installed == modules | {Path("py.typed"), Path("ops/launches.json")}


USE = f"""
import importlib.metadata, pathlib, sys
import timm, torch
import debiformer
from debiformer import ops, weights

assert pathlib.Path(debiformer.__file__).is_relative_to(sys.prefix)
assert debiformer.__version__ == importlib.metadata.version("debiformer") == {__version__!r}
assert debiformer.MODEL_NAMES == {MODEL_NAMES!r}
assert {{name for name in debiformer.MODEL_NAMES if "biformer" in name}} == set(timm.list_models("*biformer*"))
for name in debiformer.MODEL_NAMES:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
        stages = timm.create_model(name, features_only=True)
    assert model.pretrained_cfg["architecture"] == name and model.head.out_features == 3
    assert stages.feature_info.reduction() == [4, 8, 16, 32]
with torch.no_grad():
    assert timm.create_model("debiformer_nano", num_classes=3).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 3)
for_training = {{"einops", "gdown", "hydra", "matplotlib", "runtime", "sklearn", "submitit", "tasks", "tensorboard"}}
assert not for_training & sys.modules.keys(), for_training & sys.modules.keys()
"""


def test_installed_models_work_beside_a_folder_with_the_same_names(python, folder_of_user):
    assert run(python, folder_of_user, USE + check_users_names()) == ""
    assert run(python, folder_of_user, check_users_names() + "import debiformer") == ""


def test_installed_models_leave_hugging_faces_datasets_alone(python, tmp_path):
    if not any((Path(path) / "datasets").is_dir() for path in site.getsitepackages()):
        pytest.skip("Hugging Face's datasets is not installed")
    find = "import debiformer, importlib.util as i; assert 'site-packages/datasets/' in i.find_spec('datasets').origin"
    assert run(python, tmp_path, find) == ""


def test_models_and_debiformer_in_one_process_are_one_clear_error(python, tmp_path):
    """Operators can be registered once per process."""
    checkout = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    for first, second in (("models", "debiformer"), ("debiformer", "models")):
        message = run(python, tmp_path, f"{checkout}import {first}\nimport {second}")
        assert message.startswith(f"ImportError: {second} is the same package as {first}")
        assert f"import {first} only" in message


HUB = f"""
import sys, torch
path = list(sys.path)
model = torch.hub.load({str(ROOT)!r}, "debiformer_nano", source="local", num_classes=3)
again = torch.hub.load({str(ROOT)!r}, "debiformer_nano", source="local", num_classes=3)
assert type(again) is type(model) and sys.path == path
with torch.no_grad():
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
"""


def test_hub_works_beside_a_folder_with_the_same_names(folder_of_user):
    assert run(sys.executable, folder_of_user, HUB + check_users_names()) == ""
    assert run(sys.executable, folder_of_user, check_users_names() + HUB) == ""


def test_hub_and_installed_models_of_one_version_are_one(python, tmp_path):
    same = "import debiformer\nassert isinstance(model, debiformer.DeBiFormer)\n"
    assert run(python, tmp_path, f"import debiformer\n{HUB}{same}") == ""
    assert run(python, tmp_path, HUB + same) == ""
    other = run(python, tmp_path, f"import debiformer\ndebiformer.__version__ = '0'\n{HUB}")
    assert other.startswith(f"ImportError: debiformer {__version__} is to be loaded, but another one")


def test_published_weights_in_a_folder_need_no_gdown_and_downloads_say_that_they_do(python, tmp_path):
    find = f"""
import sys, timm, torch
sys.modules["gdown"] = None  # as where it is not installed
import debiformer
from debiformer.weights import WeightsError
torch.save(timm.create_model("biformer_tiny").state_dict(), "biformer_tiny.pth")
import os
os.environ["DEBIFORMER_HOME"] = "cache"
try:
    timm.create_model("debiformer_tiny", pretrained=True)
except WeightsError as error:
    assert "gdown, which is missing; pip install" in str(error), error
    assert "python -m debiformer.releases add FILE" in str(error), error
os.environ["DEBIFORMER_RELEASES"] = {str(tmp_path)!r}
timm.create_model("biformer_tiny", pretrained=True)
"""
    assert run(python, tmp_path, find) == ""
