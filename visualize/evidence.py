"""What in the picture speaks for a class: Grad-CAM and integrated gradients, by the libraries that maintain them.

Both are extras; asking for them without the library is a UsageError that says what to install.
"""

import importlib
import math
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import nn

from runtime.errors import UsageError

from . import proof, svg
from .capture import time_limit
from .images import to_tensor
from .panels import Panel
from .report import Picture
from .shapes import Heat, Scene
from .subject import Subject

IG_STEPS = 24


def _extra(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"class evidence needs {package}: pip install -r requirements-demo.txt") from error


def grad_cam(model: nn.Module, image: torch.Tensor, class_number: int) -> np.ndarray:
    """Grad-CAM (arXiv 1610.02391) on the last stage's map: (height, width) float64, from 0 to 1 at its strongest.

    image: (1, 3, height, width) as the model takes it.
    """
    library = _extra("pytorch_grad_cam", "grad-cam")
    targets = _extra("pytorch_grad_cam.utils.model_targets", "grad-cam")
    with library.GradCAM(model=model, target_layers=[model.norm]) as cam:
        weights = cam(input_tensor=image, targets=[targets.ClassifierOutputTarget(class_number)])
    return weights[0].astype(np.float64)


def integrated_gradients(
    model: nn.Module, image: torch.Tensor, class_number: int, steps: int = IG_STEPS
) -> tuple[np.ndarray, float]:
    """Integrated gradients (arXiv 1703.01365) from the mean colour to the image: (height, width) float64, and an error.

    The map is the sum of the channels' attributions; all of it sums to the difference of the logits but for the error,
    which shrinks with more steps. It need not vanish: routing switches windows along the path, without a gradient.
    """
    library = _extra("captum.attr", "captum")
    method = library.IntegratedGradients(model)
    # Its batches stay at one image: memory does not grow with the steps.
    settings = {"n_steps": steps, "internal_batch_size": 1, "return_convergence_delta": True}
    values, error = method.attribute(image, torch.zeros_like(image), class_number, **settings)
    return values[0].sum(0).detach().double().numpy(), float(error)


def evidence_panels(subject: Subject, view: Image.Image, class_number: int, seconds: float = math.inf) -> list[Panel]:
    """Both methods' panels for one class. Several threads may call it; they take turns.

    UsageError if it takes longer than `seconds`, or a library is missing.
    """
    picture, image = np.asarray(view), to_tensor(view, subject.pixels)
    name = subject.classes[class_number]
    with subject.lock, time_limit(subject.model, seconds):
        cam = grad_cam(subject.model, image, class_number)
        attribution, error = integrated_gradients(subject.model, image, class_number)
        subject.model.zero_grad(set_to_none=True)
    strength = np.minimum(np.abs(attribution), np.quantile(np.abs(attribution), 0.995))
    return [
        Panel(
            "grad_cam",
            "Grad-CAM",
            f"Where the last stage's features speak for “{name}”.",
            (Scene(heat=Heat(cam, unit="")),),
            picture,
        ),
        Panel(
            "integrated_gradients",
            "Integrated gradients",
            f"Pixels that raise or lower the logit of “{name}” against a plain grey picture, by how much, either way "
            f"({IG_STEPS} steps; the sum misses the logits' difference by {abs(error):.2g}).",
            (Scene(heat=Heat(strength, unit="logits")),),
            picture,
        ),
    ]


def trials(
    subject: Subject, view: Image.Image, class_number: int, shown: list[Panel], seconds: float = math.inf
) -> list[Picture]:
    """For the map of each panel, its deletion and insertion curves, and what the model says without its strongest part.

    UsageError if it takes longer than `seconds`.
    """
    image, size = to_tensor(view, subject.pixels), (view.height, view.width)
    values = [panel.heats[0].pixels(size) for panel in shown]
    with subject.lock, time_limit(subject.model, seconds):
        found = proof.curves(subject.model, image, class_number, values)
        before = proof.probabilities(subject.model, image)[0]
        after = [proof.without(subject.model, image, one) for one in values]
    pictures = []
    for panel, curves, left in zip(shown, found, after, strict=True):
        lines = {
            "deletion": curves.deletion,
            "insertion": curves.insertion,
            "deletion by chance": curves.random_deletion,
            "insertion by chance": curves.random_insertion,
        }
        name, other = (subject.classes[number] for number in (class_number, int(left.argmax())))
        change = f"{100 * float(before[class_number]):.1f} % → {100 * float(left[class_number]):.1f} %"
        now = "still the first" if name == other else f"now “{other}” is the first"
        without = f"Without the strongest {100 * proof.MASKED:.0f} % of the picture: “{name}” {change}, {now}."
        title = f"{panel.title}, put to the test"
        axes = f"Probability of “{name}” as the picture goes (deletion) or comes (insertion), the strongest first."
        body = svg.chart(lines, f"{title}. {curves.words}")
        pictures.append(Picture(title, f"{axes} {curves.words}", body, note=without))
    return pictures
