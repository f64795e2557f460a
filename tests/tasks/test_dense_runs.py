"""Segmentation and detection, from files to figures, through `main.run`."""

import json

import numpy as np
import pytest
import torch
from dense_cases import HEADS, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import complaint, run_until_stopped

import main
from models.weights import load_checkpoint
from runtime.checkpoint import BEST, LAST
from tasks import find_task
from tasks.options import parse_args
from tasks.trained import trained_options
from tools import make_shapes

slow = pytest.mark.slow


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes.write(root, train=8, val=3, size=96)
    return root


@pytest.fixture
def options_for(shapes, tmp_path):
    def build(head, *argv, folder="run"):
        where = ["--head", head, "--data_path", str(shapes), "--output_dir", str(tmp_path / folder)]
        return parse_args([*SMALL, *HEADS[head], *where, *argv])

    return build


@pytest.mark.parametrize(
    "head", ["semantic_fpn", "upernet", "retinanet", "rtdetrv2", pytest.param("mask_rcnn", marks=slow)]
)
def test_dense_run_resumes_midway_and_evaluates_as_it_trained(options_for, monkeypatch, head):
    whole, stopped = options_for(head, folder="whole"), options_for(head)
    main.run(whole)
    run_until_stopped(stopped, 3, monkeypatch)
    stood = load_checkpoint(main.Path(stopped.output_dir) / LAST)
    assert (stood["epoch"], stood["position"]) == (0, 6)
    main.run(stopped)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST)["model"] for options in (whole, stopped))
    assert all(torch.equal(value, two[name]) for name, value in one.items())

    best = main.Path(whole.output_dir) / BEST
    log = [json.loads(line) for line in (best.parent / "log.txt").read_text().splitlines()]
    metric = "AP_box" if "detection" in HEADS[head] else "mIoU"
    figures = main.run(options_for(head, "--eval", "--resume", str(best)))
    assert figures[metric] == max(record[f"test_{metric}"] for record in log)
    assert figures["images"] == 3


@pytest.mark.parametrize(
    "head", ["semantic_fpn", "retinanet", *(pytest.param(head, marks=slow) for head in ("rtdetrv2", "mask_rcnn"))]
)
def test_dense_run_trains_in_half_precision(options_for, head):
    options = options_for(head, "--amp", "bf16", "--epochs", "1")
    main.run(options)
    log = json.loads((main.Path(options.output_dir) / "log.txt").read_text())
    assert 0 < log["train_loss"] < 100


def test_run_from_before_images_were_grouped_goes_on(options_for, monkeypatch):
    ungrouped = options_for("retinanet", "--groups", "none")
    run_until_stopped(ungrouped, 3, monkeypatch)
    path = main.Path(ungrouped.output_dir) / LAST
    content = load_checkpoint(path)
    del content["data"]["groups"], content["args"]["groups"]
    torch.save(content, path)
    assert "groups was none, is shape; undo that" in complaint(main.run, options_for("retinanet"))
    main.run(ungrouped)  # the rest of the epoch as it was begun

    content = load_checkpoint(path)
    content["epoch"] = 1
    del content["data"]["groups"], content["args"]["groups"]
    torch.save(content, path)
    main.run(options_for("retinanet"))  # between epochs, as nothing had changed
    assert trained_options(content, path).groups == "shape"


def test_run_counted_in_updates_resumes_midway(options_for, monkeypatch):
    updates = ["--iterations", "6", "--eval_every", "3", "--warmup_updates", "2", "--sched", "poly"]
    whole, stopped = (options_for("semantic_fpn", *updates, folder=folder) for folder in ("whole", "run"))
    main.run(whole)
    run_until_stopped(stopped, 5, monkeypatch)
    main.run(stopped)
    one, two = (load_checkpoint(main.Path(options.output_dir) / LAST)["model"] for options in (whole, stopped))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("extra", [["--test_mode", "slide"], ["--test_augment"]])
def test_segmentation_evaluates_by_windows_and_over_scales(options_for, extra):
    figures = main.run(options_for("semantic_fpn", "--eval", *extra))
    assert 0 <= figures["mIoU"] <= 100


def test_frozen_batch_norm_keeps_statistics_and_weights(options_for):
    options = options_for("semantic_fpn", "--freeze_bn", "--epochs", "1")
    main.run(options)
    weights = load_checkpoint(main.Path(options.output_dir) / LAST)["model"]
    norm = {name: value for name, value in weights.items() if name.startswith("backbone.downsample_layers.0.1.")}
    assert norm.keys() >= {"backbone.downsample_layers.0.1.running_mean"}
    for name, value in norm.items():
        assert torch.equal(value, torch.full_like(value, float(name.endswith(("weight", "running_var"))))), name
    assert weights["decode_head.conv_seg.weight"].abs().max() > 0
    assert any(value.any() for name, value in weights.items() if "auxiliary" in name and name.endswith("running_mean"))


