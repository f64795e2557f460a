"""The models for torch.hub: torch.hub.load(FOLDER, "debiformer_tiny", source="local"), or from a GitHub repository.

Arguments go to the model, e.g. pretrained=True, num_classes=10.
"""

import timm

import models

dependencies = ["torch", "torchvision", "timm"]
globals().update({name: timm.model_entrypoint(name) for name in models.MODEL_NAMES})
