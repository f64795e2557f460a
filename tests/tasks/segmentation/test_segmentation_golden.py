"""Heads, losses, windows and metric agree with reference values in float64."""

import numpy as np
import pytest
import torch
from golden_dense import Golden, array, fill
from torch import nn

from tasks.segmentation.heads import FPN, FCNHead, SemanticFPNHead, UPerHead, resize
from tasks.segmentation.inference import sliding_window, windows
from tasks.segmentation.metric import ConfusionMatrix
from tasks.segmentation.model import AUXILIARY_WEIGHT, Segmenter, pixel_cross_entropy

GOLDEN = Golden("segmentation.npz")
CLASSES, WIDTHS = 7, (16, 32, 64, 128)
SIZES = ((20, 28), (10, 14), (5, 7), (3, 4))


class TinyBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 7, stride=4, padding=3)
        self.c2, self.c3, self.c4 = (nn.Conv2d(a, 2 * a, 3, stride=2, padding=1) for a in (16, 32, 64))

    def forward(self, x):
        maps = []
        for conv in (self.c1, self.c2, self.c3, self.c4):
            x = conv(x).relu()
            maps.append(x)
        return maps


def features():
    return [
        torch.from_numpy(array(f"seg.c{i + 2}", (2, width, *size))).requires_grad_()
        for i, (width, size) in enumerate(zip(WIDTHS, SIZES, strict=True))
    ]


class Necked(nn.Module):
    def __init__(self):
        super().__init__()
        self.neck, self.head = (
            fill(FPN(WIDTHS, 32), "neck."),
            fill(SemanticFPNHead(32, 16, CLASSES, 0.0), "decode_head."),
        )

    def forward(self, maps):
        return self.head(self.neck(maps))


HEADS = {
    "uper": lambda: fill(UPerHead(WIDTHS, 32, CLASSES, dropout=0.0), "decode_head."),
    "fpnhead": Necked,
    "aux": lambda: fill(FCNHead(64, 16, CLASSES, dropout=0.0), "auxiliary_head."),
}


def run_head(name, module, maps):
    return module(maps[2] if name == "aux" else maps)


@pytest.mark.parametrize("name", HEADS)
def test_head_matches_reference_logits_loss_and_gradients(name):
    module, maps = HEADS[name](), features()
    GOLDEN.expect(run_head(name, module.eval(), maps), f"{name}.eval.logits")

    logits = run_head(name, module.train(), maps)
    GOLDEN.expect(logits, f"{name}.train.logits")
    labels = torch.from_numpy(GOLDEN["labels"]).long()
    loss = pixel_cross_entropy(resize(logits, labels.shape[1:]), labels)
    loss = loss * (AUXILIARY_WEIGHT if name == "aux" else 1)
    GOLDEN.expect(loss, f"{name}.train.loss_ce")
    loss.backward()
    for key, parameter in module.named_parameters():
        GOLDEN.expect_gradient(parameter.grad, f"{name}.grad.{key.removeprefix('head.')}")
    for key, buffer in module.named_buffers():
        if f"{name}.after.{key.removeprefix('head.')}" in GOLDEN:
            GOLDEN.expect(buffer, f"{name}.after.{key.removeprefix('head.')}")


def test_fpn_matches_reference_maps():
    for number, found in enumerate(fill(FPN(WIDTHS, 32), "neck.")(features())):
        GOLDEN.expect(found, f"neck.out{number}")


def segmenter(name):
    backbone = fill(TinyBackbone(), "backbone.")
    aux_width = 32 if name == "fpnhead" else 64
    auxiliary = fill(FCNHead(aux_width, 16, CLASSES, dropout=0.0), "auxiliary_head.")
    if name == "uper":
        return Segmenter(backbone, HEADS["uper"](), auxiliary)
    necked = Necked()
    return Segmenter(backbone, necked.head, auxiliary, necked.neck)


@pytest.mark.parametrize("name", ["uper", "fpnhead"])
def test_segmenter_matches_reference_losses_and_gradients(name):
    model = segmenter(name).train()
    labels = torch.from_numpy(GOLDEN["labels"]).long()
    logits, auxiliary = model(torch.from_numpy(array("seg.images2", (2, 3, 80, 112))))
    main, other = pixel_cross_entropy(logits, labels), AUXILIARY_WEIGHT * pixel_cross_entropy(auxiliary, labels)
    GOLDEN.expect(main, f"segmentor.{name}.loss.decode.loss_ce")
    GOLDEN.expect(other, f"segmentor.{name}.loss.aux.loss_ce")
    (main + other).backward()
    for key, parameter in model.backbone.named_parameters():
        GOLDEN.expect_gradient(parameter.grad, f"segmentor.{name}.grad.backbone.{key}")


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("name", ["uper", "fpnhead"])
@torch.no_grad()
def test_inference_matches_reference(name, mode):
    model = segmenter(name).eval()
    image = torch.from_numpy(array("seg.image", (1, 3, 80, 112)))
    boxes = [tuple(box) for box in GOLDEN["infer.slide.windows_y1x1y2x2"].tolist()]
    crop = (boxes[0][2], boxes[0][3])
    stride = (next(b[0] for b in boxes if b[0]), next(b[1] for b in boxes if b[1]))
    if mode == "slide":
        assert list(windows((80, 112), crop, stride)) == boxes
    logits = model(image) if mode == "whole" else sliding_window(model, image, crop, stride)
    GOLDEN.expect(logits[..., ::6, ::6], f"infer.{name}.{mode}.logits_every6")
    np.testing.assert_array_equal(logits.argmax(1).numpy(), GOLDEN[f"infer.{name}.{mode}.argmax"])
    original = resize(logits, (100, 140))
    GOLDEN.expect(original[0, :, ::10, ::10], f"infer.{name}.{mode}.ori_size_logits_every10")


def test_confusion_matrix_matches_reference():
    matrix = ConfusionMatrix(CLASSES)
    for predicted, labels in zip(GOLDEN["metric.pred"], GOLDEN["metric.gt"], strict=True):
        matrix.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    found = matrix.compute()
    expected = GOLDEN["metric.mIoU_mAcc_aAcc_percent"]
    np.testing.assert_allclose([found["mIoU"], found["mAcc"], found["aAcc"]], expected, rtol=1e-6)
