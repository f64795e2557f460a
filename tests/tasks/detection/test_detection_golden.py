"""Mask R-CNN and RetinaNet agree with reference values in float64."""

import numpy as np
import pytest
import torch
from golden_dense import Golden, array, drawn
from torch import nn

from tasks.detection.mask_rcnn import mask_targets, paste_masks
from tasks.detection.model import mask_rcnn, retinanet

WIDTHS = [16, 32, 64, 128]
SIZES = [(40, 56), (20, 28), (10, 14), (5, 7)]
PUBLISHED = {
    "backbone.fpn.inner_blocks.{i}.0": "neck.lateral_convs.{i}.conv",
    "backbone.fpn.layer_blocks.{i}.0": "neck.fpn_convs.{i}.conv",
    "backbone.fpn.extra_blocks.p6": "neck.fpn_convs.3.conv",
    "backbone.fpn.extra_blocks.p7": "neck.fpn_convs.4.conv",
    "rpn.head.conv.0.0": "rpn_head.rpn_conv",
    "rpn.head.cls_logits": "rpn_head.rpn_cls",
    "rpn.head.bbox_pred": "rpn_head.rpn_reg",
    "roi_heads.box_head.fc6": "roi_head.bbox_head.shared_fcs.0",
    "roi_heads.box_head.fc7": "roi_head.bbox_head.shared_fcs.1",
    "roi_heads.mask_head.{i}.0": "roi_head.mask_head.convs.{i}.conv",
    "roi_heads.mask_predictor.conv5_mask": "roi_head.mask_head.upsample",
    "head.classification_head.conv.{i}.0": "bbox_head.cls_convs.{i}.conv",
    "head.classification_head.cls_logits": "bbox_head.retina_cls",
    "head.regression_head.conv.{i}.0": "bbox_head.reg_convs.{i}.conv",
    "head.regression_head.bbox_reg": "bbox_head.retina_reg",
}
NAMES = {ours.format(i=i): theirs.format(i=i) for ours, theirs in PUBLISHED.items() for i in range(5)}
PREDICTORS = {
    "roi_heads.box_predictor.cls_score": ("roi_head.bbox_head.fc_cls", lambda w: w.roll(1, 0)),
    "roi_heads.box_predictor.bbox_pred": (
        "roi_head.bbox_head.fc_reg",
        lambda w: torch.cat([torch.zeros_like(w[:4]), w]),
    ),
    "roi_heads.mask_predictor.mask_fcn_logits": (
        "roi_head.mask_head.conv_logits",
        lambda w: torch.cat([torch.zeros_like(w[:1]), w]),
    ),
}


class Features(nn.Module):
    """Stands for a backbone: the reference feature maps, whatever the images."""

    def __init__(self, scale):
        super().__init__()
        shapes = [(3, width, *size) for width, size in zip(WIDTHS, SIZES, strict=True)]
        maps = [torch.from_numpy(array(f"det.c{i + 2}", shape, scale)) for i, shape in enumerate(shapes)]
        self.maps = [x.requires_grad_() for x in maps]

    def forward(self, images):
        return self.maps


@torch.no_grad()
def filled(model):
    for name, value in model.double().named_parameters():
        module, _, kind = name.rpartition(".")
        if module in PREDICTORS:
            theirs, adapt = PREDICTORS[module]
            rows = value.shape[0] * 3 // 4 if kind and module.endswith(("bbox_pred", "mask_fcn_logits")) else len(value)
            value.copy_(adapt(drawn(f"{theirs}.{kind}", (rows, *value.shape[1:]))))
        else:
            value.copy_(drawn(f"{NAMES[module]}.{kind}", value.shape))
    return model


def targets_of(golden, first_label):
    targets = []
    for number in range(3):
        boxes = torch.from_numpy(golden[f"gt{number}.bboxes"])
        masks = np.unpackbits(golden[f"gt{number}.masks_packbits"])[: len(boxes) * 160 * 224]
        targets.append(
            {
                "boxes": boxes.view(-1, 4),
                "labels": torch.from_numpy(golden[f"gt{number}.labels"]) + first_label,
                "masks": torch.from_numpy(masks.reshape(-1, 160, 224)),
            }
        )
    return targets


