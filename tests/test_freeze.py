"""--freeze: what is left as it is, what is trained, and that a stopped run goes on to the same weights."""

import pytest
import timm
import torch
from support import complaint, run_until_stopped

import main
from models.weights import load_checkpoint
from runtime.checkpoint import BEST, LAST
from runtime.model import freeze


@pytest.fixture
def weights(run_small):
    return str(run_small("--epochs", "1") / BEST)


def changed(before, folder):
    """Names of what differs between two checkpoints' weights and statistics."""
    before, after = load_checkpoint(before)["model"], load_checkpoint(f"{folder}/{LAST}")["model"]
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ("0", ("downsample_layers.0.",)),
        ("2", ("downsample_layers.0.", "downsample_layers.1.", "stages.0.", "stages.1.")),
        ("4", ("downsample_layers.", "stages.", "norm.")),
        ("backbone", ("downsample_layers.", "stages.", "norm.")),
    ],
)
def test_frozen_part_keeps_weights_and_statistics(weights, small_options, part, kept):
    options = small_options("--finetune", weights, "--freeze", part, "--epochs", "1", "--drop_path", "0.5")
    options.output_dir += "-frozen"
    main.run(options)
    names = changed(weights, options.output_dir)
    assert not [name for name in names if name.startswith(kept)]
    everything = load_checkpoint(weights)["model"]
    weights_of_rest = {name for name, value in everything.items() if not name.startswith(kept) and value.ndim > 1}
    assert weights_of_rest <= names
    groups = load_checkpoint(f"{options.output_dir}/{LAST}")["optimizer"]["param_groups"]
    trainable = [name for name, _ in timm_parameters(options) if not name.startswith(kept)]
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def timm_parameters(options):
    return timm.create_model(options.model, num_classes=4, img_size=32, **options.model_kwargs).named_parameters()


def test_frozen_parts_are_in_evaluation_mode():
    model = timm.create_model("debiformer_nano", drop_path_rate=0.3)
    parts = freeze(model, "2")
    assert set(parts) == {*model.downsample_layers[:2], *model.stages[:2]}
    assert freeze(model, "backbone")[-1] is model.norm
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("resnet18", ("conv1", "bn1", "layer1", "layer2")),
        ("swin_tiny_patch4_window7_224", ("patch_embed", "layers.0", "layers.1")),
        ("convnext_atto", ("stem", "stages.0", "stages.1")),
        ("maxvit_stl", None),
    ],
)
def test_stages_of_other_models(name, kept):
    model = timm.create_model(name)
    freeze(model, "2")
    frozen = [parameter for parameter, value in model.named_parameters() if not value.requires_grad]
    assert 0 < len(frozen) < len(list(model.parameters()))
    if kept:
        assert set(frozen) == {parameter for parameter, _ in model.named_parameters() if parameter.startswith(kept)}


def test_stopped_run_goes_on_to_the_same_weights(weights, small_options, monkeypatch):
    frozen = ["--finetune", weights, "--freeze", "1", "--deterministic"]
    whole, parts = small_options(*frozen), small_options(*frozen)
    whole.output_dir, parts.output_dir = whole.output_dir + "-whole", parts.output_dir + "-parts"
    main.run(whole)
    run_until_stopped(parts, 4, monkeypatch)
    main.run(parts)
    for part in ("model", "model_ema"):
        once, twice = (load_checkpoint(f"{options.output_dir}/{LAST}")[part] for options in (whole, parts))
        assert all(torch.equal(once[name], twice[name]) for name in once)


def test_another_part_frozen_midway_is_told(weights, small_options):
    options = small_options("--finetune", weights, "--freeze", "1", "--epochs", "1")
    options.output_dir += "-frozen"
    main.run(options)
    options.freeze, options.epochs = "2", 2
    assert "--freeze" in complaint(main.run, options)


def test_what_cannot_be_frozen_is_told(small_options, capsys):
    for argv, words in (
        (["--freeze", "2"], "add --finetune or --load_release"),
        (["--finetune", "x.pth", "--freeze", "half"], "a number of stages or backbone, not 'half'"),
    ):
        with pytest.raises(SystemExit):
            small_options(*argv)
        assert words in capsys.readouterr().err
    model = timm.create_model("debiformer_nano")
    assert complaint(freeze, model, "5") == "--freeze 5: DeBiFormer has 4 stages"
    headless = timm.create_model("debiformer_nano", num_classes=0)
    assert complaint(freeze, headless, "backbone").endswith("leaves nothing to train; leave it out")
