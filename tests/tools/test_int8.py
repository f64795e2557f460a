"""Exported models in 8-bit integers: what is quantized, on which images, and what it costs."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import main
from runtime.checkpoint import BEST
from runtime.errors import UsageError
from tasks.classification.sources import Digits
from tasks.options import parse_args
from tools import export, int8
from tools.loading import load_model


def graph():
    """Two convolutions in a row, the second seen by TopK; a third, whose shape alone is."""
    weight = numpy_helper.from_array(np.zeros((4, 4, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["before"], "before"),
        helper.make_node("Conv", ["before", "weight"], ["seen"], "seen"),
        helper.make_node("Conv", ["before", "weight"], ["measured"], "measured"),
        helper.make_node("Shape", ["measured"], ["shape"], "shape"),
        helper.make_node("Reshape", ["seen", "shape"], ["scores"], "reshape"),
        helper.make_node("TopK", ["scores", "count"], ["values", "indices"], "topk"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 4, 2, 2])
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [1])
    indices = helper.make_tensor_value_info("indices", TensorProto.INT64, None)
    return helper.make_graph(nodes, "graph", [images, count], [indices], [weight])


def test_last_convolutions_before_a_choice_are_known():
    assert int8.choosing(graph()) == ["seen"]


def test_images_are_taken_from_all_over_a_folder(shared_images):
    loaded = load_model("debiformer_nano", input_size=32)
    assert int8.calibration_images(loaded, str(shared_images), 5).shape == (5, 3, 32, 32)
    assert int8.spread(10, 4) == [0, 2, 5, 7]
    assert int8.spread(3, 4) == [0, 1, 2]


def test_images_that_are_not_there_are_told(tmp_path):
    loaded = load_model("debiformer_nano", input_size=32)
    with pytest.raises(UsageError, match=r"--int8 .*: there are no images; name a folder of images, or DIGITS"):
        int8.calibration_images(loaded, str(tmp_path / "nowhere"))


def test_other_formats_have_no_integers(tmp_path):
    with pytest.raises(UsageError, match="--int8 is for --format onnx, not hf"):
        export.main(
            ["--model", "debiformer_nano", "--format", "hf", "--int8", "DIGITS", "--output", str(tmp_path / "x")]
        )


def test_too_many_changes_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_int8", lambda *_: 0.5)
    with pytest.raises(UsageError, match=r"in 8-bit integers 50% of the images of calibration change class; not kept"):
        export.export(load_model("debiformer_nano"), "onnx", tmp_path / "model.onnx", "DIGITS")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quickstart_loses_at_most_three_tenths_of_a_percent(tmp_path):
    main.run(parse_args(["--output_dir", str(tmp_path / "run"), "--num_workers", "0"]))
    loaded, path = load_model(None, str(tmp_path / "run" / BEST)), tmp_path / "digits.onnx"
    export.export(loaded, "onnx", path, "DIGITS")
    digits = Digits(train=False)
    images = torch.cat([int8.as_taken(loaded, digits[number][0]) for number in range(len(digits))])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"images": images.numpy()})[0].argmax(1)
    with torch.no_grad():
        expected = loaded.model(images).argmax(1).numpy()
    correct = [100 * np.mean(found == digits.targets) for found in (actual, expected)]
    assert correct[1] - correct[0] <= 0.3
