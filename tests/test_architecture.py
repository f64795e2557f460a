"""Imports run one way, as MAY_IMPORT pictures them."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support import command

ROOT = Path(__file__).parent.parent
NOT_SOURCE = {"data", "outputs", "tests", "build"}

BELOW_TASKS = {"models", "optim_factory", "runtime", "utils"}
BELOW_MAIN = BELOW_TASKS | {"engine", "tasks"}
MAY_IMPORT = {
    "models": set(),
    "runtime": {"models", "utils"},
    "utils": {"runtime"},
    "optim_factory": {"models", "runtime", "utils"},
    "tasks": BELOW_TASKS,
    "datasets": {"tasks"},
    "engine": {"models", "runtime", "tasks", "utils"},
    "main": BELOW_MAIN | {"visualize"},
    "hydra_main": BELOW_MAIN | {"main"},
    "hubconf": {"models"},
    "slurm": set(),
    "docs": set(),
    "visualize": BELOW_MAIN | {"tools"},
    "tools": BELOW_MAIN,
    "benchmarks": BELOW_MAIN | {"main", "tools", "visualize"},
}
"""What each folder, and each module beside them, may import of the others."""

SEAM = {"tasks", "tasks.base", "tasks.loading", "tasks.options"}
"""Modules of tasks/ that know no task in particular."""
KNOW_TASKS = {"benchmarks", "tasks", "tools", "visualize"}
"""Who may import the others."""

EXCEPTIONS = {"runtime/submitit_job.py": {"main", "tasks"}}
"""A job's process begins in this file, which then runs main."""


# Kernels cannot be cut where they keep registers; a configuration file is one text.
LONG_FILES = {"slurm/local_cluster.py": 500}
"""Lines of files that may be longer."""


def source_files() -> list[Path]:
    """Every Python file of the project but its tests, relative to the root."""
    files = (path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
    return sorted(path for path in files if path.parts[0] not in NOT_SOURCE and "site-packages" not in path.parts)


def imported_modules(path: Path, tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, also inside functions; relative ones resolved.

    `from a import b` gives a and a.b, which may be a module or not.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module or "."
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


FILES = source_files()
IMPORTS = {path: set(imported_modules(path, ast.parse((ROOT / path).read_text()))) for path in FILES}


def top_of(path: Path) -> str:
    """The folder at the root, or the module there, that a file is of."""
    return path.parts[0].removesuffix(".py")


PROJECT = {top_of(path) for path in FILES}


def imports_of_project(path: Path) -> set[str]:
    """Top-level modules and folders of this project that a file imports, its own left out."""
    return {name.split(".")[0] for name in IMPORTS[path]} & PROJECT - {top_of(path)}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_imports_are_read_as_python_resolves_them():
    text = "import a.b, c as d\nfrom . import e\nfrom .f import g\nfrom ..h import i\ndef f():\n    from j.k import l\n"
    found = set(imported_modules(Path("top/inner/file.py"), ast.parse(text)))
    assert found == {"a.b", "c", "top.inner", "top.inner.e", "top.inner.f", "top.inner.f.g"} | {
        *("top.h", "top.h.i", "j.k", "j.k.l")
    }


def test_reader_sees_the_known_imports_of_this_project():
    assert imports_of_project(Path("models/weights/reading.py")) == set()
    assert imports_of_project(Path("hydra_main.py")) == {"main", "runtime", "tasks"}
    assert "models.ops" in IMPORTS[Path("models/attention.py")]


def test_every_folder_and_module_is_in_the_picture():
    assert set(MAY_IMPORT) == PROJECT


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_imports_only_what_the_picture_allows(path):
    allowed = MAY_IMPORT.get(top_of(path), set()) | EXCEPTIONS.get(path.as_posix(), set())
    assert imports_of_project(path) <= allowed


@pytest.mark.parametrize("path", [path for path in FILES if top_of(path) not in KNOW_TASKS], ids=str)
def test_run_knows_no_task(path):
    modules = {module_name(path) for path in FILES}
    known = {name for name in IMPORTS[path] & modules if name.split(".")[0] == "tasks"}
    assert known <= SEAM


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short_and_public_functions_typed(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LONG_FILES.get(path.as_posix(), 350)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            longest = 120 if path.name.endswith("_triton.py") or node.name == "_slurm_conf" else 60
            assert node.end_lineno - node.lineno < longest, node.name


class NotRun(ast.NodeTransformer):
    """Leaves out what is imported for annotations alone."""

    def visit_If(self, node: ast.If) -> ast.AST:
        return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else node


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path): path for path in FILES}
    trees = {name: NotRun().visit(ast.parse((ROOT / path).read_text())) for name, path in modules.items()}
    graph = {name: set(imported_modules(path, trees[name])) & modules.keys() - {name} for name, path in modules.items()}
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    for name in graph:  # `from .a import b` names the package itself, too, which is being imported anyway
        graph[name] -= {package for package in packages if name.startswith(f"{package}.")}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", [path for path in FILES if top_of(path) == "models"], ids=str)
def test_models_import_each_other_relatively(path):
    """So the folder is importable under another name."""
    absolute = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            absolute.add(node.module.split(".")[0])
    assert absolute & PROJECT == set()


def test_run_loads_visualize_only_when_asked():
    script = "import sys, main; sys.exit('visualize' in sys.modules or 'matplotlib' in sys.modules)"
    assert command("-c", script).returncode == 0


def test_only_triton_files_import_triton():
    users = {path for path, names in IMPORTS.items() if "triton" in {name.split(".")[0] for name in names}}
    assert users
    assert [str(path) for path in users if not path.name.endswith("_triton.py")] == []


WRITTEN_ONCE = {
    "build_model": "runtime/model.py",
    "load_checkpoint": "models/weights/reading.py",
    "load_for_inference": "models/weights/fitting.py",
    "normalize": "models/pixels.py",
    "open_rgb": "runtime/images.py",
}
"""Functions that everyone shares, and where they are."""


@pytest.mark.parametrize("name", WRITTEN_ONCE)
def test_shared_function_is_written_once(name):
    trees = {path.as_posix(): ast.parse((ROOT / path).read_text()) for path in FILES}
    found = [
        path
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        if node.name == name
    ]
    assert found == [WRITTEN_ONCE[name]]


@pytest.mark.parametrize("path", ["main.py", "tasks/trained.py", "visualize/subject.py"])
def test_trained_models_are_loaded_by_one_function(path):
    assert "models.weights.load_for_inference" in IMPORTS[Path(path)]
