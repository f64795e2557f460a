"""Train and evaluate: python main.py --help."""

from runtime.preemption import PreemptionHandler, Request, handle_signals

if __name__ == "__main__":
    PreemptionHandler().install()  # before imports that take seconds

import os
import sys
import tempfile
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
import utils
from checkpoint import BEST, LAST, TrainingState, build_checkpoint, load_latest, save_checkpoint
from datasets import Data, build_data
from engine import LossMeter, Precision, Stepper, check_weights, evaluate, normalized, train_one_epoch
from errors import Stopped, UsageError, did_you_mean, exit_on_error, explain_dead_workers
from eval_sets import TITLES, open_eval_set
from models.releases import Places, find_release
from models.weights import (
    checkpoint_filter_fn,
    load_checkpoint,
    load_to_finetune,
    load_weights,
    options_of,
    weights_of,
)
from optim_factory import build_loss, build_optimizer, build_scheduler
from options import Options, mixing, parse_args, to_plain
from run_log import Progress, RunLog, describe, report, show_notices, summarise, write_options
from utils import Processes

if TYPE_CHECKING:
    from visualize.insight import Watcher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(options: Options) -> dict[str, Any]:
    """One run from start to end, on every process. Returns the figures of its last evaluation."""
    with handle_signals():
        processes = utils.find_processes()
        device = utils.choose_device(options.device, processes)
        torch.backends.cudnn.benchmark = True
        utils.seed_everything(options.seed)
        show_notices(processes)
        with explain_dead_workers(), utils.process_group(processes, device, options.dist_url, COLLECTIVE_TIMEOUT):
            return (evaluate_only if options.eval else train)(options, processes, device)