def images_of(golden):
    sizes = [golden[f"meta{number}.img_pad_ori_hw"][0] for number in range(3)]
    return [torch.zeros(3, *size, dtype=torch.float64) for size in sizes]


@pytest.fixture(scope="module")
def golden():
    return Golden("detection.npz")


def all_sampled(model):
    model.rpn.fg_bg_sampler.batch_size_per_image = model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    model.roi_heads.fg_bg_sampler.positive_fraction = 1.0
    model.rpn.fg_bg_sampler.positive_fraction = 0.5
    return model


@pytest.fixture
def model():
    return all_sampled(filled(mask_rcnn(Features(1.0), WIDTHS, 3)))


def prepared(model, golden, first_label=1):
    images, targets = model.transform(images_of(golden), targets_of(golden, first_label))
    return images, model.backbone(images.tensors), targets


def fixed_proposals(golden):
    return [torch.from_numpy(golden[f"roi.fixed_proposals{number}"]) for number in range(3)]


def test_pyramid_and_proposal_head_match_reference(model, golden):
    _, maps, _ = prepared(model, golden)
    logits, codes = model.rpn.head(list(maps.values()))
    for level, x in enumerate(maps.values()):
        golden.expect(x, f"fpn.p{level + 2}")
        golden.expect(logits[level], f"rpn.cls.l{level}")
        golden.expect(codes[level], f"rpn.reg.l{level}")


def test_anchors_and_their_targets_match_reference(model, golden):
    images, maps, targets = prepared(model, golden)
    anchors = model.rpn.anchor_generator(images, list(maps.values()))
    golden.expect(anchors[0], "rpn.anchors.img0")
    labels, boxes = model.rpn.assign_targets_to_anchors(anchors, targets)
    wanted = torch.from_numpy(golden["rpn.target.labels"])  # 0 object, 1 background
    used = torch.from_numpy(golden["rpn.target.label_weights"]) > 0
    for number, label in enumerate(labels):
        assert torch.equal(label >= 0, used[number])
        assert torch.equal(label[used[number]] == 1, wanted[number][used[number]] == 0)
    codes = model.rpn.box_coder.encode(boxes, anchors)
    image, anchor = torch.from_numpy(golden["rpn.target.pos_img_anchor_index"]).long().unbind(1)
    golden.expect(torch.stack(codes)[image, anchor], "rpn.target.pos_bbox_targets")


def test_proposal_losses_match_reference(model, golden):
    images, maps, targets = prepared(model.train(), golden)
    _, losses = model.rpn(images, maps, targets)
    golden_sums = {name: golden[f"rpn.{name}.per_level"].sum() for name in ("loss_rpn_cls", "loss_rpn_bbox")}
    np.testing.assert_allclose(losses["loss_objectness"].item(), golden_sums["loss_rpn_cls"], rtol=1e-9)
    np.testing.assert_allclose(losses["loss_rpn_box_reg"].item(), golden_sums["loss_rpn_bbox"], rtol=1e-9)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_proposals_match_reference(model, golden, mode):
    images, maps, targets = prepared(model.train(mode == "train"), golden)
    boxes, _ = model.rpn(images, maps, targets)
    for number, found in enumerate(boxes):
        assert len(found) == golden[f"rpn.proposals_{mode}.img{number}.count"]
        golden.expect(found[:200], f"rpn.proposals_{mode}.img{number}.bboxes")


def test_box_and_mask_losses_match_reference(model, golden):
    images, maps, targets = prepared(model.train(), golden)
    _, losses = model.roi_heads(maps, fixed_proposals(golden), images.image_sizes, targets)
    golden.expect(losses["loss_classifier"], "roi.loss_cls")
    golden.expect(losses["loss_box_reg"], "roi.loss_bbox")
    golden.expect(losses["loss_mask"], "roi.loss_mask")


def test_pooled_features_and_mask_targets_match_reference(model, golden):
    images, maps, targets = prepared(model, golden)
    rois = torch.from_numpy(golden["roi.rois"])
    boxes = [rois[rois[:, 0] == number, 1:] for number in range(3)]
    golden.expect(model.roi_heads.box_roi_pool(maps, boxes, images.image_sizes), "roi.bbox_feats")
    found = []
    for number in range(3):
        match = torch.from_numpy(golden[f"roi.sampling{number}.pos_gt_index"])
        found.append(mask_targets(targets[number]["masks"], boxes[number][: len(match)], match, 28))
    wanted = np.unpackbits(golden["roi.mask_targets_packbits"])[: torch.cat(found).numel()]
    np.testing.assert_array_equal(torch.cat(found).flatten().numpy(), wanted)


