"""Hydra's side of a run: names, profiles, refusals. Jobs on a real Slurm are in slurm/test_hydra_jobs.py."""

import re
from dataclasses import fields
from itertools import pairwise

import pytest
import timm
import yaml
from support import ROOT, SMALL_RUN, command, complaint, save_as_authors, scrambled

from hydra_main import LONGEST_NAME, check_launch, check_text, run_dir, run_name, sweep_dir
from runtime.options import SlurmOptions

PUBLISHED = [
    *("data_path=./data/in1k", "input_size=224", "batch_size=128", "dist_eval=true", "+slurm=mine", "slurm.nodes=1"),
    *("slurm.ngpus=8", "model=biformer_small", "drop_path=0.15", "lr=5e-4"),
]


def test_runs_are_named_by_what_was_given():
    name = "batch_size.128-drop_path.0.15-input_size.224-lr.5e-4-model.biformer_small-slurm.ngpus.8-slurm.nodes.1"
    assert run_name(PUBLISHED) == name
    assert run_name(PUBLISHED[::-1]) == name
    assert run_dir("", PUBLISHED, "20230307-21:33:26") == f"outputs/cls/{name}/20230307-21:33:26"


def test_where_weights_come_from_is_not_part_of_the_name():
    places = ["release_dir=/weights", "release_mirror=https://mirror", "release_hub=lab/weights"]
    assert run_name([*places, "load_release=true"]) == "load_release.true"


def test_runs_of_a_sweep_have_folders_of_their_own_in_the_one_given():
    assert sweep_dir("mine", ["lr=1e-4", "output_dir=mine"], "now") == "mine/lr.1e-4/now"


def test_output_folder_that_is_given_is_used():
    assert run_dir("runs/mine", PUBLISHED, "20230307-21:33:26") == "runs/mine"


@pytest.mark.parametrize(
    "overrides",
    [["finetune=weights/tiny.pth"], [f"comment={'x' * 300}"], ["finetune=" + "ü/" * 200], ["data_set=hfds/a/b"]],
)
def test_names_fit_a_folder_and_stay_different(overrides):
    name = run_name(overrides)
    assert "/" not in name
    assert len(name.encode()) <= LONGEST_NAME
    similar = [overrides[0] + "y", overrides[0].replace("/", "_") + "y"]
    assert name not in map(run_name, [[override] for override in similar])


def test_nothing_given_still_has_a_name():
    assert run_name([]) == "default"


def test_example_profile_documents_every_key_and_its_default():
    text = (ROOT / "configs" / "slurm" / "example.yaml").read_text()
    defaults = SlurmOptions()
    assert yaml.safe_load(text) == {spec.name: getattr(defaults, spec.name) for spec in fields(SlurmOptions)}
    for spec in fields(SlurmOptions):
        assert re.search(rf"^{spec.name}: .+  # .+", text, re.M), spec.name


def hydra_overrides(images, folder):
    """SMALL_RUN as Hydra spells it."""
    plain = [*SMALL_RUN, "--data_path", str(images), "--output_dir", str(folder)]
    overrides = ["repeated_aug=false", "+model_kwargs.embed_dims=[16,32,48,64]", "+model_kwargs.depths=[1,1,1,1]"]
    pairs = pairwise(plain)
    skipped = ("--model_kwargs", "--no_repeated_aug")
    return overrides + [f"{name[2:]}={value}" for name, value in pairs if name.startswith("--") and name not in skipped]


def test_same_command_runs_here_and_in_local_processes(shared_images, tmp_path):
    for launch in ([], ["+slurm=local", "slurm.ngpus=2", "wait=true", "dist_eval=true"]):
        folder = tmp_path / str(len(launch))
        done = command("hydra_main.py", *hydra_overrides(shared_images, folder), "epochs=1", *launch)
        assert done.returncode == 0, done.stderr
        assert "Best accuracy" in done.stdout
        assert (folder / "checkpoint.pth").exists()
        assert (folder / "hydra" / "overrides.yaml").exists()


def test_released_weights_are_evaluated(shared_images, tmp_path):
    model = scrambled(timm.create_model("debiformer_tiny", num_classes=4), 1)
    file = save_as_authors(tmp_path / "weights" / "debiformer_tiny.pth", model)
    overrides = ["model=debiformer_tiny", "load_release=true", f"release_dir={file.parent}", "eval=true"]
    overrides += [f"data_path={shared_images}", "input_size=64", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    done = command("hydra_main.py", *overrides, "num_workers=0")
    assert done.returncode == 0, done.stderr
    assert "Acc@1" in done.stdout
    assert "untrained" not in done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epochz=3"], ["unknown option epochz", "epochs"]),
        (["+foo=3"], ["unknown option foo"]),
        (["slurm=local"], ["+slurm="]),
        (["+slurm=local", "slurm.extra.foo=3"], ["+slurm.extra.foo="]),
        (["epochs=many"], ["epochs=many"]),
        (["+slurm=nowhere"], ["no slurm 'nowhere'", "example, local"]),
        (["+slurm=local", "slurm.ngpus=0"], ["slurm.ngpus must be at least 1"]),
        (["+slurm=local", "slurm.partitionn=a"], ["did you mean partition"]),
        (["+slurm=local", "slurm.nodes=2"], ["one machine only"]),
        (["+slurm=example", "slurm.ddp_comm_mode=file"], ["slurm.share_root"]),
        (["+recipe=huge"], ["no recipe 'huge'", "debiformer_small"]),
        (["amp=fp8"], ["--amp"]),
        (["model_kwargs={depths:[2,2]}"], ["write +model_kwargs.NAME=VALUE"]),
        (["output_dir=/proc/run"], ["cannot write to /proc/run"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, overrides, words):
    done = command(ROOT / "hydra_main.py", "model=debiformer_nano", *overrides, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    for word in ("hydra_main.py: error: ", *words):
        assert word in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"comment": "week\n30"}, r"slurm.comment='week\\n30' holds a line break or control character"),
        ({"partition": "long\n"}, r"slurm.partition='long\\n'"),
        ({"job_name": "a\x1b[2J"}, r"slurm.job_name='a\\x1b\[2J'"),
        ({"mem": "1G\r"}, "slurm.mem"),
        ({"exclude_node": "n1\u2028"}, "slurm.exclude_node"),
        ({"extra": {"comment": "a\nrm"}}, "slurm.extra.comment"),
        ({"extra": {"comment\n#SBATCH": 1}}, "is no option of sbatch"),
        ({"extra": {"comment=x": 1}}, "is no option of sbatch"),
        ({"extra": {1: 2}}, "'1' is no option of sbatch"),
        ({"extra": {"licenses": ["a"]}}, "slurm.extra.licenses must be a text, a number or true"),
        ({"extra": {"licenses": None}}, "slurm.extra.licenses must be a text, a number or true"),
    ],
)
def test_check_launch_refuses_what_is_more_than_a_line_of_the_script(setting, words):
    assert re.search(words, complaint(check_launch, SlurmOptions(**setting)))


def test_check_text_takes_plain_options():
    extra = {"reservation": "week 30", "gpu-bind": "map:0,1", "exclusive": True, "nice": 3}
    check_text(SlurmOptions(comment="für Läufe: 'a' \"b\" $c #d", extra=extra))


def test_without_slurm_installed_the_remedy_is_named(tmp_path):
    done = command(ROOT / "hydra_main.py", "model=debiformer_nano", "+slurm=example", cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 2
    assert "use +slurm=local" in done.stderr
