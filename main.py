"""Train and evaluate: python main.py --help."""

from runtime.preemption import PreemptionHandler, handle_signals

if __name__ == "__main__":
    PreemptionHandler().install()  # before imports that take seconds

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import ImageNetInfo
from torch import nn

import models
import utils
from engine import Precision, Run, TrainStep, evaluate, unwrapped
from models.labels import class_names
from models.weights import AUXILIARY, WeightsError, load_checkpoint, load_for_inference, options_of, weights_of
from models.weights.releases import Places, find_release
from optim_factory import build_ema, build_optimizer, build_scheduler, check_training, training_notes
from runtime.agreement import decide
from runtime.checkpoint import TrainingState, held_out_of
from runtime.distributed import find_processes, process_group
from runtime.errors import UsageError, exit_on_error, explain_dead_workers, message_of, note
from runtime.meters import LossMeter
from runtime.model import check_model_name, freeze
from runtime.options import RunOptions, inert_notes
from runtime.resume import find_checkpoint, go_on, how_to_go_on, name_folder, open_folder
from runtime.run_folder import RunFolder
from runtime.run_log import Progress, RunLog, describe, show_notices, summarise, write_options
from tasks import Task, find_task
from tasks.loading import Data, build_data
from tasks.options import Options, parse_args

if TYPE_CHECKING:
    from visualize.insight import Watcher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def run(options: Options) -> dict[str, Any]:
    """Run from start to end, on every process. Returns the figures of the last evaluation."""
    with handle_signals(), utils.deterministic_algorithms(options.deterministic):
        info = find_processes()
        device = utils.choose_device(options.device, info)
        utils.seed_everything(options.seed)
        show_notices(info)
        try:
            check_model_name(options.model, "--model")
            task = find_task(options.task)(options, info, device)
            task.check()
            with explain_dead_workers(), process_group(info, device, options.dist_url, COLLECTIVE_TIMEOUT):
                return (evaluate_only if options.eval else train)(options, task)
        except WeightsError as error:
            raise UsageError(message_of(error)) from error


def evaluate_only(options: Options, task: Task) -> dict[str, Any]:
    """Evaluate a checkpoint, or an untrained model."""
    content = load_checkpoint(options.resume) if options.resume else {}
    trained, task.held_out = class_names(content), held_out_of(content)
    data = build_data(task, options, trained)
    model = task.build_model()
    path = release_of(options, model) if options.load_release else options.resume
    if path:
        content, known = content or load_checkpoint(path), set(model.state_dict())
        weights = weights_of(content, path, options.use_ema, auxiliary=True)
        used = {name: value for name, value in weights.items() if name in known or not name.startswith(AUXILIARY)}
        load_for_inference(model, used, path, resample=True)
    if task.info.is_main:
        lines = task.notes(options_of(content), trained) if options.resume else []
        for line in inert_notes(options) + lines:
            note(line)
        if not path:
            print("Neither --resume nor --load_release given: these are untrained weights")
    if options.fuse:
        model = models.fuse(model.eval())
    model.to(task.device, memory_format=torch.channels_last)
    if options.compile:
        model.compile(dynamic=False)
    metrics = evaluate(task, model, data.val, precision_of(options, task.device), data.dist_eval)
    if task.info.is_main:
        print("\n".join(task.report(metrics)), flush=True)
    return metrics


def train(options: Options, task: Task) -> dict[str, Any]:
    """Train up to `options.epochs` epochs, from scratch or from a checkpoint, evaluating after each."""
    info = task.info
    check_training(options, options.batch_size * info.world_size * options.accum_steps)
    path = name_folder(options.output_dir, options.model, info)
    with open_folder(RunFolder(path, options.save_every, options.keep), info) as folder:
        checkpoint = find_checkpoint(folder, options.resume, options.auto_resume, info)
        first = None if checkpoint else first_checkpoint(options)
        trained = classes_before(options, checkpoint[0] if checkpoint else first)
        task.held_out = held_out_of(checkpoint[0]) if checkpoint else []
        data = build_data(task, options, trained)
        model = task.build_model()
        if first is not None:
            load_first_weights(options, task, model, first, trained)
        model.to(task.device, memory_format=torch.channels_last)
        step = build_step(options, task, model, data)
        state = build_state(options, step, data, folder)
        if checkpoint is not None:
            go_on(state, *checkpoint, folder, info, midway=not data.streamed)
            checkpoint = None  # it takes as much memory as the training does
        run = build_run(options, step, state, data, folder)
        begin(options, run)
        run.train()
        return end(run)


# -- pieces of a run ----------------------------------------------------------------------------------------------


def first_checkpoint(options: Options) -> dict[str, Any] | None:
    """What --finetune names, or --load_release (which needs no reading yet: {}); None without either."""
    return load_checkpoint(options.finetune) if options.finetune else {} if options.load_release else None


def classes_before(options: Options, content: dict[str, Any] | None) -> list[str]:
    """The names of the classes that the weights to start from were trained on; [] if nothing says."""
    if content == {} and options.load_release:
        return ImageNetInfo().label_names()
    return class_names(content or {})


