"""The models in transformers, by their names in timm."""

import debiformer  # noqa: F401
import timm
import torch
from conftest import train
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.segmentation import MeanIoU
from torchvision.ops import box_convert
from transformers import (
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    RTDetrImageProcessor,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

SIZES = [(96, 64)] * 2


def backbone(*stages):
    return TimmBackboneConfig(backbone="debiformer_nano", out_indices=list(stages))


def iou(found, regions):
    return MeanIoU(3, input_format="index")(torch.stack(found), regions).item()


def test_upernet_trains_and_is_evaluated(scenes):
    config = UperNetConfig(
        backbone_config=backbone(0, 1, 2, 3),
        num_labels=3,
        hidden_size=32,
        auxiliary_channels=16,
        auxiliary_in_channels=timm.create_model("debiformer_nano").feature_info[2]["num_chs"],
    )
    model = UperNetForSemanticSegmentation(config)
    train(model, lambda: model(scenes.images, labels=scenes.regions).loss)
    with torch.no_grad():
        logits = model(scenes.images).logits
    assert logits.shape == (2, 3, 96, 64)
    assert 0 <= iou(list(logits.argmax(1)), scenes.regions) <= 1


def test_mask2former_trains_and_is_evaluated(scenes):
    config = Mask2FormerConfig(
        backbone_config=backbone(0, 1, 2, 3),
        num_labels=3,
        num_queries=10,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
        train_num_points=128,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    classes = torch.arange(3)
    masks = [(region == classes[:, None, None]).float() for region in scenes.regions]
    train(model, lambda: model(scenes.images, mask_labels=masks, class_labels=[classes] * 2).loss)
    with torch.no_grad():
        found = Mask2FormerImageProcessor().post_process_semantic_segmentation(model(scenes.images), SIZES)
    assert 0 <= iou(found, scenes.regions) <= 1


def test_rtdetrv2_trains_and_is_evaluated(scenes):
    config = RTDetrV2Config(
        backbone_config=backbone(1, 2, 3),
        freeze_backbone_batch_norms=False,
        num_labels=2,
        num_queries=20,
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32] * 3,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_denoising=0,
    )
    model = RTDetrV2ForObjectDetection(config)
    relative = box_convert(scenes.boxes, "xyxy", "cxcywh") / torch.tensor([64, 96, 64, 96])
    targets = [{"class_labels": torch.arange(2), "boxes": boxes} for boxes in relative]
    train(model, lambda: model(scenes.images, labels=targets).loss)
    with torch.no_grad():
        found = RTDetrImageProcessor().post_process_object_detection(model(scenes.images), 0.0, SIZES)
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.update(found, [{"boxes": boxes, "labels": torch.arange(2)} for boxes in scenes.boxes])
    assert 0 <= metric.compute()["map"] <= 1


def test_trainer_trains_evaluates_and_saves_a_classifier(scenes, tmp_path):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="debiformer_nano", num_labels=2))
    data = [{"pixel_values": image, "labels": label} for label, image in enumerate(scenes.images)]
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=5,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=5,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] > 0
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-5")
    x = scenes.images
    with torch.no_grad():
        assert torch.equal(saved.eval()(x).logits, model.eval()(x).logits)
