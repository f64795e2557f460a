"""Whole runs."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from support import ROOT, SMALL_RUN, command, run_until_stopped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
import main
from models import DeBiFormer
from models.pixels import Pixels
from models.weights import load_checkpoint
from runtime.checkpoint import BEST, LAST
from runtime.distributed import DistInfo
from runtime.errors import NonFiniteLoss, Stopped, UsageError
from runtime.lock import lock, unlock
from runtime.preemption import Request, handle_signals
from tasks.classification.teacher import build_teacher

TIMINGS = ("seconds",)


def weights(folder, name=LAST, key="model"):
    return load_checkpoint(folder / name)[key]


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def log_of(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def points_of(folder):
    events = EventAccumulator(str(folder / "tf_record_log"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def small_command(images, folder, *argv):
    return ["main.py", *SMALL_RUN, "--data_path", images, "--output_dir", folder, *argv]


# -- what a run leaves


def test_run_leaves_what_its_user_looks_for(run_small, capsys):
    folder = run_small("--mixup", "0.8", "--epochs", "3")
    printed = capsys.readouterr().out
    names = {"checkpoint.pth", "best.pth", "log.txt", "curves.png", "options.yaml", "tf_record_log"}
    assert names <= set(os.listdir(folder))
    for name in names:
        assert str(folder / name) in printed
    assert yaml.safe_load((folder / "options.yaml").read_text())["mixup"] == 0.8
    log = log_of(folder)
    assert [record["epoch"] for record in log] == [0, 1, 2]
    assert {"train_loss", "train_lr", "test_acc1", "test_acc5", "test_loss", "test_ema_acc1", "n_parameters"} <= set(
        log[0]
    )
    assert re.search(r"^\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}$", printed, re.M)
    assert re.search(r"^Accuracy of the network on the 20 test images: \d+\.\d%$", printed, re.M)
    points = points_of(folder)
    assert [step for step, _ in points["lr"]] == [333, 667, 1000, 1333, 1667, 2000, 2333, 2667, 3000]
    assert [step for step, _ in points["perf/test_acc1"]] == [0, 1, 2]
    assert {"loss", "perf/test_acc5", "perf/test_loss"} <= points.keys()


def test_better_of_weights_and_average_is_kept(run_small):
    folder = run_small("--epochs", "4")
    log = log_of(folder)
    best = load_checkpoint(folder / BEST)
    every = [(record[f"{name}_acc1"], name) for record in log for name in ("test", "test_ema")]
    assert best["best"]["acc1"] == max(every)[0]
    assert best["classes"] == ["cat", "dog", "owl", "pig"]
    metrics = main.run(
        main.parse_args(
            [
                *SMALL_RUN,
                *map(str, ["--data_path", best["args"]["data_path"]]),
                "--eval",
                "--resume",
                str(folder / BEST),
            ]
        )
    )
    assert metrics["acc1"] == best["best"]["acc1"]


def test_average_of_a_checkpoint_can_be_evaluated(run_small, small_options):
    folder = run_small()
    last = log_of(folder)[-1]
    for switch, name in (([], "test_loss"), (["--use_ema"], "test_ema_loss")):
        metrics = main.run(small_options("--eval", "--resume", str(folder / LAST), *switch))
        assert metrics["loss"] == pytest.approx(last[name])


def test_fusing_changes_no_figure(run_small, small_options, monkeypatch):
    folder = run_small("--epochs", "1")
    evaluate, norms = main.evaluate, []

    def watched(task, model, *args, **kwargs):
        norms.append(sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()))
        return evaluate(task, model, *args, **kwargs)

    monkeypatch.setattr(main, "evaluate", watched)
    plain, fused = (
        main.run(small_options("--eval", "--resume", str(folder / LAST), *switch)) for switch in ([], ["--fuse"])
    )
    assert norms == [6, 1]
    assert fused == pytest.approx(plain, rel=1e-5)


# -- the same numbers again


def test_two_runs_give_identical_weights(small_options):
    folders = []
    for number in range(2):
        options = small_options("--aa", "rand-m9-mstd0.5-inc1", "--drop_path", "0.3", "--drop", "0.1")
        options.output_dir += str(number)
        torch.manual_seed(number)
        main.run(options)
        folders.append(main.Path(options.output_dir))
    for key in ("model", "model_ema"):
        assert_same_weights(*(weights(folder, key=key) for folder in folders))
    assert log_of(folders[0]) == log_of(folders[1])


@pytest.mark.parametrize("updates", [4, 6, 9, 12])
@pytest.mark.parametrize(
    "extra", [[], ["--accum_steps", "3", "--amp", "bf16", "--clip_grad", "1"]], ids=["plain", "accumulating"]
)
def test_stopped_run_goes_on_as_if_nothing_had_happened(small_options, monkeypatch, updates, extra):
    argv = ["--epochs", "3", "--mixup", "0.5", "--drop_path", "0.2", "--print_freq", "1", *extra]
    whole = small_options(*argv)
    whole.output_dir += "-whole"
    main.run(whole)
    stopped = small_options(*argv)
    run_until_stopped(stopped, updates if not extra else updates // 3, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main.run(stopped)
    one, two = main.Path(whole.output_dir), main.Path(stopped.output_dir)
    for key in ("model", "model_ema"):
        assert_same_weights(weights(one, key=key), weights(two, key=key))
    assert log_of(one) == log_of(two)
    assert points_of(one) == points_of(two)


def test_run_stopped_while_it_evaluates_goes_on_there(small_options, monkeypatch):
    whole = small_options()
    whole.output_dir += "-whole"
    main.run(whole)
    stopped, evaluate = small_options(), engine.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", interrupted)
        with pytest.raises(Stopped):
            main.run(stopped)
    stood = load_checkpoint(main.Path(stopped.output_dir) / LAST)
    assert (stood["epoch"], stood["position"], stood["evaluated"]) == (1, 0, False)
    main.run(stopped)
    one, two = main.Path(whole.output_dir), main.Path(stopped.output_dir)
    assert_same_weights(weights(one), weights(two))
    assert log_of(one) == log_of(two)


def test_resuming_after_an_epoch_equals_not_stopping(run_small, small_options):
    whole = small_options("--epochs", "3", "--warmup_epochs", "0", "--sched", "constant")
    whole.output_dir += "-whole"
    main.run(whole)
    constant = ("--warmup_epochs", "0", "--sched", "constant")
    run_small("--epochs", "1", *constant)
    run_small("--epochs", "2", *constant)
    folder = run_small("--epochs", "3", *constant)
    assert_same_weights(weights(main.Path(whole.output_dir)), weights(folder))
    assert log_of(main.Path(whole.output_dir)) == log_of(folder)


def test_prolonged_run_follows_the_options_given_now(run_small):
    run_small("--epochs", "2", "--lr", "1e-3")
    folder = run_small("--epochs", "4", "--lr", "2e-3")
    lowest, highest = 1e-5, 2e-3 * 8 / 512
    assert log_of(folder)[2]["train_lr"] == pytest.approx((lowest + highest) / 2)  # half the cosine over 4 epochs


def test_finished_run_is_not_trained_again(run_small):
    folder = run_small()
    before = weights(folder)
    folder = run_small()
    assert_same_weights(before, weights(folder))
    assert len(log_of(folder)) == 2


def test_clock_writes_checkpoints_within_an_epoch(small_options, monkeypatch):
    places, save = [], main.RunFolder.save
    monkeypatch.setattr(
        main.RunFolder, "save", lambda self, content: (places.append(content["position"]), save(self, content))
    )
    main.run(small_options("--epochs", "1", "--checkpoint_minutes", "1e-9"))
    assert places[:6] == [8, 16, 24, 32, 40, 0]


# -- fine-tuning, distillation, other models


def test_finetuning_from_a_run_of_another_size(run_small, small_options, capsys):
    folder = run_small("--epochs", "1")
    options = small_options(
        "--finetune", str(folder / BEST), "--input_size", "64", "--epochs", "1", "--num_classes", "6"
    )
    options.output_dir += "-tuned"
    main.run(options)
    assert "newly initialised: head.weight, head.bias" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_from_a_teacher(small_options, tmp_path, kind):
    torch.save(timm.create_model("resnet10t", num_classes=4).state_dict(), tmp_path / "teacher.pth")
    teacher = ("--teacher_model", "resnet10t", "--teacher_path", str(tmp_path / "teacher.pth"))
    options = small_options("--epochs", "1", "--distillation_type", kind, *teacher)
    main.run(options)
    plain = small_options("--epochs", "1")
    plain.output_dir += "-plain"
    main.run(plain)
    taught, untaught = (log_of(main.Path(o.output_dir))[0]["train_loss"] for o in (options, plain))
    assert taught != untaught


def test_teacher_has_to_know_the_classes(small_options, monkeypatch):
    create = timm.create_model
    options = small_options("--distillation_type", "soft", "--teacher_model", "resnet10t")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    with pytest.raises(UsageError, match="resnet10t knows 1000 classes, the data has 4; pass the --teacher_path"):
        main.run(options)
    options.teacher_model = "resnet10t.no_such_weights"
    with pytest.raises(UsageError, match=r"cannot be had \(Invalid pretrained tag \(no_such_weights\) for resnet10t"):
        main.run(options)
    options.teacher_model = "resnet10t"

    def offline(name, **kwargs):
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"cannot be had \(Max retries exceeded\); pass --teacher_path"):
        build_teacher(options, 4, Pixels(), torch.device("cpu"))


def test_compiled_training_agrees(small_options, monkeypatch):
    compile = torch.nn.Module.compile

    def without_code_generation(self, **kwargs):  # which takes minutes; models/test_execution.py goes through with it
        compile(self, backend="aot_eager", fullgraph=True, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    torch._dynamo.reset()  # what other tests compiled
    folders = []
    for switch in ("--no_compile", "--compile"):
        options = small_options(switch, "--epochs", "1")
        options.output_dir += switch
        main.run(options)
        folders.append(main.Path(options.output_dir))
    torch.testing.assert_close(weights(folders[0]), weights(folders[1]), rtol=1e-2, atol=1e-3)


def test_going_on_with_another_architecture_is_refused_for_that(run_small, small_options):
    run_small("--epochs", "1")
    with pytest.raises(UsageError, match=r"checkpoint has 1 block in stage 3, debiformer_nano has 2"):
        main.run(small_options("--epochs", "2", "--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,2,1"))


def test_evaluating_other_images_than_trained_on_is_told(run_small, small_options, capsys):
    best = str(run_small("--epochs", "1") / BEST)
    capsys.readouterr()
    main.run(small_options("--eval", "--resume", best))
    assert "note:" not in capsys.readouterr().err
    main.run(small_options("--eval", "--resume", best, "--input_size", "64", "--crop_pct", "0.5"))
    assert "note: trained with --input_size 32" in capsys.readouterr().err


def test_compiled_evaluation_agrees(run_small, small_options, monkeypatch):
    folder, compiled = run_small("--epochs", "1"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append((type(self), kwargs)))
    for switch in ("--no_compile", "--compile"):
        main.run(small_options("--eval", "--resume", str(folder / BEST), switch))
    assert compiled == [(DeBiFormer, {"dynamic": False})]


def test_backend_of_the_attention_is_told_once(shared_images, tmp_path):
    printed = command(*small_command(shared_images, tmp_path / "run", "--epochs", "2"))
    assert printed.stderr.splitlines().count("attention backend: torch (Triton is for GPUs)") == 1


# -- processes


LAUNCHERS = {
    "launch": ["-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={20000 + os.getpid() % 10000}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_train_and_evaluate(shared_images, tmp_path, launcher):
    run = small_command(shared_images, tmp_path / "run", "--epochs", "1", "--dist_eval")
    printed = command(*LAUNCHERS[launcher], *run)
    assert printed.returncode == 0, printed.stderr
    assert "updates of 16, 2 process(es)" in printed.stdout
    assert printed.stdout.count("* Acc@1") == 2  # of the weights and of their average, by one process


def test_split_evaluation_prints_the_same_line_for_any_number_of_processes(tmp_path):
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        for split in ("train", "val") if number < 10 else ("val",):
            (tmp_path / split / str(digit)).mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / split / str(digit) / f"{number}.png")
    lines = set()
    for processes in (1, 2, 3, 4):
        run = small_command(tmp_path, tmp_path / "run", "--eval", "--dist_eval", "--batch_size", "100")
        printed = command("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *run)
        assert printed.returncode == 0, printed.stderr
        lines.add("\n".join(line for line in printed.stdout.splitlines() if "Acc" in line))
    assert len(lines) == 1
    assert "on the 1797 test images" in lines.pop()


# -- ends


def test_divergence_stops_with_1_and_keeps_the_last_good_checkpoint(run_small, shared_images):
    folder = run_small("--epochs", "1")
    before = (folder / LAST).read_bytes()
    run = small_command(
        shared_images, folder, "--epochs", "3", "--lr", "1e30", "--clip_grad", "none", "--warmup_epochs", "0"
    )
    printed = command(*run)
    assert printed.returncode == 1
    last = printed.stderr.strip().splitlines()[-1]
    assert re.match(r"main.py: error: the loss is not finite at epoch 2, update \d;", last)
    assert (folder / LAST).read_bytes() == before


def test_weights_that_an_epochs_last_update_broke_are_not_saved(small_options, monkeypatch):
    """The loss of that update is still good."""
    main.run(small_options("--epochs", "1"))
    options, step = small_options("--epochs", "2"), main.TrainStep.step
    before = (main.Path(options.output_dir) / LAST).read_bytes()

    def break_the_last(self, batches, epoch, update, meter):
        loss = step(self, batches, epoch, update, meter)
        if update == 5:
            next(self.model.parameters()).data[0] = torch.inf
        return loss

    monkeypatch.setattr(main.TrainStep, "step", break_the_last)
    with pytest.raises(NonFiniteLoss, match="the weights are not finite after an update of epoch 2;"):
        main.run(options)
    assert (main.Path(options.output_dir) / LAST).read_bytes() == before


def test_divergence_is_an_error_in_python_too(small_options):
    with pytest.raises(NonFiniteLoss):
        main.run(small_options("--lr", "1e30", "--clip_grad", "none", "--warmup_epochs", "0"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(shared_images, tmp_path, workers):
    run = small_command(shared_images, tmp_path / "run", "--epochs", "1000", "--num_workers", workers)
    process = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, *map(str, run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "update" in line and "epoch" in line and "loss" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert "To go on: python main.py --recipe " in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / LAST)["epoch"] >= 0


def test_closing_the_terminal_leaves_a_checkpoint(shared_images, tmp_path):
    run = small_command(shared_images, tmp_path / "run", "--epochs", "1000", "--num_workers", "2")
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        ["env", "--default-signal=HUP", "setsid", "--ctty", sys.executable, *map(str, run)],
        cwd=ROOT,
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    shown = b""
    while b"loss" not in shown:
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.wait(timeout=120) == 75
    assert weights(tmp_path / "run")


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals() as handler:
            handler.begin_training(DistInfo())
            signal.raise_signal(signal.SIGHUP)
            assert handler.sync() == Request.NOTHING
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data_path", "/nowhere", "--model", "debiformer_nano"], ["/nowhere does not exist"]),
        (["--model", "debiformer_tinny", "--data_set", "DIGITS"], ["debiformer_tinny", "debiformer_tiny"]),
        (["--model_kwargs", "n_windows=3"], ["debiformer_nano", "n_windows"]),
        (["--resume", "/nowhere.pth"], ["/nowhere.pth does not exist"]),
        (["--finetune", __file__], ["test_main.py is not a checkpoint"]),
        (["--eval", "--resume", __file__], ["test_main.py is not a checkpoint"]),
        (["--device", "gpu"], ["--device 'gpu'"]),
        (["--output_dir", "/proc/run"], ["cannot write to /proc/run"]),
        (["--opt", "adamx"], ["unknown --opt 'adamx'", "did you mean --opt ada"]),
        (["--sched", "sine"], ["--sched"]),
        (["--load_release", "--eval"], ["no released weights of debiformer_nano are known"]),
        (["--load_release", "--resume", "a.pth"], ["--resume and --load_release", "leave one out"]),
        (["--load_release", "--finetune", "a.pth"], ["--finetune and --load_release", "leave one out"]),
        (["--batch_size", "2000"], ["lower --batch_size"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, argv, words):
    printed = command(str(ROOT / "main.py"), *argv, cwd=tmp_path)
    assert printed.returncode == 2, printed.stderr
    (line,) = printed.stderr.strip().splitlines()
    assert line.startswith("main.py: error: ")
    for word in words:
        assert word in line


def test_folder_of_another_run_is_not_overwritten(run_small):
    folder = run_small("--epochs", "1")
    before = (folder / LAST).read_bytes()
    with pytest.raises(UsageError, match="is of debiformer_nano, not of biformer_tiny"):
        run_small("--model", "biformer_tiny", "--model_kwargs", "depths=1,1,1,1")
    assert (folder / LAST).read_bytes() == before


def test_another_order_of_images_midway_an_epoch_is_refused(small_options, monkeypatch):
    run_until_stopped(small_options(), 3, monkeypatch)
    with pytest.raises(UsageError, match=r"seed was 0, is 1"):
        main.run(small_options("--seed", "1"))
    with pytest.raises(UsageError, match=r"total batch was 8, is 16"):
        main.run(small_options("--batch_size", "16"))


def test_mistake_that_comes_out_late_overwrites_nothing(run_small, shared_images):
    folder = run_small("--epochs", "1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command(*small_command(shared_images, folder, "--sched", "nope"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_runs_may_share_a_tensorboard_folder(run_small, small_options, tmp_path):
    shared = tmp_path / "events"
    run_small("--epochs", "1", "--log_dir", str(shared))
    (first,) = shared.iterdir()
    for _ in range(2):
        main.run(small_options("--epochs", "1", "--log_dir", str(shared), "--output_dir", str(tmp_path / "other")))
    assert first in shared.iterdir()
    assert len(list(shared.iterdir())) == 2


def test_tensorboard_folder_that_cannot_be_made_is_named(small_options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}/file: File exists; choose another --output_dir or"):
        main.run(small_options("--log_dir", str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("argv", "words"), [(["--opt", "sgd"], "trained with --opt adamw"), (["--data_path"], "trained on other classes")]
)
def test_run_goes_on_only_as_what_it_was(run_small, image_folder, argv, words):
    run_small("--epochs", "1")
    if argv == ["--data_path"]:
        for split in ("train", "val"):
            (image_folder / split / "cat").rename(image_folder / split / "ape")
        argv = ["--data_path", str(image_folder)]
    with pytest.raises(UsageError, match=words):
        run_small("--epochs", "2", *argv)


# -- the folder is the truth


def test_folders_checkpoint_goes_before_resume(small_options, run_small, capsys):
    other = small_options(
        "--epochs", "1", "--output_dir", str(main.Path(small_options().output_dir).with_name("other"))
    )
    main.run(other)
    elsewhere = main.Path(other.output_dir) / LAST
    folder = run_small("--resume", str(elsewhere))  # the first time, there is no other
    assert f"Continuing from {elsewhere}: epoch 2, image 0" in capsys.readouterr().out
    run_small("--resume", str(elsewhere), "--epochs", "3")
    told = capsys.readouterr()
    assert f"Continuing from {folder / LAST}: epoch 3, image 0" in told.out
    assert f"note: going on from {folder / LAST}, not from --resume {elsewhere}" in told.err
    run_small("--resume", str(elsewhere), "--no_auto_resume")
    assert f"Continuing from {elsewhere}: epoch 2, image 0" in capsys.readouterr().out


def test_stopped_run_prints_a_command_that_goes_on(small_options, monkeypatch):
    options = small_options()
    stopped = run_until_stopped(options, 2, monkeypatch)
    words = shlex.split(str(stopped).partition("To go on: ")[2])
    assert words[:2] == ["python", "main.py"]
    again = main.parse_args(words[2:])
    again.recipe = options.recipe
    assert again == options
    assert [record["epoch"] for record in [main.run(again)]] == [1]


def test_mistake_leaves_no_folder(small_options):
    options = small_options()
    options.sched = "nope"
    with pytest.raises(UsageError):
        main.run(options)
    assert not main.Path(options.output_dir).exists()


def test_second_run_in_a_folder_is_refused(run_small):
    folder = run_small("--epochs", "1")
    held = lock(folder)
    try:
        with pytest.raises(UsageError, match="a run is going on in"):
            run_small()
    finally:
        unlock(folder, held)
    run_small()


def test_another_number_of_images_is_noticed(image_folder, small_options, monkeypatch, capsys):
    here = ("--data_path", str(image_folder), "--batch_size", "10")
    run_until_stopped(small_options(*here), 2, monkeypatch)
    shutil.copy(image_folder / "train" / "cat" / "0.png", image_folder / "train" / "cat" / "new.png")
    with pytest.raises(UsageError, match="whose order of images would change: images was 48, is 49"):
        main.run(small_options(*here))
    (image_folder / "train" / "cat" / "new.png").unlink()
    main.run(small_options(*here))
    shutil.copy(image_folder / "train" / "cat" / "0.png", image_folder / "train" / "cat" / "new.png")
    main.run(small_options(*here, "--epochs", "3"))
    assert "note: the data had 48 training images when" in capsys.readouterr().err


def test_resumed_checkpoint_does_not_stay_in_memory(run_small, monkeypatch):
    run_small("--epochs", "1")
    step, held = main.TrainStep.step, []

    def counted(self, *args):
        gc.collect()
        held.extend(each for each in gc.get_objects() if type(each) is dict and type(each.get("optimizer")) is dict)
        return step(self, *args)

    monkeypatch.setattr(main.TrainStep, "step", counted)
    run_small("--epochs", "2")
    assert held == []


def test_earlier_versions_checkpoint_before_evaluation_goes_on(small_options, run_small):
    """It stood at the last image of the epoch, and may go on with another batch."""
    folder = run_small("--epochs", "1")
    content = load_checkpoint(folder / LAST)
    content.pop("evaluated")
    content["data"].pop("images")
    content["history"]["epochs"].clear()
    torch.save({**content, "epoch": 0, "position": 48}, folder / LAST)
    run_small("--epochs", "2", "--batch_size", "12")
    log = log_of(folder)
    assert [record["epoch"] for record in log] == [0, 1]
    assert log[0]["train_loss"] > 0


def test_tensorboard_that_cannot_write_is_left_out(small_options, monkeypatch, tmp_path, capfd):
    step = main.TrainStep.step

    def remove_events(self, *args):
        shutil.rmtree(tmp_path / "events", ignore_errors=True)
        return step(self, *args)

    monkeypatch.setattr(main.TrainStep, "step", remove_events)
    options = small_options("--log_dir", str(tmp_path / "events"), "--epochs", "3")
    main.run(options)
    told = capfd.readouterr().err
    assert told.count("warning: TensorBoard's files in") == 1
    assert "Traceback" not in told
    assert len(log_of(main.Path(options.output_dir))) == 3
