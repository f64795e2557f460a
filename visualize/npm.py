"""Packages of npm, fetched once into the cache of weights."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from models.weights.cache import cache_folder, receiving
from runtime.errors import UsageError

SECONDS = 300
"""After so long a fetch is given up."""


def npm_package(name: str) -> Path:
    """Return the folder of a package's newest version, or of the one that was the newest when it was first asked for.

    Args:
        name: as npm has it, such as onnxruntime-web.

    Raises:
        UsageError: npm is missing, or cannot fetch it.
        WeightsError: the cache cannot be written.
    """
    found = cache_folder() / "npm" / name
    if found.is_dir():
        return found
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(f"{name} is fetched with npm, which is missing: apt-get install npm")
    with receiving(name) as folder:
        if not found.is_dir():  # another process may have brought it while this one waited
            command = [npm, "pack", name, "--pack-destination", str(folder), "--loglevel=error", "--fetch-retries=1"]
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=SECONDS)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                code = re.search(r"code (\S+)", str(error.stderr))
                why = code[1] if code else "no answer"
                raise UsageError(f"npm cannot fetch {name} ({why}); is there a network?") from error
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
            found.parent.mkdir(exist_ok=True)
            os.replace(folder / "package", found)
    return found