def test_gradients_of_the_total_loss_match_reference(model, golden):
    images, maps, targets = prepared(model.train(), golden)
    _, losses = model.rpn(images, maps, targets)
    _, others = model.roi_heads(maps, fixed_proposals(golden), images.image_sizes, targets)
    total = sum({**losses, **others}.values())
    golden.expect(total, "total_loss")
    total.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        key = f"total.grad.{NAMES.get(module, PREDICTORS.get(module, ('',))[0])}.{kind}"
        if key in golden:
            golden.expect_gradient(parameter.grad, key)
            checked += 1
    assert checked > 10


def ranked(scores, boxes):
    """Order by falling score; equal scores, whose order is nobody's, by place."""
    scores, boxes = np.asarray(scores).round(9), np.asarray(boxes)
    return np.lexsort((*boxes.T, -scores))


@pytest.mark.parametrize("proposals", ["fixed", "rpn"])
@torch.no_grad()
def test_detections_match_reference(model, golden, proposals):
    images, maps, _ = prepared(model.eval(), golden)
    boxes = fixed_proposals(golden) if proposals == "fixed" else model.rpn(images, maps)[0]
    results, _ = model.roi_heads(maps, boxes, images.image_sizes)
    for number, result in enumerate(results):
        name = f"test.{proposals}.input_scale.img{number}"
        assert len(result["boxes"]) == golden[f"{name}.count"]
        golden.expect(result["scores"], f"{name}.scores")
        order, wanted = ranked(result["scores"], result["boxes"]), golden[f"{name}.bboxes"]
        wanted = wanted[ranked(golden[f"{name}.scores"], wanted)]
        np.testing.assert_allclose(result["boxes"].numpy()[order], wanted, rtol=1e-9, atol=1e-9)
        masks = paste_masks(result["masks"], result["boxes"], images.image_sizes[number])
        box = result["boxes"]
        full = ((box[:, 2:] - box[:, :2]) > 1e-3).all(1)
        np.testing.assert_allclose(masks.sum((1, 2))[full], golden[f"{name}.mask_areas"][full], atol=2)
        first = np.unpackbits(golden[f"{name}.masks5_packbits"])[: masks[:5].numel()]
        differ = masks[:5] != torch.from_numpy(first.astype(bool)).view_as(masks[:5])
        assert differ[full[:5]].double().mean() < 1e-4


@pytest.fixture(scope="module")
def retina_golden():
    return Golden("retinanet.npz")


def test_retinanet_outputs_losses_and_gradients_match_reference(retina_golden):
    golden = retina_golden
    model = filled(retinanet(Features(0.04), WIDTHS, 3)).train()
    images, maps, targets = prepared(model, golden, first_label=0)
    maps = list(maps.values())
    outputs, anchors = model.head(maps), model.anchor_generator(images, maps)
    for level, x in enumerate(maps):
        golden.expect(x, f"fpn.p{level + 3}")
    golden.expect(anchors[0], "retina.anchors.img0")
    losses = model.compute_loss(targets, outputs, anchors)
    np.testing.assert_allclose(losses["classification"].item(), golden["loss_cls.per_level"].sum(), rtol=1e-9)
    np.testing.assert_allclose(losses["bbox_regression"].item(), golden["loss_bbox.per_level"].sum(), rtol=1e-9)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if f"total.grad.{NAMES[module]}.{kind}" in golden:
            golden.expect_gradient(parameter.grad, f"total.grad.{NAMES[module]}.{kind}")


@torch.no_grad()
def test_retinanet_detections_match_reference(retina_golden):
    golden = retina_golden
    model = filled(retinanet(Features(0.04), WIDTHS, 3)).eval()
    for number, result in enumerate(model(images_of(golden))):
        name = f"test.input_scale.img{number}"
        assert len(result["boxes"]) == golden[f"{name}.count"]
        golden.expect(result["boxes"], f"{name}.bboxes")
        golden.expect(result["scores"], f"{name}.scores")
        golden.expect(result["labels"], f"{name}.labels")
