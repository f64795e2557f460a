"""--log_attention: numbers that warn, pictures, and no point twice."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as program
import models  # noqa: F401
from models.pixels import Pixels
from runtime.errors import UsageError
from visualize.capture import capture
from visualize.insight import Watcher, picture_of, warnings_of

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return timm.create_model("debiformer_nano").eval()


@pytest.fixture(scope="module")
def layers(nano):
    return capture(nano, IMAGES[:1]).layers


def with_maps(layer, **values):
    return replace(layer, maps=replace(layer.maps, **values))


def routed_as(layer, idx):
    return with_maps(layer, idx=torch.tensor(idx))


def test_entropy_and_unread_windows(layers):
    """Four windows: all read one; all read two; each is read once; one read thrice."""
    layer = layers[0]
    for idx, entropy, unread in (
        ([[2], [2], [2], [2]], 0.0, 0.75),
        ([[0], [1], [1], [0]], 0.5, 0.5),
        ([[3], [1], [0], [2]], 1.0, 0.0),
        ([[0], [0], [0], [1]], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4), 0.5),
    ):
        found = warnings_of(routed_as(layer, idx))
        assert found["attention_routing_entropy/stage_1_tokens"] == pytest.approx(entropy, abs=1e-12)
        assert found["attention_windows_unread/stage_1_tokens"] == unread


def test_saturation_counts_agents_at_the_edge_of_the_picture_but_no_padding(layers):
    layer = layers[1]
    ha, wa, g, _ = layer.maps.positions.shape
    inside = torch.zeros_like(layer.maps.positions)
    name = "attention_offset_saturation/stage_1_agents"
    assert warnings_of(with_maps(layer, positions=inside))[name] == 0
    one = inside.clone()
    one[0, 0, 0, 1] = -1
    assert warnings_of(with_maps(layer, positions=one))[name] == pytest.approx(1 / (ha * wa * g))
    assert warnings_of(with_maps(layer, positions=one + 1, agents=(1, 1)))[name] == 1
    padded = inside.clone()
    padded[ha - 1 :] = 1
    assert warnings_of(with_maps(layer, positions=padded, agents=(ha - 1, wa)))[name] == 0


def test_look_has_numbers_and_pictures_of_every_stage(nano):
    found = Watcher(nano, "debiformer_nano", IMAGES, Pixels()).collect()
    kinds = ("routing_entropy", "windows_unread")
    places = [f"stage_{stage}_{who}" for stage in (1, 2, 3) for who in ("tokens", "agents")] + ["stage_4_agents"]
    expected = {f"attention_{kind}/{place}" for kind in kinds for place in places}
    expected |= {f"attention_offset_saturation/stage_{stage}_agents" for stage in (1, 2, 3, 4)}
    assert set(found.scalars) == expected
    assert all(0 <= value <= 1 for value in found.scalars.values())
    assert set(found.pictures) == {
        f"attention_{kind}/image_{number}" for kind in ("routing", "agents") for number in (0, 1)
    }
    assert all(picture.width == 4 * picture.height for picture in found.pictures.values())


def test_numbers_are_means_over_images_and_blocks(nano):
    found = Watcher(nano, "debiformer_nano", IMAGES, Pixels()).collect()
    name = "attention_routing_entropy/stage_3_tokens"
    values = [warnings_of(layer).get(name) for image in IMAGES for layer in capture(nano, image[None]).layers]
    values = [value for value in values if value is not None]
    assert len(values) == 4
    assert found.scalars[name] == pytest.approx(sum(values) / 4)


def test_look_changes_no_random_number_and_no_weight(nano):
    nano.train()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in nano.state_dict().items()}
    Watcher(nano, "debiformer_nano", IMAGES, Pixels()).collect()
    assert nano.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in nano.state_dict().items())
    nano.eval()


def test_biformer_has_no_agents_to_show():
    found = Watcher(
        timm.create_model("biformer_tiny", depths=(1, 1, 1, 1)), "biformer_tiny", IMAGES[:1], Pixels()
    ).collect()
    assert set(found.pictures) == {"attention_routing/image_0"}
    assert not any("offset" in name or "stage_4" in name for name in found.scalars)


def test_pictures_are_what_was_normalised():
    from visualize.images import to_tensor

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(picture_of(to_tensor(Image.fromarray(pixels), Pixels())[0], Pixels()), pixels)


def events_of(folder):
    events = EventAccumulator(str(folder / "tf_record_log"), size_guidance={"images": 0})
    events.Reload()
    return events


def steps(events, kind, tag):
    return [event.step for event in getattr(events, kind)(tag)]


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "killed"])
def test_run_shows_its_attention_every_n_epochs(small_options, killed, monkeypatch):
    """Also after it was killed between the pictures of an epoch and its checkpoint."""
    options = small_options("--log_attention", "2", "--epochs", "4")
    if killed:
        end_epoch = program.RunLog.end_epoch

        def fail(self, record):
            if record["epoch"] == 3:
                raise KeyboardInterrupt
            end_epoch(self, record)

        monkeypatch.setattr(program.RunLog, "end_epoch", fail)
        with pytest.raises(KeyboardInterrupt):
            program.run(options)
        monkeypatch.undo()
    program.run(options)
    folder = program.Path(options.output_dir)
    events = events_of(folder)
    tags = events.Tags()
    scalars = [tag for tag in tags["scalars"] if tag.startswith("attention_")]
    assert Counter(tag.split("/")[0] for tag in scalars) == {
        "attention_routing_entropy": 7,
        "attention_windows_unread": 7,
        "attention_offset_saturation": 4,
    }
    assert len(tags["images"]) == 8
    for tag in scalars:
        assert steps(events, "Scalars", tag) == [1, 3]
    for tag in tags["images"]:
        assert steps(events, "Images", tag) == [1, 3]
    assert sorted(path.name for path in (folder / "attention").iterdir()) == ["0001", "0003"]


def test_looking_changes_nothing_of_a_run(small_options, tmp_path):
    found = []
    for number in ("0", "1"):
        options = small_options("--log_attention", number, "--output_dir", str(tmp_path / number))
        program.run(options)
        found.append(torch.load(tmp_path / number / "checkpoint.pth", weights_only=False)["model"])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_without_it_there_is_nothing_of_attention(run_small):
    folder = run_small("--epochs", "1")
    assert not (folder / "attention").exists()
    tags = events_of(folder).Tags()
    assert tags["images"] == []
    assert not any(tag.startswith("attention") for tag in tags["scalars"])


def test_model_without_attention_is_refused_before_training(small_options, tmp_path):
    options = small_options("--log_attention", "1")
    options.model, options.model_kwargs = "resnet18", {}
    with pytest.raises(UsageError, match="--log_attention: resnet18 has no routing"):
        program.run(options)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_negative_numbers_are_refused(small_options, capsys):
    with pytest.raises(SystemExit):
        small_options("--log_attention", "-1")
    assert "--log_attention must be at least 0" in capsys.readouterr().err