def evaluate_only(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Accuracy of a checkpoint, or of an untrained model."""
    other = None if options.eval_set == "val" else open_eval_set(options)
    data = build_data(options, processes, device, other)
    model = build_model(options, data.num_classes)
    if options.load_release:
        path = release_of(options, model)
        load_weights(model, checkpoint_filter_fn(read_weights(options, path), model), path)
    elif options.resume:
        content = load_checkpoint(options.resume)
        weights = checkpoint_filter_fn(weights_of(content, options.resume, options.use_ema), model)
        load_weights(model, weights, options.resume)
        if processes.is_main:
            tell_other_images(options, options_of(content))
    elif processes.is_main:
        print("Neither --resume nor --load_release given: these are untrained weights")
    if options.fuse:
        model = models.fuse(model.eval())
    model.to(device, memory_format=torch.channels_last)
    if options.compile:
        model.compile(dynamic=False)
    precision, among = precision_of(options, device), other and other.among
    metrics = evaluate(model, data.val, precision, processes, data.dist_eval, among=among)
    report(metrics, processes, f"{TITLES[options.eval_set]}: " if other else "")
    return metrics


def tell_other_images(options: Options, trained: dict[str, Any]) -> None:
    """Print how the images differ from those of the checkpoint's training, which may be meant, or forgotten."""
    names = [name for name in ("input_size", "crop_pct") if name in trained and trained[name] != getattr(options, name)]
    if names:
        there, here = (" ".join(f"--{n} {of[n]}" for n in names) for of in (trained, vars(options)))
        print(f"note: trained with {there}, evaluated with {here}", file=sys.stderr, flush=True)


def train(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Train up to `options.epochs` epochs, from scratch or from a checkpoint, evaluating after each."""
    say = print if processes.is_main else lambda *words: None
    folder = run_folder(options, processes)
    resumed = checkpoint_to_resume(options, folder)

    data = build_data(options, processes, device)
    model = build_model(options, data.num_classes)
    if resumed is None and (options.finetune or options.load_release):
        path = options.finetune or release_of(options, model)
        fresh = load_to_finetune(model, read_weights(options, path), path)
        say(f"Fine-tuning from {path}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else ""))
    model.to(device, memory_format=torch.channels_last)
    ema = None
    if options.model_ema:
        ema_device = torch.device("cpu") if options.model_ema_force_cpu else None
        ema = ModelEmaV3(model, options.model_ema_decay, device=ema_device)
    if options.compile:
        model.compile(dynamic=False)  # training and evaluation have few, fixed shapes

    optimizer = build_optimizer(model, options, data.total_batch)
    scheduler = build_scheduler(optimizer, options)
    precision = precision_of(options, device)
    stepper = Stepper(
        distribute(model, processes, options, precision),
        build_loss(options, build_teacher(options, data.num_classes, device)),
        optimizer,
        precision,
        processes,
        ema=ema,
        erase=build_erasing(options, device),
        mixup=build_mixup(options, data.num_classes),
        clip_grad=options.clip_grad,
        accum_steps=options.accum_steps,
        seed=options.seed,
    )
    state = TrainingState(
        model,
        optimizer,
        precision.scaler,
        meter=LossMeter(device, processes),
        history=RunLog(*log_folders(options, folder, processes)),
        args=to_plain(options),
        classes=data.classes,
        data={
            "images per epoch": data.epoch_images,
            "total batch": data.total_batch,
            **{name: getattr(options, name) for name in ("data_set", "seed", "repeated_aug")},
        },
        model_ema=ema and ema.module,
        epoch=options.start_epoch,
    )
    if resumed is not None:
        state.restore(*resumed)
        if data.streamed and 0 < state.position < data.epoch_images:
            state.position = 0
            state.history.forget_epoch(state.epoch)
            say("Streamed data cannot be entered midway: the epoch begins again")
        say(f"Continuing from {resumed[1]}: epoch {state.epoch + 1}, image {state.position}")
    if processes.is_main:
        write_options(options, folder)
        describe(options, data, model, device, processes)
    watcher = build_watcher(options, data, model, processes)
    state.history.start()
    train_epochs(options, processes, folder, data, stepper, scheduler, state, watcher)
    state.history.close()
    if processes.is_main:
        summarise(state, folder)
    return state.history.epochs[-1] if state.history.epochs else {}


def train_epochs(
    options: Options,
    processes: Processes,
    folder: Path,
    data: Data,
    stepper: Stepper,
    scheduler: Scheduler,
    state: TrainingState,
    watcher: "Watcher | None" = None,
) -> None:
    """The loop: from the place where `state` stands to the last epoch. Stopped if a signal ended it early."""
    meter, optimizer, saved_at = state.meter, state.optimizer, time.monotonic()
    progress = Progress(
        options.epochs, data.updates, data.total_batch, options.print_freq, stepper.precision.device, processes.is_main
    )

    def save(epoch: int, position: int) -> None:
        nonlocal saved_at
        check_weights(state.model, epoch)
        meter.gather()
        state.epoch, state.position, saved_at = epoch, position, time.monotonic()
        if processes.is_main:
            save_checkpoint(build_checkpoint(state), folder / LAST)
        requests.barrier()  # a process that leaves takes the others with it: the launcher ends them

    with handle_signals() as requests:
        requests.begin_training(processes)

        def after_update(update: int, loss: Tensor) -> bool:
            lr = optimizer.param_groups[-1]["lr"]
            progress.advance(update, loss, lr)
            if progress.due(update):
                meter.check(epoch)
                state.history.train_point(epoch + (update + 1) / data.updates, loss.item(), lr)
            overdue = options.checkpoint_minutes > 0 and time.monotonic() - saved_at > 60 * options.checkpoint_minutes
            request = requests.sync(save=overdue and processes.is_main)
            if request != Request.NOTHING:
                meter.check(epoch)
                save(epoch, (update + 1) * data.total_batch)
            return request == Request.STOP

        def after_batch(number: int) -> None:
            # The checkpoint is already written; evaluating is not worth the little time that a signal leaves.
            if number < data.val_batches and requests.sync() == Request.STOP:
                raise stopped()

        def stopped() -> Stopped:
            message = f"stopped; checkpoint in {folder}. To go on: the same options and output_dir {folder}"
            return Stopped(message, requests.signals)

        for epoch in range(state.epoch, options.epochs):
            started = time.monotonic()
            scheduler.step(epoch)
            start = data.place(epoch, state.position)
            if start == 0:
                meter.reset()
            progress.start_epoch(epoch, start)
            finished = train_one_epoch(
                stepper, data.train, meter, epoch=epoch, start=start, updates=data.updates, after_update=after_update
            )
            progress.end_epoch()
            if not finished:
                raise stopped()
            meter.check(epoch)
            save(epoch, data.epoch_images)  # so that a run killed while it evaluates loses nothing

            record = {"epoch": epoch, "train_loss": meter.average(), "train_lr": optimizer.param_groups[-1]["lr"]}
            for name, candidate in {"test": state.model, "test_ema": state.model_ema}.items():
                if candidate is None:
                    continue
                home = next(candidate.parameters()).device  # the average may live in host memory
                candidate.to(stepper.precision.device)
                utils.share_buffers(candidate, processes)
                metrics = evaluate(candidate, data.val, stepper.precision, processes, data.dist_eval, after_batch)
                candidate.to(home)
                report(metrics, processes, "averaged weights: " if name == "test_ema" else "")
                record |= {f"{name}_{figure}": metrics[figure] for figure in ("acc1", "acc5", "loss")}
                if metrics["acc1"] > state.best["acc1"]:
                    state.best = {**metrics, "epoch": epoch, "weights": name.replace("test", "model")}
                    if processes.is_main:
                        save_checkpoint(build_checkpoint(state, weights_only=candidate), folder / BEST)
            if watcher is not None and (epoch + 1) % options.log_attention == 0:
                seen = watcher.look()
                state.history.attention(seen.scalars, seen.pictures, epoch)
            record["n_parameters"] = utils.count_parameters(state.model)
            record["seconds"] = round(time.monotonic() - started, 2)
            state.history.end_epoch(record)
            save(epoch + 1, 0)


# -- pieces of a run ----------------------------------------------------------------------------------------------


def run_folder(options: Options, processes: Processes) -> Path:
    """--output_dir, or a fresh folder named by model and time; made by the main process. UsageError if it cannot be."""
    if not options.output_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UsageError("--max-restarts needs --output_dir, so that restarted processes find their checkpoint")
    name = options.output_dir or f"outputs/cls/{options.model}/{datetime.now():%Y%m%d-%H:%M:%S}"
    folder = Path(utils.broadcast_object(name, processes))
    if processes.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from error
    return folder


def log_folders(options: Options, folder: Path, processes: Processes) -> tuple[Path | None, Path | None]:
    """Where log.txt and TensorBoard's files go; nowhere on all but the main process."""
    if not processes.is_main:
        return None, None
    return folder, Path(options.log_dir or folder / "tf_record_log")


def checkpoint_to_resume(options: Options, folder: Path) -> tuple[dict[str, Any], Path] | None:
    """--resume, or the newest checkpoint of the run's folder, and its path."""
    if options.resume:
        return load_checkpoint(options.resume), Path(options.resume)
    return load_latest(folder) if options.auto_resume else None


def check_model_name(name: str, option: str) -> None:
    """UsageError, naming the closest model, if neither this project nor timm has one of this name."""
    if not timm.is_model(name):
        remedy = did_you_mean(name, timm.list_models(), f"try {models.MODEL_NAMES[0]}")
        raise UsageError(f"unknown {option} {name!r}; {remedy}")


def build_model(options: Options, num_classes: int) -> nn.Module:
    """The model of --model with the options' regularisation. UsageError if timm or the model refuses."""
    check_model_name(options.model, "--model")
    cfg = timm.get_pretrained_cfg(options.model, allow_unregistered=True)
    ours = timm.models.is_model_in_modules(options.model, ("debiformer", "biformer", "stl"))
    sized = ours or bool(cfg and cfg.fixed_input_size)
    try:
        return timm.create_model(
            options.model,
            num_classes=num_classes,
            drop_rate=options.drop,
            drop_path_rate=options.drop_path or None,
            **({"img_size": options.input_size} if sized else {}),
            **options.model_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model {options.model}: {error}") from error


def release_of(options: Options, model: nn.Module) -> Path:
    """The file with the weights published for a model, downloaded if need be. UsageError if there is none."""
    places = Places(options.release_dir, options.release_mirror, options.release_hub)
    return find_release(model.default_cfg["architecture"], places)


def read_weights(options: Options, path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, or with --use_ema their average."""
    return weights_of(load_checkpoint(path), path, options.use_ema)


def distribute(model: nn.Module, processes: Processes, options: Options, precision: Precision) -> nn.Module:
    """The model wrapped so that all processes train it together, if there are several.

    In its first backward pass DistributedDataParallel learns in which order gradients arrive, and then packs them
    otherwise; sums over the processes round according to the packing. One pass ahead of the training, without effect on
    the weights, has all updates packed alike, so that a resumed run rounds like an undisturbed one.
    """
    if not processes.distributed:
        return model
    device = precision.device
    wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.zeros(options.batch_size, 3, options.input_size, options.input_size, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of depthwise kernels, which are tiny
        with precision.autocast():
            logits = wrapped(images.contiguous(memory_format=torch.channels_last))
        logits.sum().backward()
    wrapped.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return wrapped


def build_teacher(options: Options, num_classes: int, device: torch.device) -> nn.Module | None:
    """The frozen teacher of --distillation_type; None without distillation."""
    if options.distillation_type == "none":
        return None
    name, path = options.teacher_model, options.teacher_path
    check_model_name(name, "--teacher_model")
    if path:
        teacher = timm.create_model(name, num_classes=num_classes)
        load_weights(teacher, weights_of(load_checkpoint(path), path), path)
    else:
        try:
            teacher = timm.create_model(name, pretrained=True)
        except UsageError:
            raise
        except Exception as error:  # whatever the library that downloads makes of a lost connection
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"--teacher_model {name} cannot be had ({reason}); pass --teacher_path") from error
        if teacher.num_classes != num_classes:
            raise UsageError(
                f"--teacher_model {name} knows {teacher.num_classes} classes, the data has {num_classes}; "
                "pass the --teacher_path of one that was trained on them"
            )
    return teacher.to(device, memory_format=torch.channels_last)


def build_erasing(options: Options, device: torch.device) -> RandomErasing | None:
    """What erases a part of some images (arXiv 1708.04896); None if it is off."""
    if options.reprob == 0:
        return None
    return RandomErasing(options.reprob, mode=options.remode, max_count=options.recount, device=device)


def build_mixup(options: Options, num_classes: int) -> Mixup | None:
    """What mixes batches and smooths their labels; None if mixing is off."""
    if not mixing(options):
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def build_watcher(options: Options, data: Data, model: nn.Module, processes: Processes) -> "Watcher | None":
    """What looks at the attention for --log_attention, on the main process. UsageError if there is none to see."""
    if not options.log_attention:
        return None
    from visualize.insight import IMAGES, Watcher, check_readable

    check_readable(model, f"--log_attention: {options.model}")
    return Watcher(model, options.model, normalized(data.watched(IMAGES))) if processes.is_main else None


def precision_of(options: Options, device: torch.device) -> Precision:
    """The number format of --amp; the published scripts always used fp16, on GPUs."""
    amp = options.amp if options.amp != "auto" else "fp16" if device.type == "cuda" else "none"
    return Precision(device, AMP_DTYPES[amp])


if __name__ == "__main__":
    exit_on_error("main.py", lambda: run(parse_args()))