def load_first_weights(
    options: Options, task: Task, model: nn.Module, content: dict[str, Any], trained: Sequence[str]
) -> None:
    """Start from the weights of --finetune or --load_release."""
    path = options.finetune or release_of(options, model)
    weights = weights_of(content or load_checkpoint(path), path, options.use_ema)
    fresh = task.load_pretrained(model, weights, trained, path)
    if task.info.is_main:
        print(f"Fine-tuning from {path}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else ""))


def release_of(options: RunOptions, model: nn.Module) -> Path:
    """The file with the weights published for a model, downloaded if need be. WeightsError if there is none."""
    places = Places(options.release_dir, options.release_mirror, options.release_hub)
    return find_release(model.default_cfg["architecture"], places)


def build_step(options: Options, task: Task, model: nn.Module, data: Data) -> TrainStep:
    """What updates the weights."""
    frozen = freeze(model, options.freeze) if options.freeze else []
    ema = build_ema(model, options)
    if options.compile:
        model.compile(dynamic=False)  # training and evaluation have few, fixed shapes
    step = TrainStep(
        task,
        model,
        build_optimizer(model, options, data.total_batch),
        precision_of(options, task.device),
        task.info,
        ema=ema,
        clip_grad=options.clip_grad or None,
        accum_steps=options.accum_steps,
        seed=options.seed,
        updates=data.updates,
        train_mode=not options.finetune_eval_mode,
        frozen=frozen,
    )
    if task.info.distributed:
        step.distribute(data.first_batch())
    return step


def build_state(options: Options, step: TrainStep, data: Data, folder: RunFolder) -> TrainingState:
    """The state of a training that has not begun."""
    task, log_dir = step.task, options.log_dir and Path(options.log_dir)
    folders = (folder.path, log_dir or folder.path / "tf_record_log") if task.info.is_main else (None, None)
    return TrainingState(
        unwrapped(step.model),
        step.optimizer,
        step.precision.scaler,
        meter=LossMeter(task.device, task.info),
        history=RunLog(*folders, figures=task.figures, title=task.title),
        args=asdict(options),
        classes=list(task.classes),
        held_out=list(task.held_out),
        data={
            "images per epoch": data.epoch_images,
            "total batch": data.total_batch,
            "images": data.images,
            "seed": options.seed,
            **task.order(),
        },
        model_ema=step.ema and step.ema.module,
        epoch=options.start_epoch,
    )


def build_run(options: Options, step: TrainStep, state: TrainingState, data: Data, folder: RunFolder) -> Run:
    """The training itself."""
    task = step.task
    shown, remarks = task.info.is_main, partial(data.remarks, task.info)
    return Run(
        step,
        build_scheduler(step.optimizer, options, options.epochs * data.updates),
        state,
        data,
        folder,
        Progress(options.epochs, data.updates, data.total_batch, options.print_freq, task.device, shown, remarks),
        epochs=options.epochs,
        checkpoint_minutes=options.checkpoint_minutes,
        watcher=build_watcher(options, task, data, state.model),
        watch_every=options.log_attention,
        how_to_go_on=how_to_go_on(folder.path, Path(__file__), task.info),
    )


def begin(options: Options, run: Run) -> None:
    """Write and print what is about to be trained; what is wrong with a run comes out before."""
    task, data = run.step.task, run.data

    def write() -> None:
        run.folder.make()
        write_options(options, run.folder.path)
        run.state.history.start()

    decide(write, task.info)
    if task.info.is_main:
        describe(options, data, run.state.model, task.num_classes, task.info, task.device)
        lines = inert_notes(options) + training_notes(options, data.total_batch, options.epochs * data.updates)
        for line in lines + notes_on_parts(options, run):
            note(line)


def notes_on_parts(options: Options, run: Run) -> list[str]:
    """What is not trained, and what is not trained on, a line each."""
    notes, task, model = [], run.step.task, run.state.model
    if options.freeze:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        notes.append(
            f"--freeze {options.freeze}: {trained:,} of {utils.count_parameters(model):,} parameters are trained"
        )
    if task.held_out:
        notes.append(f"{len(task.held_out)} of the training images are kept for evaluation")
    return notes


def end(run: Run) -> dict[str, Any]:
    """Close the log and say where everything is. Returns the figures of the last evaluation."""
    history, task = run.state.history, run.step.task
    history.close()
    if task.info.is_main:
        summarise(run.state, run.folder.path, task.metric, task.title)
    return history.epochs[-1] if history.epochs else {}


def build_watcher(options: Options, task: Task, data: Data, model: nn.Module) -> "Watcher | None":
    """What looks at the attention for --log_attention, on the main process. UsageError if there is none to see."""
    if not options.log_attention:
        return None
    from visualize.insight import IMAGES, Watcher, check_readable

    check_readable(model, f"--log_attention: {options.model}")
    watched = torch.stack(list(data.watched(IMAGES)))
    return Watcher(model, options.model, watched, task.pixels) if task.info.is_main else None


def precision_of(options: RunOptions, device: torch.device) -> Precision:
    """The number format of --amp; the published scripts always used fp16, on GPUs."""
    amp = options.amp if options.amp != "auto" else "fp16" if device.type == "cuda" else "none"
    return Precision(device, utils.AMP_DTYPES[amp])


if __name__ == "__main__":
    exit_on_error("main.py", lambda: run(parse_args()))
