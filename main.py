"""Train and evaluate: python main.py --help."""

from runtime.preemption import PreemptionHandler, handle_signals

if __name__ == "__main__":
    PreemptionHandler().install()  # before imports that take seconds

import contextlib
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.data import ImageNetInfo, Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
import utils
from datasets import Data, build_data, pixels_for, train_transform
from engine import Precision, Run, TrainStep, evaluate, unwrapped
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
from runtime import distributed
from runtime.agreement import decide
from runtime.checkpoint import TrainingState
from runtime.distributed import DistInfo
from runtime.errors import UsageError, did_you_mean, exit_on_error, explain_dead_workers
from runtime.meters import LossMeter
from runtime.options import Options, inert_notes, mixing, parse_args, to_plain
from runtime.resume import find_checkpoint, go_on, how_to_go_on, name_folder, note, open_folder
from runtime.run_folder import RunFolder
from runtime.run_log import Progress, RunLog, describe, report, show_notices, summarise, write_options
from tasks.classification.eval_sets import TITLES, open_eval_set

if TYPE_CHECKING:
    from visualize.insight import Watcher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
HUB_TIMEOUT = 5
"""Seconds within which the Hugging Face Hub has to answer."""
AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(options: Options) -> dict[str, Any]:
    """One run from start to end, on every process. Returns the figures of its last evaluation."""
    with handle_signals(), utils.deterministic_algorithms(options.deterministic):
        processes = distributed.find_processes()
        device = utils.choose_device(options.device, processes)
        utils.seed_everything(options.seed)
        show_notices(processes)
        try:
            check_names(options, processes)
            group = distributed.process_group(processes, device, options.dist_url, COLLECTIVE_TIMEOUT)
            with explain_dead_workers(), group:
                return (evaluate_only if options.eval else train)(options, processes, device)
        except WeightsError as error:
            raise UsageError(str(error)) from error


def evaluate_only(options: Options, processes: DistInfo, device: torch.device) -> dict[str, Any]:
    """Accuracy of a checkpoint, or of an untrained model."""
    other = None if options.eval_set == "val" else decide(lambda: open_eval_set(options), processes)
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
        note(f"trained with {there}, evaluated with {here}")


def tell_unnamed_classes(options: Options, trained: list[str], data: Data) -> None:
    """Print that classes are compared by number, where the checkpoint or the data does not name them."""
    if data.named and (trained or data.classes == ImageNetInfo().label_names()):
        return
    if data.named or trained:
        nameless = options.resume if data.named else f"--data_set {options.data_set}"
        note(f"{nameless} does not name its classes: they go by number")


def train(options: Options, processes: DistInfo, device: torch.device) -> dict[str, Any]:
    """Train up to `options.epochs` epochs, from scratch or from a checkpoint, evaluating after each."""
    path = name_folder(options.output_dir, options.model, processes)
    with open_folder(RunFolder(path, options.save_every, options.keep), processes) as folder:
        checkpoint = find_checkpoint(folder, options.resume, options.auto_resume, processes)
        first = None if checkpoint else first_checkpoint(options)
        trained = classes_before(options, checkpoint[0] if checkpoint else first)
        data = build_data(options, processes, device, trained=trained)
        model = build_model(options, data.num_classes)
        if first is not None:
            load_first_weights(options, model, first, other_classes=bool(data.classes) and trained != data.classes)
        model.to(device, memory_format=torch.channels_last)
        ema = build_ema(model, options)
        if options.compile:
            model.compile(dynamic=False)  # training and evaluation have few, fixed shapes
        step = build_step(options, model, ema, data, processes, device)
        state = build_state(options, step, data, folder)
        scheduler = build_scheduler(step.optimizer, options)
        if checkpoint is not None:
            go_on(state, *checkpoint, folder, processes, midway=not data.streamed)
            checkpoint = None  # it takes as much memory as the training does
        run = build_run(options, step, scheduler, state, data, folder)
        begin(options, run, device)
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


