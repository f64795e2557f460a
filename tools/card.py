"""What an exported folder says of its model: the README.md that timm writes, with paper, classes and figures."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from timm.models._hub import generate_readme

from .loading import Loaded

LICENSE = "mit"
"""Of this project's code."""
TASK = "image-classification"
README = Path(__file__).parents[1] / "README.md"

USAGE = """
With the package that defines the model installed (`pip install .` in its checkout):

```python
import debiformer, timm

model = timm.create_model("{source}", pretrained=True).eval()  # uploaded: "hf-hub:USER/NAME"
```

With transformers, once `debiformer` is imported: `AutoModelForImageClassification.from_pretrained("{folder}")`.
"""


def citation_of(model: str) -> str:
    """Return the BibTeX entry that README.md gives for the family of a model; "" if there is none."""
    family = model.partition("_")[0]
    found = re.search(rf"@\w+\{{[a-z]+\d{{4}}{family},\n.*?\n\}}", README.read_text(), re.DOTALL)
    return found[0] if found else ""


def model_card(loaded: Loaded) -> str:
    """Return the text of README.md for a folder of a classifier."""
    options, data, figures = loaded.options, loaded.data, loaded.figures
    paper = loaded.model.pretrained_cfg.get("paper_ids")
    details = {
        "Model Type": "Image classification / feature backbone",
        "Parameters (M)": f"{sum(value.numel() for value in loaded.model.parameters()) / 1e6:.1f}",
        "Image size": f"{options.input_size} x {options.input_size}",
        "Classes": str(len(loaded.labels)),
    }
    if paper:
        details["Papers"] = [f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}"]
    if data:  # under its own name only where the Hub knows it by that
        details["Dataset" if data == "imagenet-1k" else "Trained on"] = data
    details |= {f"Top-{name.removeprefix('acc')} (%)": f"{value:.2f}" for name, value in figures.items()}
    trained = "Trained weights" if loaded.trained else "Random, untrained weights"
    text = generate_readme(
        {
            "license": LICENSE,
            "description": f"{trained} of {options.model}. The licence is that of the code; data, and weights that the "
            "training started from, may have another.",
            "details": details,
            "usage": USAGE.format(source="local-dir:FOLDER", folder="FOLDER"),
            **({"citation": citation} if (citation := citation_of(options.model)) else {}),
        },
        options.model,
        TASK,
    )
    card = ModelCard(text)
    if paper:
        card.data.tags = [*card.data.tags, paper.lower()]
    if figures:
        card.data.metrics, card.data.model_name = ["accuracy"], options.model
        card.data.eval_results = [
            EvalResult(TASK, data or "unknown", data or "its own images", "accuracy", round(value, 3), metric_name=name)
            for name, value in figures.items()
        ]
    return str(card)
