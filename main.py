"""Train and evaluate: python main.py --help."""

import warnings
from datetime import timedelta
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
from datasets import Data, build_data
from engine import Precision, Run, TrainStep, evaluate, normalized, unwrapped
from errors import UsageError, did_you_mean, exit_on_error
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
from runtime.agreement import decide
from runtime.checkpoint import TrainingState
from runtime.meters import LossMeter
from runtime.resume import find_checkpoint, go_on, how_to_go_on, name_folder, note, open_folder
from runtime.run_folder import RunFolder
from runtime.run_log import Progress, RunLog, describe, report, show_notices, summarise, write_options
from utils import Processes

if TYPE_CHECKING:
    from visualize.insight import Watcher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(options: Options) -> dict[str, Any]:
    """One run from start to end, on every process. Returns the figures of its last evaluation."""
    processes = utils.find_processes()
    device = utils.choose_device(options.device, processes)
    torch.backends.cudnn.benchmark = True
    utils.seed_everything(options.seed)
    show_notices(processes)
    with utils.process_group(processes, device, options.dist_url, COLLECTIVE_TIMEOUT):
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
        note(f"trained with {there}, evaluated with {here}")


def train(options: Options, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Train up to `options.epochs` epochs, from scratch or from a checkpoint, evaluating after each."""
    path = name_folder(options.output_dir, options.model, processes)
    with open_folder(RunFolder(path, options.save_every, options.keep), processes) as folder:
        checkpoint = find_checkpoint(folder, options.resume, options.auto_resume, processes)
        data = build_data(options, processes, device)
        model = build_model(options, data.num_classes)
        if checkpoint is None:
            load_first_weights(options, model, processes)
        model.to(device, memory_format=torch.channels_last)
        ema = build_average(options, model)
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


def load_first_weights(options: Options, model: nn.Module, processes: Processes) -> None:
    """Those of --finetune or --load_release, if either is given."""
    if not (options.finetune or options.load_release):
        return
    path = options.finetune or release_of(options, model)
    fresh = load_to_finetune(model, read_weights(options, path), path)
    if processes.is_main:
        print(f"Fine-tuning from {path}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else ""))


def build_average(options: Options, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the weights that --model_ema keeps."""
    if not options.model_ema:
        return None
    return ModelEmaV3(
        model, options.model_ema_decay, device=torch.device("cpu") if options.model_ema_force_cpu else None
    )


def build_step(
    options: Options,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    data: Data,
    processes: Processes,
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
        ema=ema,
        erase=build_erasing(options, device),
        mixup=build_mixup(options, data.num_classes),
        clip_grad=options.clip_grad,
        accum_steps=options.accum_steps,
        seed=options.seed,
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
            model, data.val, precision, processes, data.dist_eval, after_batch
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
