"""Decoders of segmentation-models-pytorch."""

import debiformer  # noqa: F401
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import train
from torchmetrics.classification import MulticlassJaccardIndex


@pytest.mark.parametrize("decoder", [smp.Unet, smp.UPerNet], ids=lambda decoder: decoder.__name__)
def test_decoder_trains_and_is_evaluated(scenes, decoder):
    model = decoder("tu-debiformer_nano", encoder_weights=None, classes=3)
    loss = smp.losses.DiceLoss("multiclass")
    train(model, lambda: loss(model(scenes.images), scenes.regions))
    with torch.no_grad():
        found = model(scenes.images).argmax(1)
    counts = smp.metrics.get_stats(found, scenes.regions, mode="multiclass", num_classes=3)
    counts = [count.sum(0, keepdim=True) for count in counts]
    share = smp.metrics.iou_score(*counts, reduction="macro").item()
    expected = MulticlassJaccardIndex(3)(found, scenes.regions)
    assert share == pytest.approx(expected.item(), abs=1e-6)
    assert 0 <= share <= 1


@pytest.mark.parametrize("decoder", [smp.PAN, smp.DeepLabV3, smp.DeepLabV3Plus], ids=lambda decoder: decoder.__name__)
def test_decoders_that_dilate_are_refused_in_a_sentence(decoder):
    with pytest.raises(
        ValueError, match=r"output stride of 32, not \d+: its stages cannot be dilated; choose a decoder"
    ):
        decoder("tu-debiformer_nano", encoder_weights=None)
