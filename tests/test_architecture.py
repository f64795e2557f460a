"""Imports run one way: hydra_main -> main -> engine, data, models, visualize -> ops, errors -> libraries."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import command

ROOT = Path(__file__).parent.parent
NOT_SOURCE = {"data", "outputs", "tests"}
RUN_MODULES = {"main", "hydra_main"}
BELOW_MAIN = ("engine", "datasets", "eval_sets", "optim_factory", "utils", "options", "errors")


def source_files() -> list[Path]:
    """Every Python file of the project but its tests, relative to the root."""
    files = (path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
    return sorted(path for path in files if path.parts[0] not in NOT_SOURCE and "site-packages" not in path.parts)


def imported_modules(path: Path, text: str) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, also inside functions; relative ones resolved."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module or "."
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


FILES = source_files()
IMPORTS = {path: set(imported_modules(path, (ROOT / path).read_text())) for path in FILES}
PROJECT = {path.parts[0].removesuffix(".py") for path in FILES}


def imports_of_project(path: Path) -> set[str]:
    """Top-level modules and folders of this project that a file imports, its own folder left out."""
    return {name.split(".")[0] for name in IMPORTS[path]} & PROJECT - {path.parts[0].removesuffix(".py")}


def files_in(folder: str) -> list[Path]:
    files = [path for path in FILES if path.parts[0] == folder]
    assert files, f"{folder} has no Python files"
    return files


def test_imports_are_read_as_python_resolves_them():
    text = "import a.b, c as d\nfrom . import e\nfrom .f import g\nfrom ..h import i\ndef f():\n    from j.k import l\n"
    found = set(imported_modules(Path("top/inner/file.py"), text))
    assert found == {"a.b", "c", "top.inner", "top.inner.e", "top.inner.f", "top.inner.f.g"} | {
        *("top.h", "top.h.i", "j.k", "j.k.l")
    }


def test_the_reader_sees_the_known_imports_of_this_project():
    assert {"ops", "models", "dense"} <= PROJECT
    assert imports_of_project(Path("models/attention.py")) == {"ops"}
    assert imports_of_project(Path("models/weights/reading.py")) == set()
    assert imports_of_project(Path("dense/pyramid.py")) == {"models"}


@pytest.mark.parametrize("path", files_in("ops"), ids=str)
def test_ops_import_nothing_of_the_project(path):
    assert imports_of_project(path) == set()


def test_errors_import_nothing_of_the_project():
    assert imports_of_project(Path("errors.py")) == set()


@pytest.mark.parametrize("path", files_in("models"), ids=str)
def test_models_import_only_ops(path):
    assert imports_of_project(path) <= {"ops"}


@pytest.mark.parametrize("path", files_in("runtime"), ids=str)
def test_runtime_imports_only_what_lies_below(path):
    assert imports_of_project(path) <= {"errors", "options", "utils"}


@pytest.mark.parametrize("name", BELOW_MAIN)
def test_modules_below_main_never_import_a_run(name):
    assert imports_of_project(Path(f"{name}.py")) & RUN_MODULES == set()


@pytest.mark.parametrize("path", files_in("runtime"), ids=str)
def test_runtime_never_imports_a_run(path):
    assert imports_of_project(path) & (RUN_MODULES | {"engine", "tools", "visualize"}) == set()


@pytest.mark.parametrize("path", files_in("visualize"), ids=str)
def test_visualize_imports_only_models_and_what_lies_below(path):
    assert imports_of_project(path) <= {"datasets", "errors", "models", "ops", "runtime"}


def test_only_main_and_benchmarks_import_visualize():
    users = {path for path in FILES if "visualize" in imports_of_project(path)}
    assert {path for path in users if path.parts[0] != "benchmarks"} == {Path("main.py")}


def test_a_run_loads_visualize_only_when_asked():
    script = "import sys, main; sys.exit('visualize' in sys.modules or 'matplotlib' in sys.modules)"
    assert command("-c", script).returncode == 0


@pytest.mark.parametrize("path", files_in("runtime"), ids=str)
def test_runtime_imports_only_errors_and_what_a_job_runs(path):
    allowed = {"main", "options", "errors"} if path.name == "submitit_job.py" else {"errors"}
    assert imports_of_project(path) <= allowed


def test_main_does_not_know_hydra():
    assert "hydra_main" not in imports_of_project(Path("main.py"))


def test_tools_stand_above_all_others():
    assert [str(path) for path in FILES if "tools" in imports_of_project(path)] == []


def test_only_triton_files_import_triton():
    users = {path for path, names in IMPORTS.items() if "triton" in {name.split(".")[0] for name in names}}
    assert [str(path) for path in users if not path.name.endswith("_triton.py")] == []
