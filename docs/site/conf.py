"""The documents as a site: `make site`. Pages are the Markdown files of the repository, where they are."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = "DeBiFormer and BiFormer"
author = "the authors of this implementation"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "INSTALL.md", "CONTRIBUTING.md", "docs/*.md", "docs/tutorials/*.md"]
include_patterns += ["benchmarks/results/*.md"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 3

MEASURED = sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md") if path.stem != "README")
CONTENTS = {
    "Start": ["INSTALL"],
    "Tutorials": {
        "Reproduce": "docs/tutorials/reproduce",
        "Fine-tune": "docs/tutorials/fine-tune",
        "Segment and detect": "docs/DENSE",
        "Export": "docs/EXPORT",
        "Your own attention": "docs/EXTENDING",
        "Distillation": "docs/DISTILLATION",
        "Token labelling": "docs/TOKEN_LABELING",
        "Cluster": "docs/tutorials/cluster",
    },
    "Reference": ["docs/OPTIONS", "docs/ARCHITECTURE", "docs/FIDELITY", "CONTRIBUTING"],
    "Measured": [f"benchmarks/results/{name}" for name in ["README", *MEASURED]],
}
"""What the sidebar lists, by its captions; documents that are not here come under the reference."""


def contents() -> str:
    """Return the sidebar as MyST's toctrees."""
    trees, listed = [], str(CONTENTS)
    others = [
        page for page in sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")) if page not in listed
    ]
    for caption, pages in {**CONTENTS, "Reference": CONTENTS["Reference"] + others}.items():
        lines = [f"{title} <{page}>" for title, page in pages.items()] if isinstance(pages, dict) else pages
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```"]))
    return "\n\n" + "\n\n".join(trees) + "\n"


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the sidebar, without which Sphinx finds no other."""
    if page == root_doc:
        source[0] += contents()


def open_at_index(app: Sphinx, error: Exception | None) -> None:
    """Have the folder open at the first page."""
    if error is None:
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.connect("build-finished", open_at_index)
