"""RT-DETRv2 (arXiv 2407.17140) from transformers' parts: an encoder of three maps, then queries instead of anchors."""

from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from runtime.errors import UsageError

from .mask_rcnn import Target
from .model import Batching, on_three_maps

QUERIES, DETECTIONS, HEADS = 300, 100, 8
"""Boxes that are thought of per image, and those of them that are given out; attention heads (the published ones)."""
LOSSES = ("loss_vfl", "loss_bbox", "loss_giou")


def library() -> ModuleType:
    """transformers. Raises UsageError where it is not installed, or too old."""
    try:
        import transformers
        from transformers import RTDetrV2ForObjectDetection  # noqa: F401 (has come later)
    except ImportError as error:
        raise UsageError("--head rtdetrv2 needs transformers: pip install -r requirements-clients.txt") from error
    return transformers


def rtdetrv2(body: nn.Module, widths: list[int], num_classes: int, channels: int = 256) -> "RTDETRv2":
    """RT-DETRv2 on the last three of four maps of these widths; class numbers from 0."""
    if channels % HEADS:
        raise UsageError(
            f"--head rtdetrv2 attends by {HEADS} heads: --head_channels must be a multiple, not {channels}"
        )
    return RTDETRv2(on_three_maps(body), widths, num_classes, channels)


class RTDETRv2(nn.Module):
    """Losses by name in training, detections on the images, best first, in evaluation.

    Input: normalised images (3, H, W) and, in training, targets (see `Target`), labels from 0.
    """

    def __init__(self, body: nn.Module, widths: list[int], num_classes: int, channels: int) -> None:
        super().__init__()
        transformers = library()
        stages = {"hidden_sizes": widths, "depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
        config = transformers.RTDetrV2Config(
            backbone_config=transformers.RTDetrResNetConfig(**stages, embedding_size=8, layer_type="basic"),
            freeze_backbone_batch_norms=False,
            num_labels=num_classes,
            d_model=channels,
            encoder_hidden_dim=channels,
            decoder_in_channels=[channels] * 3,
        )
        whole = transformers.RTDetrV2ForObjectDetection(config)
        self.body, self.batching, self.detr, self.criterion = body, Batching(), whole.model, whole.loss_function
        del self.detr.backbone  # a stand-in that brought the widths
        for module in self.detr.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()  # transformers' are for weights to be loaded: BatchNorm begins at 0.01 x

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        batch, _ = self.batching(images)
        height, width = batch.tensors.shape[-2:]
        frame = batch.tensors.new_tensor([width, height] * 2)
        maps = zip(self.detr.encoder_input_proj, self.body(batch.tensors)[-3:], strict=True)
        levels = self.detr.encoder([project(x) for project, x in maps]).last_hidden_state
        self.detr.config.num_queries = min(QUERIES, sum(x.shape[-2:].numel() for x in levels))
        labels = None
        if self.training:
            boxes = (box_convert(target["boxes"], "xyxy", "cxcywh") / frame for target in targets)
            labels = [
                {"class_labels": target["labels"], "boxes": box} for target, box in zip(targets, boxes, strict=True)
            ]
        with torch.autocast(frame.device.type, enabled=False):  # half precision is too coarse for boxes
            encoded = ([x.float() for x in levels],)
            found = self.detr(None, inputs_embeds=batch.tensors, encoder_outputs=encoded, labels=labels)
            return self._losses(found, labels) if self.training else self._detections(found, frame, batch.image_sizes)

    def _losses(self, found: object, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Each kind of loss, summed over the encoder's choice, the decoder's layers and the denoised queries."""
        logits, boxes = found.intermediate_logits, found.intermediate_reference_points
        if boxes.isnan().any():  # the matcher would end the run with words of its own
            return dict.fromkeys(LOSSES, boxes.sum())
        _, parts, _ = self.criterion(
            logits[:, -1],
            labels,
            boxes.device,
            boxes[:, -1],
            self.detr.config,
            logits,
            boxes,
            enc_topk_logits=found.enc_topk_logits,
            enc_topk_bboxes=found.enc_topk_bboxes,
            denoising_meta_values=found.denoising_meta_values,
        )
        losses = {kind: sum(part for name, part in parts.items() if name.startswith(kind)) for kind in LOSSES}
        # Without objects nothing is denoised, and other processes would wait for these weights' gradient.
        losses["loss_vfl"] = losses["loss_vfl"] + 0 * self.detr.denoising_class_embed.weight.sum()
        return losses

    def _detections(self, found: object, frame: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        scores = found.intermediate_logits[:, -1].sigmoid()
        classes = scores.shape[-1]
        scores, places = scores.flatten(1).topk(min(DETECTIONS, scores[0].numel()))
        boxes = box_convert(found.intermediate_reference_points[:, -1], "cxcywh", "xyxy") * frame
        return [
            {"boxes": clip_boxes_to_image(box[place // classes], size), "scores": score, "labels": place % classes}
            for box, score, place, size in zip(boxes, scores, places, sizes, strict=True)
        ]