@pytest.mark.parametrize("head", ["semantic_fpn", "retinanet"])
def test_dense_run_starts_from_a_classification_or_another_dense_model(options_for, tmp_path, head):
    import timm

    kwargs = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "img_size": 32, "num_classes": 7}
    classifier = timm.create_model("debiformer_nano", **kwargs)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    first = options_for(head, "--finetune", str(tmp_path / "classifier.pth"), "--lr", "0", folder="first")
    first.epochs = 1
    main.run(first)
    trained = load_checkpoint(main.Path(first.output_dir) / LAST)["model"]
    prefix = "backbone." if head == "semantic_fpn" else "backbone.body."
    for name, value in classifier.named_parameters():
        if name.startswith("stages."):
            assert torch.equal(value, trained[prefix + name]), name
    again = options_for("upernet", "--finetune", f"{first.output_dir}/{LAST}", "--lr", "0", folder="again")
    again.epochs = 1
    main.run(again)
    reused = load_checkpoint(main.Path(again.output_dir) / LAST)["model"]
    assert all(
        torch.equal(value, reused[name.replace(prefix, "backbone.")])
        for name, value in trained.items()
        if name.startswith(f"{prefix}extra_norms") or name.startswith(f"{prefix}stages")
    )


# -- bad input


@pytest.fixture
def own_shapes(tmp_path):
    make_shapes.write(tmp_path / "data", train=3, val=2, size=64)
    return tmp_path / "data"


def refused(head, data, *argv):
    return complaint(main.run, parse_args([*SMALL, *HEADS[head], "--head", head, "--data_path", str(data), *argv]))


def change_json(data, change, split="train"):
    file = data / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_detection_names_missing_images(own_shapes):
    (own_shapes / "images" / "train" / "0001.png").unlink()
    assert "1 of the 3 images" in refused("retinanet", own_shapes)


def test_detection_names_a_broken_or_empty_json(own_shapes):
    change_json(own_shapes, lambda content: content["annotations"].clear())
    assert refused("retinanet", own_shapes).endswith("instances_train.json has no objects")
    change_json(own_shapes, lambda content: content.pop("categories"))
    assert "it has no categories" in refused("retinanet", own_shapes)
    (own_shapes / "annotations" / "instances_train.json").write_text("[1")
    assert "cannot be read" in refused("retinanet", own_shapes)


def test_detection_leaves_out_unusable_objects_and_says_so_once(options_for, own_shapes, capsys):
    def damage(content):
        one = content["annotations"][0]
        size = one["segmentation"]["size"]
        content["annotations"] += [
            {**one, "bbox": [5, 5, 0, 3]},
            {**one, "bbox": [1000, 5, 30, 30]},
            {**one, "bbox": None},
            {**one, "iscrowd": 1},
            {**one, "category_id": 77},
            {**one, "image_id": 77},
            {**one, "segmentation": [[1, 2, 3]]},
            {**one, "segmentation": {"size": size[::-1], "counts": [5]}},
            {**one, "segmentation": [[1.0, 1.0, 20.0, 1.0, 20.0, 20.0], [3, 4]]},
        ]
        content["images"].append({**content["images"][0], "id": 50})  # nothing is on it

    change_json(own_shapes, damage)
    options = options_for("mask_rcnn", "--data_path", str(own_shapes))
    from tasks.detection.task import Detection

    task = Detection(options)
    train, _ = task.sources()
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if "left out" in line]
    assert len(lines) == 1
    assert "8 objects are left out" in lines[0]
    assert len(train) == 4
    samples = [task.transform(train=True)(train[index]) for index in range(4)]
    assert len(samples[0]["masks"]) == len(samples[0]["boxes"]) > 1
    assert samples[3]["boxes"].shape == (0, 4)
    model = task.build_model().train()
    batch = task.preprocess(task.collate(samples[::3]), train=True)
    loss = task.loss(task.forward(model, batch), batch)["loss"]
    loss.backward()
    assert loss.isfinite()


def test_detection_takes_category_numbers_with_holes(options_for, own_shapes):
    def renumber(content):
        for entry in content["categories"]:
            entry["id"] = 10 * entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 10 * entry["category_id"]

    for split in ("train", "val"):
        change_json(own_shapes, renumber, split)
    from tasks.detection.task import Detection

    task = Detection(options_for("retinanet", "--data_path", str(own_shapes)))
    _, val = task.sources()
    samples = [task.transform(train=False)(val[index]) for index in range(2)]
    evaluator = task.evaluator(split=False)
    for sample in samples:
        batch = task.collate([sample])
        labels = sample["labels"] - 1  # RetinaNet's
        evaluator.update([{"boxes": sample["boxes"], "labels": labels, "scores": torch.ones(len(labels))}], batch)
    assert evaluator.compute()["AP_box"] == pytest.approx(100)


def test_evaluation_without_detections_is_zero(options_for):
    from tasks.detection.task import Detection

    task = Detection(options_for("mask_rcnn"))
    _, val = task.sources()
    batch = task.collate([task.transform(train=False)(val[0])])
    evaluator = task.evaluator(split=False)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    evaluator.update([{**nothing, "masks": torch.zeros(0, 1, 28, 28)}], batch)
    figures = evaluator.compute()
    assert (figures["AP_box"], figures["AP_mask"], figures["images"]) == (0, 0, 1)


