"""The models for torch.hub: torch.hub.load(FOLDER, "debiformer_tiny", source="local"), or from a GitHub repository.

Arguments go to the model, e.g. pretrained=True, num_classes=10.
"""

import importlib.util
import pathlib
import re
import sys
import types

import timm

dependencies = ["torch", "timm"]


def _load_package() -> types.ModuleType:
    """Import models/ of this folder as `debiformer`, so that a user's own `models` neither hides it nor is hidden.

    Returns: the package; the one that the process has already, if it is of this folder or of the same version.
    Raises: ImportError: the process has another version.
    """
    init = pathlib.Path(__file__).resolve().parent / "models" / "__init__.py"
    version = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE)[1]
    for name in ("debiformer", "models"):
        loaded = sys.modules.get(name)
        place = pathlib.Path(getattr(loaded, "__file__", None) or "").resolve()
        if place == init or (name == "debiformer" and getattr(loaded, "__version__", None) == version):
            return loaded
        if name == "debiformer" and loaded is not None:
            raise ImportError(f"debiformer {version} is to be loaded, but another one is imported from {place.parent}")
    spec = importlib.util.spec_from_file_location("debiformer", init)
    sys.modules["debiformer"] = package = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["debiformer"]
        raise
    return package


globals().update({name: timm.model_entrypoint(name) for name in _load_package().MODEL_NAMES})
