"""Train and evaluate: python main.py --help."""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.data import ImageNetInfo, Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
import utils
from checkpoint import BEST, LAST, TrainingState, build_checkpoint, load_latest, save_checkpoint
from datasets import Data, build_data, pixels_for, train_transform
from engine import LossMeter, Precision, Stepper, check_weights, evaluate, train_one_epoch
from errors import Stopped, UsageError, did_you_mean, exit_on_error
from eval_sets import TITLES, open_eval_set
from models.arguments import check_arguments
from models.labels import class_names
from models.pixels import Teacher
from models.weights import (
    WeightsError,
    checkpoint_filter_fn,
    load_checkpoint,
    load_to_finetune,
    load_weights,
    options_of,
    weights_of,
)
from models.weights.releases import Places, find_release
from optim_factory import build_ema, build_loss, build_optimizer, build_scheduler, check_training, training_notes
from options import Options, inert_notes, mixing, parse_args, to_plain
from run_log import Progress, RunLog, describe, report, show_notices, summarise, write_options
from utils import Processes, Request, Requests

if TYPE_CHECKING:
    from visualize.insight import Watcher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
HUB_TIMEOUT = 5
"""Seconds within which the Hugging Face Hub has to answer."""
AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(options: Options) -> dict[str, Any]:
    """One run from start to end, on every process. Returns the figures of its last evaluation."""
    processes = utils.find_processes()
    with utils.deterministic_algorithms(options.deterministic):
        device = utils.choose_device(options.device, processes)
        utils.seed_everything(options.seed)
        show_notices(processes)
        try:
            check_names(options, processes)
            with utils.process_group(processes, device, options.dist_url, COLLECTIVE_TIMEOUT):
                return (evaluate_only if options.eval else train)(options, processes, device)
        except WeightsError as error:
            raise UsageError(str(error)) from error