def test_segmentation_names_what_is_wrong_with_a_folder(own_shapes):
    head = "semantic_fpn"
    assert "needs --data_path" in refused(head, "")
    assert "is not a folder" in refused(head, own_shapes / "nowhere")
    assert "names 4 classes" in refused(head, own_shapes, "--num_classes", "3")
    annotation = own_shapes / "annotations" / "train" / "0001.png"
    Image.new("RGB", Image.open(annotation).size).save(annotation)
    assert "is no index PNG" in refused(head, own_shapes)
    Image.new("L", (7, 7)).save(annotation)
    assert "has another size than" in refused(head, own_shapes)
    annotation.unlink()
    assert "1 of 3 images have no annotation" in refused(head, own_shapes)
    for path in (own_shapes / "images" / "train").iterdir():
        path.unlink()
    assert "holds no images" in refused(head, own_shapes)
    (own_shapes / "classes.txt").unlink()
    assert "pass --num_classes" in refused(head, own_shapes)


def test_labels_out_of_range_are_ignored(own_shapes, options_for):
    for path in (own_shapes / "annotations" / "val").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 77)).save(path)
    options = options_for("semantic_fpn", "--eval", "--data_path", str(own_shapes))
    assert "no pixel of the evaluation's annotations has a class" in complaint(main.run, options)


def test_log_attention_is_refused(own_shapes):
    assert "--log_attention is for classification" in refused("semantic_fpn", own_shapes, "--log_attention", "1")


# -- figures and backbones


def test_average_precision_is_that_of_pycocotools(options_for, shapes):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from tasks.detection.evaluator import STATS
    from tasks.detection.task import Detection

    task = Detection(options_for("mask_rcnn"))
    _, val = task.sources()
    evaluator, transform = task.evaluator(split=False), task.transform(train=False)
    generator = torch.Generator().manual_seed(0)
    for index in range(len(val)):
        batch = task.collate([transform(val[index])])
        (target,) = batch["targets"]
        count = len(target["boxes"])
        noise = torch.randn(count, 4, generator=generator)
        labels = torch.where(torch.rand(count, generator=generator) < 0.8, target["labels"], 1)
        scores = torch.rand(count, generator=generator)
        masks = torch.rand(count, 1, 28, 28, generator=generator) * 0.3 + 0.4
        boxes = torch.cat([target["boxes"], target["boxes"] + noise]).clamp(min=0)
        found = {"boxes": boxes, "labels": labels.repeat(2), "scores": torch.cat([scores, scores / 2])}
        evaluator.update([{**found, "masks": masks.repeat(2, 1, 1, 1)}], batch)
    figures = evaluator.compute()
    truth = COCO(str(val.file))
    for kind, word in {"bbox": "box", "segm": "mask"}.items():
        reference = COCOeval(truth, truth.loadRes(evaluator.found), kind)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        for name, value in zip(STATS, reference.stats, strict=True):
            if value >= 0:
                assert figures[name.format(word)] == pytest.approx(100 * value, abs=1e-6), name
    assert 0 < figures["AP_box"] < 100


@pytest.mark.parametrize("head", HEADS)
def test_no_size_of_image_ends_an_inference(options_for, head):
    task = find_task(HEADS[head][1])(options_for(head, "--head_channels", "32"))
    task.sources()
    torch.manual_seed(0)
    network = task.build_model().eval()

    @settings(max_examples=10, derandomize=True, deadline=None)
    @given(height=st.integers(1, 130), width=st.integers(1, 130))
    def sees(height, width):
        image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        batch = {"images": image, "labels": torch.zeros(1, height, width), "targets": []}
        if task.opts.task == "detection":
            batch["images"] = list(image)
        with torch.no_grad():
            outputs = task.forward(network, task.preprocess(batch, train=False))
        if task.opts.task == "detection":
            assert outputs[0]["boxes"].shape[1:] == (4,)
        else:
            assert outputs.shape == (1, 4, height, width)

    sees()


@pytest.mark.parametrize("model", ["resnet18", "debiformer_nano"])
@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "retinanet"])
def test_images_of_any_size_pass_through_any_backbone(options_for, model, head):
    kwargs = [] if model == "resnet18" else ["embed_dims=16,32,48,64", "depths=1,1,1,1"]
    options = options_for(head, "--model", model, *(["--model_kwargs", *kwargs] if kwargs else []))
    if not kwargs:
        options.model_kwargs = {}
    task = find_task(options.task)(options)
    task.sources()
    network = task.build_model().eval()
    for height, width in ((33, 47), (1, 70), (65, 31)):
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        batch = {"images": image, "labels": torch.zeros(1, 20, 30), "targets": []}
        if head == "retinanet":
            batch["images"] = list(image)
        with torch.no_grad():
            outputs = task.forward(network, task.preprocess(batch, train=False))
        assert outputs[0]["boxes"].shape[1] == 4 if head == "retinanet" else outputs.shape == (1, 4, 20, 30)
