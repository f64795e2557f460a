"""Mask R-CNN (arXiv 1703.06870) from torchvision's parts, set to the published recipe."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image, roi_align

from .boxes import Anchors, BoxCoder, Matcher, suppress

Target = dict[str, Tensor]
"""boxes (N, 4), labels (N,) int64 from 1, masks (N, H, W), size (2,): height and width without padding."""

EPSILON = torch.finfo(torch.float32).eps
"""Added to the losses' denominators by the published code."""


class RPN(RegionProposalNetwork):
    """Proposes boxes: 2000 per map before and 1000 after suppression at 0.7; L1 loss of 256 anchors per image."""

    def __init__(self, channels: int = 256, sampled: int = 256) -> None:
        strides = (4, 8, 16, 32, 64)
        anchors = Anchors(tuple((8.0 * stride,) for stride in strides), strides)
        count = anchors.num_anchors_per_location()[0]
        before, after = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}
        super().__init__(anchors, RPNHead(channels, count), 0.7, 0.3, sampled, 0.5, before, after, 0.7)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = Matcher(0.7, 0.3, floor=0.3)
        self.min_size = torch.finfo(torch.float32).tiny  # empty boxes alone are left out

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (1 object, 0 background, -1 ignored) and boxes; anchors beyond an image's own padding are ignored."""
        inside = [self.anchor_generator.inside(tuple(target["size"].tolist())) for target in targets]
        labels, boxes = [], []
        for anchor, target, flags in zip(anchors, targets, inside, strict=True):
            flags = flags.to(anchor.device)
            (label,), (box,) = super().assign_targets_to_anchors([anchor[flags]], [target])
            labels.append(anchor.new_full((len(anchor),), -1).masked_scatter_(flags, label.to(anchor)))
            boxes.append(torch.zeros_like(anchor).masked_scatter_(flags[:, None].expand_as(anchor), box.to(anchor)))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and L1, both divided by the number of sampled anchors, each kind at least one per image."""
        sampled = self.fg_bg_sampler(labels)
        count = sum(part.sum().clamp(min=1) for parts in sampled for part in parts) + EPSILON
        positive, negative = (torch.cat(parts).bool() for parts in sampled)
        label, target, used = torch.cat(labels), torch.cat(regression_targets), positive | negative
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[used], label[used], reduction="sum")
        return scores / count, (pred_bbox_deltas[positive] - target[positive]).abs().sum() / count


class RoIPool(nn.Module):
    """Features of boxes, each from the map that fits its size: aligned, with as many samples as pixels.

    Maps "0" to "3" at strides 4 to 32; output (boxes, channels, side, side).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.output_size = (side, side)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        numbers = torch.cat([box.new_full((len(box), 1), number) for number, box in enumerate(boxes)])
        rois = torch.cat([numbers, torch.cat(boxes)], dim=1)
        size = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        levels = torch.log2(size / 56 + 1e-6).floor().clamp(0, 3)
        pooled = x["0"].new_zeros(len(rois), x["0"].shape[1], *self.output_size)
        for level in range(4):
            chosen = (levels == level).nonzero().squeeze(1)
            features = x[str(level)]
            part = roi_align(features, rois[chosen].to(features), self.output_size, 1 / (4 << level), -1, aligned=True)
            pooled = pooled.index_copy(0, chosen, part)
        return pooled


class Heads(RoIHeads):
    """Classes, boxes and masks of proposals; L1 box loss, binary mask targets. sampled: proposals learnt from."""

    def __init__(self, num_classes: int, channels: int = 256, sampled: int = 512) -> None:
        outputs = num_classes + 1  # with the background, number 0
        super().__init__(
            RoIPool(7),
            TwoMLPHead(channels * 7**2, 4 * channels),
            FastRCNNPredictor(4 * channels, outputs),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sampled,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=RoIPool(14),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, outputs),
        )
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.proposal_matcher = Matcher(0.5, 0.5, floor=0.5)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation, losses in training; see torchvision's `RoIHeads`."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        found = self.postprocess_detections(logits, codes, proposals, image_shapes)
        results = [dict(zip(("boxes", "scores", "labels"), parts, strict=True)) for parts in zip(*found, strict=True)]
        masks = self._mask_logits(features, [result["boxes"] for result in results], image_shapes)
        for result, mask in zip(results, maskrcnn_inference(masks, [r["labels"] for r in results]), strict=True):
            result["masks"] = mask
        return results, {}

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image, best first."""
        counts = [len(boxes) for boxes in proposals]
        boxes = self.box_coder.decode(box_regression, proposals).split(counts)
        results = []
        for box, score, size in zip(boxes, class_logits.softmax(-1).split(counts), image_shapes, strict=True):
            row, label = (score[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
            label = label + 1
            box = clip_boxes_to_image(box[row, label], size)
            results.append(suppress(box, score[row, label], label, self.nms_thresh, self.detections_per_img))
        return tuple(map(list, zip(*results, strict=True)))

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        boxes, matches, labels, codes = self.select_training_samples(list(proposals), targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        label, code = torch.cat(labels), torch.cat(codes)
        positive = label > 0
        count = len(label) + EPSILON
        chosen = deltas.unflatten(1, (-1, 4))[positive, label[positive]]

        objects = [number > 0 for number in labels]
        masks = self._mask_logits(features, [b[o] for b, o in zip(boxes, objects, strict=True)], image_shapes)
        side = masks.shape[-1]
        wanted = torch.cat(
            [
                mask_targets(target["masks"], box[o], match[o], side)
                for target, box, match, o in zip(targets, boxes, matches, objects, strict=True)
            ]
        )
        own = masks[torch.arange(len(masks), device=masks.device), label[positive]]
        mask_loss = F.binary_cross_entropy_with_logits(own, wanted.to(own)) if len(own) else masks.sum() * 0
        return {
            "loss_classifier": F.cross_entropy(logits, label, reduction="sum") / count,
            "loss_box_reg": (chosen - code[positive]).abs().sum() / count,
            "loss_mask": mask_loss,
        }


def mask_targets(masks: Tensor, boxes: Tensor, matches: Tensor, side: int) -> Tensor:
    """What the mask head shall say of boxes (N, 4) matched with masks (M, H, W): (N, side, side) of 0 and 1."""
    rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    return (roi_align(masks[:, None].to(boxes), rois, side, 1.0, -1, aligned=True)[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Mask probabilities (N, 1, side, side) of boxes (N, 4) on an image of (height, width): (N, height, width) bool.

    Boxes without an area get no pixel (the published code gives them a stripe).
    """
    height, width = size
    x1, y1, x2, y2 = boxes.float()[:, :, None].unbind(1)
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    results = masks.new_zeros(len(masks), height, width, dtype=torch.bool)
    for number, mask in enumerate(masks.float()):  # one at a time: a hundred full-size grids would fill the memory
        grid = torch.stack(torch.broadcast_tensors(x[number], y[number][:, None]), dim=-1)
        results[number] = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0] >= threshold
    return results