def evaluate_only(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Accuracy of a checkpoint, or of an untrained model."""
    other = None if options.eval_set == "val" else utils.tell(lambda: open_eval_set(options), processes)
    content = load_checkpoint(options.resume) if options.resume else {}
    trained = class_names(content)
    if other and trained and trained != other.classes:
        raise UsageError(f"--eval_set {options.eval_set} has ImageNet's 1000 classes, {options.resume} others")
    data = build_data(options, processes, device, other, trained)
    model = build_model(options, data.num_classes)
    if options.load_release:
        path = release_of(options, model)
        load_weights(model, checkpoint_filter_fn(read_weights(options, path), model), path)
    elif options.resume:
        weights = checkpoint_filter_fn(weights_of(content, options.resume, options.use_ema), model)
        load_weights(model, weights, options.resume)
        if processes.is_main:
            tell(inert_notes(options))
            tell_other_images(options, options_of(content))
            tell_unnamed_classes(options, trained, data)
    elif processes.is_main:
        print("Neither --resume nor --load_release given: these are untrained weights")
    if options.fuse:
        model = models.fuse(model.eval())
    model.to(device, memory_format=torch.channels_last)
    if options.compile:
        model.compile(dynamic=False)
    precision, among = precision_of(options, device), other and other.among
    metrics = evaluate(model, data.val, precision, processes, data.dist_eval, among=among, pixels=pixels_for(options))
    report(metrics, processes, f"{TITLES[options.eval_set]}: " if other else "")
    return metrics


def tell_other_images(options: Options, trained: dict[str, Any]) -> None:
    """Print how the images differ from those of the checkpoint's training, which may be meant, or forgotten."""
    names = ("input_size", "crop_pct", "interpolation", "mean", "std")
    names = [name for name in names if name in trained and trained[name] != getattr(options, name)]
    if names:
        there, here = (" ".join(f"--{n} {of[n]}" for n in names) for of in (trained, vars(options)))
        tell([f"trained with {there}, evaluated with {here}"])


def tell(notes: list[str]) -> None:
    """Print what may be meant, or forgotten."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def tell_unnamed_classes(options: Options, trained: list[str], data: Data) -> None:
    """Print that classes are compared by number, where the checkpoint or the data does not name them."""
    if data.named and (trained or data.classes == ImageNetInfo().label_names()):
        return
    if data.named or trained:
        nameless = options.resume if data.named else f"--data_set {options.data_set}"
        print(f"note: {nameless} does not name its classes: they go by number", file=sys.stderr, flush=True)


def train(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Train up to `options.epochs` epochs, from scratch or from a checkpoint, evaluating after each."""
    say = print if processes.is_main else lambda *words: None
    folder = run_folder(options, processes)
    resumed = checkpoint_to_resume(options, folder)

    tuned = load_checkpoint(options.finetune) if options.finetune and resumed is None else {}
    trained = class_names(resumed[0] if resumed else tuned)
    if options.load_release and resumed is None:
        trained = ImageNetInfo().label_names()
    data = build_data(options, processes, device, trained=trained)
    model = build_model(options, data.num_classes)
    if resumed is None and (options.finetune or options.load_release):
        path = options.finetune or release_of(options, model)
        weights = weights_of(tuned, path, options.use_ema) if tuned else read_weights(options, path)
        if trained and data.classes and trained != data.classes:
            weights = without_classifier(model, weights)
        fresh = load_to_finetune(model, weights, path)
        say(f"Fine-tuning from {path}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else ""))
    model.to(device, memory_format=torch.channels_last)
    ema = build_ema(model, options)
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
        pixels_for(options),
        ema=ema,
        erase=build_erasing(options, device),
        mixup=build_mixup(options, data.num_classes),
        clip_grad=options.clip_grad or None,
        accum_steps=options.accum_steps,
        seed=options.seed,
        updates=data.updates,
        train_mode=not options.finetune_eval_mode,
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
        tell(inert_notes(options) + training_notes(options, data.total_batch, options.epochs * data.updates))
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

    with Requests(processes) as requests:

        def after_update(update: int, loss: Tensor) -> bool:
            lr = optimizer.param_groups[-1]["lr"]
            if progress.due(update):
                loss = utils.all_reduce_sum(loss, processes) / processes.world_size
            progress.advance(update, loss, lr)
            if progress.due(update):
                meter.check(epoch)
                state.history.train_point(epoch + (update + 1) / data.updates, loss.item(), lr)
            overdue = options.checkpoint_minutes > 0 and time.monotonic() - saved_at > 60 * options.checkpoint_minutes
            request = requests.agree(save=overdue and processes.is_main)
            if request != Request.NOTHING:
                meter.check(epoch)
                save(epoch, (update + 1) * data.total_batch)
            return request == Request.STOP

        def after_batch(number: int) -> None:
            # The checkpoint is already written; evaluating is not worth the little time that a signal leaves.
            if number < data.val_batches and requests.agree() == Request.STOP:
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
                metrics = evaluate(
                    candidate,
                    data.val,
                    stepper.precision,
                    processes,
                    data.dist_eval,
                    after_batch,
                    pixels=stepper.pixels,
                )
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


def check_names(options: Options, processes: Processes) -> None:
    """UsageError, before any data is read, for names and rates that only libraries or the process count can judge."""
    check_model_name(options.model, "--model")
    if options.eval:
        return
    if options.distillation_type != "none":
        check_model_name(options.teacher_model, "--teacher_model")
    check_training(options, options.batch_size * processes.world_size * options.accum_steps)
    train_transform(options)


def build_model(options: Options, num_classes: int) -> nn.Module:
    """The model of --model with the options' regularisation. UsageError if timm or the model refuses."""
    check_model_name(options.model, "--model")
    cfg = timm.get_pretrained_cfg(options.model, allow_unregistered=True)
    ours = timm.models.is_model_in_modules(options.model, ("debiformer", "biformer", "stl"))
    sized = ours or bool(cfg and cfg.fixed_input_size)
    arguments = {
        "num_classes": num_classes,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        **({"img_size": options.input_size} if sized else {}),
        **options.model_kwargs,
    }
    return _create_model(options, arguments)


def _create_model(options: Options, arguments: dict[str, Any]) -> nn.Module:
    try:
        check_arguments(options.model, options.model_kwargs)
        return timm.create_model(options.model, **arguments)
    except TypeError as error:
        # A rate that nobody has to have asked for is no reason to refuse a model.
        if "'drop_path_rate'" not in str(error):
            raise UsageError(f"--model {options.model}: {error}") from error
        if options.drop_path not in (0, Options.drop_path):
            raise UsageError(
                f"--drop_path {options.drop_path}: {options.model} has no stochastic depth; leave the option out"
            ) from error
        if options.drop_path and utils.find_processes().is_main:
            tell([f"{options.model} has no stochastic depth: --drop_path {options.drop_path} has no effect"])
        return _create_model(options, {name: arguments[name] for name in arguments if name != "drop_path_rate"})
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--model {options.model}: {error}") from error


def release_of(options: Options, model: nn.Module) -> Path:
    """The file with the weights published for a model, downloaded if need be. UsageError if there is none."""
    places = Places(options.release_dir, options.release_mirror, options.release_hub)
    return find_release(model.default_cfg["architecture"], places)


def read_weights(options: Options, path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, or with --use_ema their average."""
    return weights_of(load_checkpoint(path), path, options.use_ema)


def without_classifier(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that do not belong to the classifier, which was trained on other classes."""
    classifier = model.default_cfg.get("classifier") or "head"
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}


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


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Within the block, do not wait a minute for a Hugging Face Hub that does not answer: only its cache is used."""
    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # its HTTP library differs from version to version
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
            with offline_if_unreachable():
                teacher = timm.create_model(name, pretrained=True)
        except WeightsError:
            raise
        except Exception as error:  # whatever the library that downloads makes of a lost connection
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"--teacher_model {name} cannot be had ({reason}); pass --teacher_path") from error
        if teacher.num_classes != num_classes:
            raise UsageError(
                f"--teacher_model {name} knows {teacher.num_classes} classes, the data has {num_classes}; "
                "pass the --teacher_path of one that was trained on them"
            )
    return Teacher(teacher.to(device, memory_format=torch.channels_last), pixels_for(options), device)


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
    return Watcher(model, options.model, data.watched(IMAGES), pixels_for(options)) if processes.is_main else None


def precision_of(options: Options, device: torch.device) -> Precision:
    """The number format of --amp; the published scripts always used fp16, on GPUs."""
    amp = options.amp if options.amp != "auto" else "fp16" if device.type == "cuda" else "none"
    return Precision(device, AMP_DTYPES[amp])


if __name__ == "__main__":
    exit_on_error("main.py", lambda: run(parse_args()))
