"""RetinaNet (arXiv 1708.02002) from torchvision's parts, set to the published recipe."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import box_iou, clip_boxes_to_image, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .boxes import Anchors, BoxCoder, Matcher, suppress
from .mask_rcnn import EPSILON, Target

STRIDES = (8, 16, 32, 64, 128)


class P6P7(LastLevelP6P7):
    """Two more maps from the backbone's last one by strided convolutions, without an activation between."""

    def __init__(self, in_channels: int, channels: int = 256) -> None:
        super().__init__(in_channels, channels)
        self.use_P5 = False

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        # On CPUs the weights' gradient of a strided convolution of a 1 x 1 map is garbage in bfloat16 (oneDNN's).
        with torch.autocast("cpu", enabled=False):
            p6 = self.p6(c[-1].to(self.p6.weight.dtype))
            return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class OneStage(RetinaNet):
    """Classes and boxes of nine anchors per position; losses are divided by the batch's number of objects' anchors."""

    def __init__(self, backbone: nn.Module, num_classes: int, transform: nn.Module, channels: int = 256) -> None:
        sizes = tuple(tuple(4 * stride * 2 ** (third / 3) for third in range(3)) for stride in STRIDES)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=Anchors(sizes, STRIDES),
            head=RetinaNetHead(channels, 9, num_classes),
            proposal_matcher=Matcher(0.5, 0.4, floor=0.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            topk_candidates=1000,
        )
        self.transform = transform
        self.box_coder = self.head.regression_head.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Focal loss (alpha 0.25, gamma 2) and L1. Labels count from 0 here."""
        scores, boxes, count = [], [], 0
        outputs = zip(targets, anchors, head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True)
        for target, anchor, logits, codes in outputs:
            matches = self._match(target, anchor)
            objects, used = matches >= 0, matches != Matcher.BETWEEN_THRESHOLDS
            wanted = torch.zeros_like(logits)
            wanted[objects, target["labels"][matches[objects]]] = 1
            scores.append(sigmoid_focal_loss(logits[used], wanted[used], reduction="sum"))
            code = self.box_coder.encode_single(target["boxes"][matches[objects]].to(anchor), anchor[objects])
            boxes.append((codes[objects] - code).abs().sum())
            count = count + objects.sum().clamp(min=1)
        return {
            "classification": torch.stack(scores).sum() / (count + EPSILON),
            "bbox_regression": torch.stack(boxes).sum() / (count + EPSILON),
        }

    def _match(self, target: Target, anchors: Tensor) -> Tensor:
        inside = self.anchor_generator.inside(tuple(target["size"].tolist())).to(anchors.device)
        matches = torch.full_like(inside, Matcher.BETWEEN_THRESHOLDS, dtype=torch.int64)
        if len(target["boxes"]):
            matches[inside] = self.proposal_matcher(box_iou(target["boxes"].to(anchors), anchors[inside]))
        else:
            matches[inside] = Matcher.BELOW_LOW_THRESHOLD
        return matches

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, best first: the 1000 best of each map, suppressed within classes."""
        results = []
        levels = list(zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True))
        for number, size in enumerate(image_shapes):
            parts = []
            for (logits, codes), anchor in zip(levels, anchors[number], strict=True):
                scores, places = (
                    logits[number].sigmoid().flatten().topk(min(self.topk_candidates, logits[number].numel()))
                )
                places, scores = places[scores > self.score_thresh], scores[scores > self.score_thresh]
                rows = places // logits.shape[-1]
                box = clip_boxes_to_image(self.box_coder.decode_single(codes[number][rows], anchor[rows]), size)
                full = (box[:, 2:] > box[:, :2]).all(1)
                parts.append((box[full], scores[full], places[full] % logits.shape[-1]))
            found = suppress(*map(torch.cat, zip(*parts, strict=True)), self.nms_thresh, self.detections_per_img)
            results.append(dict(zip(("boxes", "scores", "labels"), found, strict=True)))
        return results
