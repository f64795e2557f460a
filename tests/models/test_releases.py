"""Released weights reach a model exactly, by every way. Nothing leaves this machine."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
from released import (
    FOLDER,
    NANO,
    URL,
    assert_same_logits,
    cached,
    file_mirror,
    folder_as_downloaded,
    from_timm,
    http_mirror,
    http_mirror_that_breaks,
    local_folder,
    use_hub,
)
from support import command, complaint, save_as_authors, scrambled

import main
import models
from models import releases
from models.weights import load_checkpoint, load_to_finetune, sources
from models.weights.releases import RELEASES, Places, find_release
from runtime.errors import exit_on_error

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def from_run(monkeypatch, small_options):
    """from_run("--release_dir", ...): the model that main.py --eval --load_release evaluates."""

    def run(*argv):
        seen = []
        evaluate = main.evaluate

        def watched(task, model, *args, **kwargs):
            seen.append(model)
            return evaluate(task, model, *args, **kwargs)

        monkeypatch.setattr(main, "evaluate", watched)
        options = small_options("--eval", "--load_release", "--input_size", "64", *argv)
        options.model_kwargs = {}
        main.run(options)
        return seen[0].eval()

    return run


# -- the table ----------------------------------------------------------------------------------------------------


def test_releases_hold_what_was_published():
    assert list(RELEASES) == [
        f"{family}_{size}" for family in ("debiformer", "biformer") for size in ("tiny", "small", "base")
    ] + [
        "biformer_stl",
        "biformer_stl_nchw",
    ]
    assert [release.top1 for release in RELEASES.values()][:7] == [81.9, 83.9, 84.4, 81.4, 83.8, 84.3, 82.7]
    assert RELEASES["debiformer_tiny"].url == URL
    assert RELEASES["biformer_stl_nchw"].url == "https://1drv.ms/u/s!AkBbczdRlZvChWYrKbWbMgqd2Ai0"


def test_pretrained_cfgs_say_which_models_have_weights():
    ours = {name for name in models.MODEL_NAMES if timm.is_model_pretrained(name)}
    assert ours == RELEASES.keys() & set(models.MODEL_NAMES)
    for name in ours:
        assert timm.get_pretrained_cfg(name).url == RELEASES[name].url


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("debiformer_tiny.pth", "debiformer_tiny"),
        ("debi_tiny_best.pth.tar", "debiformer_tiny"),
        ("DeBiFormer-Small.pt", "debiformer_small"),
        ("biformer_tiny_in1k.pth", "biformer_tiny"),
        ("biformer_stl.pth", "biformer_stl"),
        ("biformer_stl_in1k.pth", "biformer_stl"),
        ("biformer_stl_nchw_in1k.pth", "biformer_stl_nchw"),
        ("biformer_stl_nchw.safetensors", "biformer_stl_nchw"),
        ("biformer_tiny.log", None),
        ("biformer_tinyish.pth", None),
        ("upernet_biformer_tiny.pth", None),
    ],
)
def test_release_names_recognises_its_files(name, model):
    owners = [release.model for release in RELEASES.values() if release.names(name, sources.SUFFIX)]
    assert owners == ([model] if model else [])


# -- every way in -------------------------------------------------------------------------------------------------


def hub(server, content, monkeypatch, **_):
    server.play_hugging_face("lab/weights", {"README.md": b"", f"{NANO}.pth": content, "other.pth": b"x"})
    use_hub(server, monkeypatch)
    return Places(hub="lab/weights")


def hub_of_one_model(server, content, monkeypatch, **_):
    server.play_hugging_face(f"lab/{NANO}", {"config.json": b"{}", "pytorch_model.bin": content})
    use_hub(server, monkeypatch)
    return Places(hub="lab/{model}")


def google_drive(server, content, monkeypatch, **_):
    server.play_google_drive(monkeypatch, FOLDER, content)
    return Places()


WAYS = [
    *(local_folder, folder_as_downloaded, file_mirror, http_mirror, http_mirror_that_breaks),
    *(hub, hub_of_one_model, google_drive),
]


@pytest.mark.usefixtures("nano_release")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_place_gives_the_models_logits(
    way, tmp_path, checkpoint, published, server, monkeypatch, from_run, capsys
):
    places = way(tmp_path=tmp_path, content=checkpoint, server=server, monkeypatch=monkeypatch)
    options = {"release_dir": places.folder, "release_mirror": places.mirror, "release_hub": places.hub}
    argv = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    assert_same_logits(from_run(*argv), published[0])
    assert "Acc@1" in capsys.readouterr().out

    variables = {"RELEASES": places.folder, "MIRROR": places.mirror, "HUB": places.hub}
    for name, value in variables.items():
        monkeypatch.setenv(f"DEBIFORMER_{name}", value)
    asked = len(server.asked)
    assert_same_logits(from_timm(), published[0])
    assert len(server.asked) == asked  # what was downloaded once is in the cache
    digest = hashlib.sha256(checkpoint).hexdigest()
    assert cached(tmp_path) == ({} if places.folder else {f"{NANO}-{digest}.pth": checkpoint})


@pytest.mark.usefixtures("nano_release")
def test_eval_takes_the_average_on_request(tmp_path, checkpoint, published, from_run):
    folder = local_folder(tmp_path, checkpoint).folder
    assert_same_logits(from_run("--release_dir", folder, "--use_ema"), published[1])


@pytest.mark.usefixtures("nano_release")
def test_eval_at_another_size_resamples_the_position_tables(tmp_path, checkpoint, published, from_run):
    model = from_run("--release_dir", local_folder(tmp_path, checkpoint).folder, "--input_size", "96")
    wanted = timm.create_model(NANO, num_classes=4, img_size=96)
    load_to_finetune(wanted, published[0].state_dict(), "x")
    assert_same_logits(model, wanted.eval())


@pytest.mark.usefixtures("nano_release")
def test_find_release_asks_the_folder_then_the_cache_then_other_places(tmp_path, published, server, monkeypatch):
    model, other = published
    find_release(NANO, file_mirror(tmp_path, save_as_authors(tmp_path / "x.pth", other).read_bytes()))
    assert_same_logits(from_timm(), other)
    server.play_google_drive(monkeypatch, FOLDER, b"")
    assert find_release(NANO, Places(mirror=server.url)).parent == tmp_path / "cache"
    monkeypatch.setenv(
        "DEBIFORMER_RELEASES", local_folder(tmp_path, save_as_authors(tmp_path / "y.pth", model).read_bytes()).folder
    )
    assert_same_logits(from_timm(), model)
    assert server.asked == []


@pytest.mark.parametrize("name", ["debiformer_tiny", "debi_tiny", "biformer_tiny.in1k"])
@torch.no_grad()
def test_create_model_builds_a_published_model_with_its_weights(name, tmp_path, monkeypatch):
    variant = name.replace("debi_", "debiformer_").removesuffix(".in1k")
    source = scrambled(timm.create_model(variant), 3)
    save_as_authors(tmp_path / "weights" / f"{variant}.pth", source)
    monkeypatch.setenv("DEBIFORMER_RELEASES", str(tmp_path / "weights"))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(images), source(images))

    stages = timm.create_model(name, pretrained=True, features_only=True).eval()(images)
    expected = source.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(stages, expected, strict=True))

    tuned = timm.create_model(name, pretrained=True, num_classes=10, img_size=96).eval()
    assert tuned(images).shape == (1, 10)
    changed = {key for key, value in tuned.state_dict().items() if not torch.equal(value, source.state_dict()[key])}
    assert changed == {"head.weight", "head.bias", *tuned.no_weight_decay()}

    other = {"file": str(save_as_authors(tmp_path / "mine.pth", scrambled(timm.create_model(variant), 4)))}
    mine = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": source.state_dict(), **other})
    assert torch.equal(mine.eval()(images), source(images))  # a source of the caller's own comes first


@pytest.mark.usefixtures("nano_release")
def test_training_starts_from_the_release(tmp_path, published, small_options, capsys):
    folder = tmp_path / "weights"
    source = scrambled(timm.create_model(NANO, num_classes=7, img_size=32), 5)
    save_as_authors(folder / f"{NANO}.pth", source)
    options = small_options(
        "--load_release", "--release_dir", str(folder), "--epochs", "1", "--lr", "0", "--min_lr", "0"
    )
    options.model_kwargs, options.warmup_lr, options.weight_decay = {}, 0.0, 0.0
    main.run(options)
    assert f"Fine-tuning from {folder / NANO}.pth; newly initialised: head.weight, head.bias" in capsys.readouterr().out
    trained = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["model"]
    assert torch.equal(trained["stages.0.0.norm1.weight"], source.state_dict()["stages.0.0.norm1.weight"])


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """run("list"): exit code, output and errors of python -m models.releases list."""

    def in_process(*argv):
        code = 0
        try:
            exit_on_error("models.releases", lambda: releases.main(list(map(str, argv))))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return in_process


def test_command_adds_lists_and_verifies(tmp_path, run):
    file = save_as_authors(tmp_path / "from_browser.pth", timm.create_model("biformer_tiny"))
    code, added, errors = run("add", file, "--model", "biformer_tiny")
    assert (code, errors) == (0, "")
    path = added.strip()
    assert path.startswith(str(tmp_path / "cache" / "biformer_tiny-"))
    row = r"biformer_tiny +81.4 +not known +https://1drv.ms/u/s!AkBbczdRlZvChHEOoGkgwgQzEDlM\n +"
    assert re.search(row + path, run("list")[1])
    _, verified, _ = run("verify")
    assert f"biformer_tiny: weights that fit biformer_tiny; {path}, sha256" in verified
    assert "biformer_stl: not here" in verified
    assert run("fetch", "biformer_tiny")[1].strip() == path

    Path(path).write_bytes(b"damaged")
    code, verified, errors = run("verify", "biformer_tiny")
    assert (code, errors) == (2, "models.releases: error: 1 of 1 failed\n")
    assert "biformer_tiny: BAD" in verified
    assert "its sha256 is another" in run("list")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["add", "/nowhere.pth", "--model", "biformer_tiny"], ["/nowhere.pth does not exist"]),
        (["add", __file__, "--model", "biformer_tiny"], ["is not a checkpoint"]),
        (["add", __file__, "--model", "biformer_tinny"], ["did you mean biformer_tiny?"]),
        (["add", __file__], ["--model"]),
        (["fetch"], ["NAME"]),
        (["fetch", "biformer_tiny"], ["OneDrive links no longer answer"]),
        (["fetch", "debiformer_nano"], ["no released weights of debiformer_nano"]),
        (["verify", "--release_dir", "/nowhere"], ["8 of 8 failed"]),
        (["lst"], ["invalid choice"]),
        ([], ["list|fetch|add|verify"]),
    ],
)
def test_command_answers_bad_input_with_one_line_and_exit_code_2(run, argv, words):
    code, _, errors = run(*argv)
    assert code == 2
    (line,) = errors.strip().splitlines()
    assert "models.releases" in line
    for word in words:
        assert word in line


def test_command_runs_as_a_module(tmp_path):
    printed = command("-m", "models.releases", "fetch", "biformer_tiny", DEBIFORMER_HOME=str(tmp_path))
    assert (printed.returncode, printed.stdout) == (2, "")
    (line,) = printed.stderr.strip().splitlines()
    assert line.startswith("models.releases: error: cannot get the released weights of biformer_tiny")


def test_command_help_names_places_and_variables(run):
    code, printed, _ = run("--help")
    assert code == 0
    for word in ("list", "fetch", "add", "verify", "DEBIFORMER_HOME", "DEBIFORMER_RELEASES", "--load_release"):
        assert word in printed


def test_add_refuses_weights_of_another_model(tmp_path):
    file = save_as_authors(tmp_path / "x.pth", timm.create_model(NANO))
    assert "another model than biformer_tiny" in complaint(releases.add, file, "biformer_tiny")
    assert cached(tmp_path) == {}
