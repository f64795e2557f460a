"""Heads beside those of transformers."""

import torch
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from tasks.segmentation.heads import FCNHead, UPerHead

WIDTHS = (8, 16, 24, 32)
RENAMED = {".bn.": ".batch_norm.", "conv_seg.": "classifier."}
"""What the published names, which are ours, are called there."""


def maps():
    return [torch.randn(2, width, 26 >> level, 37 >> level) for level, width in enumerate(WIDTHS)]


def with_statistics(module):
    """A module in evaluation, whose BatchNorm has statistics of maps that it has seen."""
    for _ in range(3):
        module.train()(maps())
    return module.eval()


def moved(theirs, ours):
    weights = ours.state_dict()
    for name, other in RENAMED.items():
        weights = {key.replace(name, other): value for key, value in weights.items()}
    theirs.load_state_dict(weights)
    return theirs.eval()


@torch.no_grad()
def test_upernet_gives_what_transformers_gives_with_the_same_weights():
    torch.manual_seed(0)
    config = UperNetConfig(hidden_size=12, num_labels=5, auxiliary_channels=10, auxiliary_in_channels=WIDTHS[2])
    head = with_statistics(UPerHead(WIDTHS, 12, 5))
    auxiliary = FCNHead(WIDTHS[2], 10, 5).eval()
    seen = maps()
    expected = moved(UperNetHead(config, list(WIDTHS)), head)(seen)
    assert expected.shape == (2, 5, 26, 37)
    assert expected.std() > 0.1
    torch.testing.assert_close(head(seen), expected, rtol=0, atol=1e-5)
    expected = moved(UperNetFCNHead(config, in_channels=WIDTHS), auxiliary)(seen)
    torch.testing.assert_close(auxiliary(seen[2]), expected, rtol=0, atol=1e-5)