def load_first_weights(options: Options, model: nn.Module, content: dict[str, Any], other_classes: bool) -> None:
    """Start from the weights of --finetune or --load_release, without their classifier if it was for other classes."""
    path = options.finetune or release_of(options, model)
    weights = weights_of(content or load_checkpoint(path), path, options.use_ema)
    fresh = load_to_finetune(model, without_classifier(model, weights) if other_classes else weights, path)
    if distributed.find_processes().is_main:
        print(f"Fine-tuning from {path}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else ""))


def build_step(
    options: Options,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    data: Data,
    processes: DistInfo,
    device: torch.device,
) -> TrainStep:
    """What updates the weights."""
    precision = precision_of(options, device)
    optimizer = build_optimizer(model, options, data.total_batch)
    return TrainStep(
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


def build_state(options: Options, step: TrainStep, data: Data, folder: RunFolder) -> TrainingState:
    """The state of a training that has not begun."""
    is_main, log_dir = step.processes.is_main, options.log_dir and Path(options.log_dir)
    return TrainingState(
        unwrapped(step.model),
        step.optimizer,
        step.precision.scaler,
        meter=LossMeter(step.precision.device, step.processes),
        history=RunLog(folder.path, log_dir or folder.path / "tf_record_log") if is_main else RunLog(None, None),
        args=to_plain(options),
        classes=data.classes,
        data={
            "images per epoch": data.epoch_images,
            "total batch": data.total_batch,
            "images": data.images,
            **{name: getattr(options, name) for name in ("data_set", "seed", "repeated_aug")},
        },
        model_ema=step.ema and step.ema.module,
        epoch=options.start_epoch,
    )


def build_run(
    options: Options, step: TrainStep, scheduler: Scheduler, state: TrainingState, data: Data, folder: RunFolder
) -> Run:
    """The training itself."""
    processes, precision = step.processes, step.precision
    return Run(
        step,
        scheduler,
        state,
        data,
        folder,
        Progress(
            options.epochs, data.updates, data.total_batch, options.print_freq, precision.device, processes.is_main
        ),
        evaluate=lambda model, after_batch: evaluate(
            model, data.val, precision, processes, data.dist_eval, after_batch, pixels=step.pixels
        ),
        report=lambda figures, prefix: report(figures, processes, prefix),
        epochs=options.epochs,
        checkpoint_minutes=options.checkpoint_minutes,
        watcher=build_watcher(options, data, state.model, processes),
        watch_every=options.log_attention,
        how_to_go_on=how_to_go_on(folder.path, Path(__file__), processes),
    )


def begin(options: Options, run: Run, device: torch.device) -> None:
    """Write and print what is about to be trained; what is wrong with a run comes out before."""

    def write() -> None:
        run.folder.make()
        write_options(options, run.folder.path)
        run.state.history.start()

    decide(write, run.step.processes)
    if run.step.processes.is_main:
        describe(options, run.data, run.state.model, device, run.step.processes)
        for line in inert_notes(options) + training_notes(
            options, run.data.total_batch, options.epochs * run.data.updates
        ):
            note(line)


def end(run: Run) -> dict[str, Any]:
    """Close the log and say where everything is. Returns the figures of the last evaluation."""
    history = run.state.history
    history.close()
    if run.step.processes.is_main:
        summarise(run.state, run.folder.path)
    return history.epochs[-1] if history.epochs else {}


def check_model_name(name: str, option: str) -> None:
    """UsageError, naming the closest model, if neither this project nor timm has one of this name."""
    if not timm.is_model(name):
        remedy = did_you_mean(name, timm.list_models(), f"try {models.MODEL_NAMES[0]}")
        raise UsageError(f"unknown {option} {name!r}; {remedy}")


def check_names(options: Options, processes: DistInfo) -> None:
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
    except ValueError as error:
        raise UsageError(f"--model_kwargs: {options.model}: {error}") from error
    try:
        return timm.create_model(options.model, **arguments)
    except TypeError as error:
        # A rate that nobody has to have asked for is no reason to refuse a model.
        if "'drop_path_rate'" not in str(error):
            raise UsageError(f"--model {options.model}: {error}") from error
        if options.drop_path not in (0, Options.drop_path):
            raise UsageError(
                f"--drop_path {options.drop_path}: {options.model} has no stochastic depth; leave the option out"
            ) from error
        if options.drop_path and distributed.find_processes().is_main:
            note(f"{options.model} has no stochastic depth: --drop_path {options.drop_path} has no effect")
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


def distribute(model: nn.Module, processes: DistInfo, options: Options, precision: Precision) -> nn.Module:
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


def build_watcher(options: Options, data: Data, model: nn.Module, processes: DistInfo) -> "Watcher | None":
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
