"""Every option of a run, declared once.

The command line of main.py, its --help, the Hydra schema and docs/OPTIONS.md all derive from the dataclasses here.
`python -m runtime.options` prints the documentation table.
"""

import argparse
import json
import math
import operator
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runtime.errors import OneLineParser, UsageError, did_you_mean

RECIPES = Path(__file__).parents[1] / "configs" / "recipe"
DEFAULT_RECIPE = "debiformer_nano_digits"


BOUNDS = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
"""How the bounds of an option read, and what holds within them."""


def option(
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    counts: Sequence[int] = (),
    ascending: bool = False,
) -> Any:
    """A dataclass field with its help text and its bounds, which hold for each number of a list.

    counts: how many numbers a list may have; empty: any but none. ascending: they must grow.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "choices": tuple(choices), "counts": tuple(counts), "ascending": ascending, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunOptions:
    """Run"""

    recipe: str = option("", "name of a YAML file under configs/recipe/ (or a path) whose values become the defaults")
    batch_size: int = option(64, "images per process and step; evaluation uses 1.5 times as many", at_least=1)
    epochs: int = option(300, "epochs to train", at_least=1)
    seed: int = option(0, "fixes weights, data order and augmentation", at_least=0, at_most=2**32 - 1)
    deterministic: bool = option(
        False, "use only algorithms that give the same bits in every run, slower; an operation without one is an error"
    )
    device: str = option("auto", "auto (a GPU if there is one), cuda, cuda:N, mps or cpu")
    output_dir: str = option("", "folder of the run; empty: outputs/cls/MODEL/DATE-TIME when training")
    log_dir: str = option("", "folder for TensorBoard; empty: OUTPUT_DIR/tf_record_log")
    resume: str = option(
        "", "checkpoint, a file or an http(s) address, to continue from where OUTPUT_DIR has none, or to evaluate"
    )
    auto_resume: bool = option(True, "continue from the newest checkpoint of OUTPUT_DIR if it has one")
    start_epoch: int = option(0, "first epoch to train; a resumed checkpoint overrides it", at_least=0)
    eval: bool = option(False, "evaluate only")
    use_ema: bool = option(False, "take the averaged weights of --resume (with --eval), --finetune or --load_release")
    fuse: bool = option(False, "with --eval: merge BatchNorm and identities into convolutions first; same accuracy")
    dist_eval: bool = option(False, "split the evaluation over all processes; every image is counted exactly once")
    load_release: bool = option(
        False,
        "take the weights published for the model: with --eval, evaluate them; else start the training from them, "
        "like --finetune (python -m models.releases --help tells where they come from)",
    )
    release_dir: str = option("", "folder with released weights, looked in first; empty: $DEBIFORMER_RELEASES")
    release_mirror: str = option("", "mirror with URL/MODEL.pth to download from; empty: $DEBIFORMER_MIRROR")
    release_hub: str = option("", "Hugging Face repository to download from; empty: $DEBIFORMER_HUB")
    num_workers: int = option(10, "data loading processes per training process, at most one per usable CPU", at_least=0)
    pin_mem: bool = option(True, "pin host memory for faster transfers to the GPU")
    amp: str = option(
        "auto", "mixed precision; auto: fp16 on CUDA, none elsewhere", choices=("auto", "none", "fp16", "bf16")
    )
    compile: bool = option(False, "compile the model with torch.compile")
    accum_steps: int = option(1, "batches per optimizer update; multiplies the total batch size", at_least=1)
    checkpoint_minutes: float = option(
        0.0, "also write a checkpoint every so many minutes; 0: only after epochs", at_least=0
    )
    save_every: int = option(
        0, "also keep the state after every so many epochs, as checkpoint.EPOCHS.pth; 0: never", at_least=0
    )
    keep: int = option(0, "how many states of --save_every to keep, the newest; 0: all", at_least=0)
    log_attention: int = option(
        0, "show the attention in TensorBoard every so many epochs, on four validation images; 0: never", at_least=0
    )
    print_freq: int = option(50, "updates between two log lines", at_least=1)
    dist_url: str = option("env://", "where processes meet; env:// reads MASTER_ADDR and MASTER_PORT")


@dataclass
class ModelOptions:
    """Model"""

    model: str = option("debiformer_nano", "a model of this project or any of timm's")
    input_size: int = option(224, "side of the square training and evaluation images in pixels", at_least=1)
    drop: float = option(0.0, "dropout before the classifier", at_least=0, below=1)
    drop_path: float = option(0.1, "stochastic depth rate of the last block; 0: none", at_least=0, below=1)
    model_kwargs: dict[str, Any] = option({}, "further arguments of the model, e.g. n_win=8 depths=2,2,9,3")
    model_ema: bool = option(
        True, "keep an exponential moving average of the weights, evaluate it, save the better of both"
    )
    model_ema_decay: float = option(0.99996, "decay of the average per update", at_least=0, below=1)
    model_ema_warmup: bool = option(
        True,
        "let the average begin short: it covers the last sixth of the updates so far until the decay is reached; "
        "false: as published, the decay from the first update on",
    )
    model_ema_force_cpu: bool = option(False, "keep the average in host memory")
    finetune: str = option(
        "", "checkpoint, a file or an http(s) address, to start from; another class count or input size is adapted"
    )
    finetune_eval_mode: bool = option(
        False,
        "with --finetune: train without dropout and drop path and with BatchNorm's statistics as they are, "
        "as the published BiFormer code does",
    )


OWN_OPTIONS = {
    "img_size": "input_size",
    "num_classes": "num_classes",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "pretrained": "load_release",
}
"""Arguments of models that are no --model_kwargs, and the options for them."""


def check_model(options: "Options") -> None:
    """UsageError if arguments of the model, or what is done with its weights, contradict other options."""
    for name, option in OWN_OPTIONS.items():
        if name in options.model_kwargs:
            raise UsageError(f"--model_kwargs {name}: that has an option of its own, use --{option}")
    if options.fuse and not options.eval:
        raise UsageError("--fuse is for inference, merged weights are not trained: add --eval or leave it out")
    sources = [f"--{name}" for name in ("resume", "finetune", "load_release") if getattr(options, name)]
    if "--load_release" in sources and len(sources) > 1:
        raise UsageError(f"{' and '.join(sources)} both name weights to start from; leave one out")
    if options.finetune_eval_mode and not (options.finetune or options.load_release):
        raise UsageError("--finetune_eval_mode is for --finetune or --load_release: add one or leave it out")


@dataclass
class OptimizerOptions:
    """Optimizer"""

    opt: str = option("adamw", "any optimizer of timm")
    opt_eps: float | None = option(1e-8, "epsilon; null: the optimizer's own", at_least=0)
    opt_betas: list[float] | None = option(None, "betas; null: the optimizer's own", at_least=0, below=1)
    clip_grad: float | None = option(None, "clip the gradient's norm; null or 0: off", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(0.05, "weight decay; not applied to 1-D tensors and position tables", at_least=0)
    decay_position_tables: bool = option(
        False, "apply the weight decay to the position tables of DeBiFormer, too, as its published code does"
    )
    layer_decay: float | None = option(
        None, "multiply the rate by this per layer from the head down; null: off", above=0, at_most=1
    )


@dataclass
class ScheduleOptions:
    """Schedule"""

    sched: str = option(
        "cosine",
        "the schedules of timm that do not depend on the run's past",
        choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "constant"),
    )
    lr: float = option(
        5e-4, "learning rate for 512 images in total; scaled linearly to the actual total batch size", at_least=0
    )
    recipe_batch: int | None = option(
        None, "images per update, over all processes, that a recipe is meant for; another number is told", at_least=1
    )
    lr_noise: list[float] | None = option(
        None,
        "noise on the rate: from, to (fractions of the epochs)",
        at_least=0,
        at_most=1,
        counts=(1, 2),
        ascending=True,
    )
    lr_noise_pct: float = option(0.67, "bound of the noise as a fraction of the rate", at_least=0.01, at_most=1)
    lr_noise_std: float = option(1.0, "standard deviation of the noise", at_least=0, at_most=100)
    warmup_lr: float = option(1e-6, "rate at the start of the warm-up (not scaled); at most the scaled lr", at_least=0)
    min_lr: float = option(1e-5, "lowest rate of cosine, tanh, poly, wsd and rsqrt (not scaled)", at_least=0)
    decay_epochs: float = option(
        30.0, "epochs between decays of the step schedule; length of the final decay of wsd and rsqrt", at_least=1
    )
    decay_milestones: list[float] = option(
        [30, 60], "epochs, counted from 1, at whose start the multistep schedule decays", above=0, ascending=True
    )
    warmup_epochs: int = option(5, "epochs of linear warm-up; fewer than `epochs`", at_least=0)
    decay_rate: float = option(
        0.1, "factor of the step and multistep schedules, at most 1; power of the poly schedule", above=0, at_most=10
    )


LOWEST_RATE = ("cosine", "tanh", "poly", "wsd", "rsqrt")
"""The schedules that end at `min_lr`."""


def check_schedule(options: "Options") -> None:
    """UsageError if the epochs of a training run contradict each other."""
    epochs = options.epochs
    if options.eval:
        return
    if 0 < options.warmup_epochs >= epochs:
        raise UsageError(
            f"--warmup_epochs {options.warmup_epochs} leaves nothing of --epochs {epochs} to train at the full rate; "
            f"lower it to at most {epochs - 1}"
        )
    if options.start_epoch >= epochs:
        raise UsageError(f"--start_epoch {options.start_epoch} leaves nothing of --epochs {epochs} to train")
    if options.sched in ("step", "multistep") and options.decay_rate > 1:
        raise UsageError(f"--decay_rate must be at most 1 with --sched {options.sched}, not {options.decay_rate}")


@dataclass
class AugmentationOptions:
    """Augmentation"""

    color_jitter: float | None = option(0.4, "colour jitter, used where --aa is off", at_least=0)
    aa: str | None = option("rand-m9-mstd0.5-inc1", "AutoAugment or RandAugment policy; null or none: off")
    smoothing: float = option(0.1, "label smoothing", at_least=0, below=1)
    train_interpolation: str = option("bicubic", "resizing in training", choices=("random", "bilinear", "bicubic"))
    scale: list[float] = option(
        [0.08, 1.0],
        "area of a random crop as fractions of the image: smallest, largest",
        above=0,
        at_most=1,
        counts=(2,),
        ascending=True,
    )
    hflip: float = option(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    repeated_aug: bool = option(True, "repeated augmentation: three views of an image per epoch, a third of the images")
    reprob: float = option(0.25, "probability of random erasing", at_least=0, at_most=1)
    remode: str = option("pixel", "what erased areas are filled with", choices=("const", "rand", "pixel"))
    recount: int = option(1, "erased areas per image", at_least=1)
    crop_pct: float | None = option(
        None,
        "evaluation: centre crop as a fraction of the resized side; null: as the model wants, ours 224/256",
        above=0,
        at_most=1,
    )
    interpolation: str | None = option(
        None,
        "evaluation: resizing; null: as the model wants, ours bicubic",
        choices=("bilinear", "bicubic", "nearest", "lanczos"),
    )
    mean: list[float] | None = option(
        None,
        "mean of the pixels: red, green, blue; null: as the model wants, ours ImageNet's",
        at_least=0,
        at_most=1,
        counts=(3,),
    )
    std: list[float] | None = option(
        None, "deviation of the pixels; null: as the model wants, ours ImageNet's", above=0, at_most=10, counts=(3,)
    )


@dataclass
class MixingOptions:
    """Mixing"""

    mixup: float = option(0.8, "mixup alpha; 0: off", at_least=0)
    cutmix: float = option(1.0, "CutMix alpha; 0: off", at_least=0)
    cutmix_minmax: list[float] | None = option(
        None,
        "smallest and largest side of the CutMix box as fractions of the image; overrides alpha",
        at_least=0,
        at_most=1,
        counts=(2,),
        ascending=True,
    )
    mixup_prob: float = option(1.0, "probability of mixing a batch", at_least=0, at_most=1)
    mixup_switch_prob: float = option(0.5, "probability of CutMix where both are on", at_least=0, at_most=1)
    mixup_mode: str = option("batch", "mix per batch, pair or element", choices=("batch", "pair", "elem"))


def check_mixing(options: "Options") -> None:
    """UsageError if a batch cannot be mixed."""
    if mixing(options) and options.batch_size % 2 and not options.eval:
        raise UsageError(f"mixup and CutMix pair images: --batch_size must be even, not {options.batch_size}")


@dataclass
class DistillationOptions:
    """Distillation"""

    teacher_model: str = option("regnety_160", "any model of timm")
    teacher_path: str = option("", "checkpoint of the teacher; empty: timm's pretrained weights")
    distillation_type: str = option("none", "what the teacher teaches", choices=("none", "soft", "hard"))
    distillation_alpha: float = option(0.5, "weight of the teacher", at_least=0, at_most=1)
    distillation_tau: float = option(1.0, "temperature of soft distillation", above=0)


@dataclass
class DataOptions:
    """Data"""

    data_path: str = option("", "folder of the data; ImageNet: with train/ and val/")
    data_set: str = option(
        "IMNET",
        "IMNET (any folder with train/CLASS/ and val/CLASS/), CIFAR (100), INAT, INAT19, DIGITS (1,797 scanned digits, "
        "no download), TAR (train.tar and val.tar), or a timm dataset such as hfds/NAME or wds/NAME",
    )
    eval_set: str = option(
        "val",
        "with --eval: which test set of ImageNet to use; real: the images of val/ with ReaL's labels; for the others "
        "--data_path is the folder of ImageNet-V2, -A, -R or -Sketch that holds the class folders",
        choices=("val", "real", "v2", "a", "r", "sketch"),
    )
    num_classes: int | None = option(None, "classes of the classifier; null: as many as the data has", at_least=1)
    max_image_pixels: int = option(100_000_000, "larger images end the run before they are decoded", at_least=1)
    train_split: str = option("train", "training split of a timm dataset")
    val_split: str = option("validation", "evaluation split of a timm dataset")
    inat_category: str = option(
        "name",
        "level of iNaturalist's labels",
        choices=("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus"),
    )


def check_data(options: "Options") -> None:
    """UsageError if there is no such test set of what is evaluated."""
    if options.eval_set != "val" and not (options.eval and options.data_set == "IMNET"):
        raise UsageError(f"--eval_set {options.eval_set} is for evaluating on ImageNet: --eval, and no --data_set")


@dataclass
class InertOptions:
    """Without effect, accepted because published commands have them"""

    world_size: int = option(1, "the launcher's environment decides")
    cooldown_epochs: int = option(10, "training ends after `epochs`; the schedules are defined up to there")
    patience_epochs: int = option(10, "for the plateau schedule, which is not offered")
    resplit: bool = option(False, "for augmentation splits, which are not made here")


def inert_notes(options: "Options") -> list[str]:
    """One line for each option without effect that has another value than its default."""
    given = [spec for spec in fields(InertOptions) if getattr(options, spec.name) != _default(spec)]
    return [f"--{spec.name} has no effect: {spec.metadata['help']}" for spec in given]


@dataclass
class Options(
    InertOptions,
    DataOptions,
    DistillationOptions,
    MixingOptions,
    AugmentationOptions,
    ScheduleOptions,
    OptimizerOptions,
    ModelOptions,
    RunOptions,
):
    """All options of a run."""


@dataclass
class SlurmOptions:
    """Cluster (`slurm.NAME`, hydra_main.py only)"""

    executor: str = option("slurm", "slurm submits a job; local starts the processes here", choices=("slurm", "local"))
    partition: str | None = option(None, "sbatch --partition; null: the cluster's default")
    nodes: int = option(1, "machines", at_least=1)
    ngpus: int = option(8, "processes per machine, one per GPU", at_least=1)
    cpus_per_task: int = option(5, "CPUs per process", at_least=1)
    mem: str | None = option(None, "memory per machine, e.g. 400GB; null: the cluster's default")
    timeout: float = option(240.0, "hours until the job is out of time and goes back to the queue", above=0)
    requeues: int = option(100, "how often a job that ran out of time goes back to the queue", at_least=0)
    signal_delay: int = option(120, "seconds between the warning signal and the time limit", at_least=0)
    account: str | None = option(None, "sbatch --account")
    qos: str | None = option(None, "sbatch --qos")
    constraint: str | None = option(None, "sbatch --constraint")
    exclude_node: str | None = option(None, "sbatch --exclude: machines not to use")
    comment: str | None = option(None, "sbatch --comment")
    quotatype: str | None = option(None, "sbatch --quotatype, a flag of some clusters")
    job_name: str | None = option(None, "name of the job; null: the model's")
    job_dir: str | None = option(None, "scripts and logs of the job; null: the run's folder")
    ddp_comm_mode: str = option(
        "tcp", "how processes meet: over tcp, or by a file in share_root", choices=("tcp", "file")
    )
    share_root: str | None = option(None, "folder that all machines see, for ddp_comm_mode=file")
    master_port: int | None = option(
        None, "port of the first process; null: derived from the job's number", at_least=1, at_most=65535
    )
    extra: dict[str, Any] = option({}, "any further sbatch options")


GROUPS = (
    RunOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    AugmentationOptions,
    MixingOptions,
    DistillationOptions,
    DataOptions,
    InertOptions,
)
CHECKS = (check_model, check_schedule, check_mixing, check_data)
"""What options must not contradict, group by group."""

NULLS = ("none", "null")


def parse_args(argv: Sequence[str] | None = None, program: str = "main.py") -> Options:
    """The options of a command line. Exits with code 2 on a bad one, and with 0 after --help.

    Both spellings, --batch-size and --batch_size, are taken. Later beats earlier, the command line beats the recipe.
    """
    argv = [with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    parser = _parser(program)
    try:
        given, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(_unknown_option(unknown[0]))
        values = vars(given)
        values.pop("local_rank", None)
        return with_recipe(values)
    except UsageError as error:
        parser.error(str(error))


def with_recipe(values: dict[str, Any]) -> Options:
    """Options from the values that were given, on top of the recipe they name (or the default one), validated."""
    recipe = values.get("recipe", "")
    if not values.keys() & {"recipe", "model", "data_path", "data_set"}:
        recipe = DEFAULT_RECIPE
        if os.environ.get("RANK", "0") == "0":
            print(f"No --data_path, --data_set, --model or --recipe given: using --recipe {recipe}", flush=True)
    options = load_recipe(recipe) if recipe else Options()
    for name, value in values.items():
        setattr(options, name, value)
    options.recipe = recipe
    validate(options)
    return options


def load_recipe(name: str) -> Options:
    """Read configs/recipe/NAME.yaml, or a YAML file at path `name`, over the defaults. UsageError if it is wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UsageError(f"there is no recipe {name!r}; known: {known}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)


def validate(options: Options) -> None:
    """UsageError if a value is out of its range or contradicts another."""
    check_ranges(options, prefix="--")
    for check in CHECKS:
        check(options)


def check_ranges(options: Any, prefix: str) -> None:
    """UsageError if a field of a dataclass of options is not what its declaration allows."""
    for spec in fields(options):
        value, name = getattr(options, spec.name), f"{prefix}{spec.name}"
        choices = spec.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if isinstance(value, list):
            _check_list(name, value, spec)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{name} must be a finite number, not {number}")
            if isinstance(number, int | float) and not _within(number, spec):
                raise UsageError(f"{name} must be {range_of(spec)}, not {number}")


def _within(number: float, spec: Field) -> bool:
    bounds = ((holds, spec.metadata[name]) for name, (_, holds) in BOUNDS.items())
    return all(holds(number, bound) for holds, bound in bounds if bound is not None)


def range_of(spec: Field) -> str:
    """An option's bounds in words, such as 'at least 0 and below 1'; nothing if it has none."""
    bounds = ((words, spec.metadata[name]) for name, (words, _) in BOUNDS.items())
    return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def _check_list(name: str, numbers: list[float], spec: Field) -> None:
    counts, words = spec.metadata["counts"], {1: "one", 2: "two", 3: "three"}
    if counts and len(numbers) not in counts:
        raise UsageError(f"{name} takes {' or '.join(words[count] for count in counts)} numbers, not {numbers}")
    if not numbers:
        raise UsageError(f"{name} takes numbers, not an empty list")
    if spec.metadata["ascending"] and numbers != sorted(numbers):
        raise UsageError(f"{name} takes numbers in ascending order, not {numbers}")


def names_of(*kinds: type) -> list[str]:
    """The names of these dataclasses' options."""
    return [spec.name for kind in kinds for spec in fields(kind)]


def mixing(options: Options) -> bool:
    """Whether batches are mixed (by mixup or CutMix)."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None


def to_plain(options: Options) -> dict[str, Any]:
    """The options as a dict of plain values, fit for YAML and for checkpoints."""
    return asdict(options)


def markdown_table() -> str:
    """All options with defaults and help, grouped, for the documentation."""
    lines = ["# Options", "", "Written by `python -m runtime.options`. Hydra spells them the same way.", ""]
    for group in (*GROUPS, SlurmOptions):
        lines += [f"## {group.__doc__}", "", "| option | default | meaning |", "|---|---|---|"]
        for spec in fields(group):
            lines.append(f"| `{spec.name}` | {_shown(spec)} | {spec.metadata['help']}{_allowed(spec)} |")
        lines.append("")
    return "\n".join(lines)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=program,
        usage="%(prog)s [--OPTION VALUE ...]",
        description="Train and evaluate DeBiFormer, BiFormer and any model of timm.",
        epilog="Without any option: trains debiformer_nano on the digits that come with scikit-learn. "
        "Published recipes: --recipe debiformer_small --data_path ./data/in1k. "
        "Switches take --no_NAME, too. Dashes may stand for underscores.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        hints = get_type_hints(group)
        for spec in fields(group):
            _add_argument(section, spec, hints[spec.name])
    # torch.distributed.launch passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _add_argument(section: Any, spec: Field, hint: Any) -> None:
    shown = _shown(spec)
    allowed = "" if spec.metadata["choices"] else _allowed(spec)  # choices are shown as the option's value
    help = f"{spec.metadata['help']}{allowed}".replace("%", "%%") + (f" (default: {shown})" if shown else "")
    flag, choices = f"--{spec.name}", spec.metadata["choices"] or None
    hint, optional = _without_none(hint)
    if hint is bool:
        section.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="true|false", help=help)
        section.add_argument(f"--no_{spec.name}", dest=spec.name, action="store_false", help=argparse.SUPPRESS)
    elif get_origin(hint) is list:
        section.add_argument(flag, nargs="+", action=_Numbers, metavar="X", help=help)
    elif get_origin(hint) is dict:
        section.add_argument(flag, nargs="+", action=KeyValues, metavar="NAME=VALUE", help=help)
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else hint.__name__.upper()
        section.add_argument(flag, type=_nullable(hint) if optional else hint, metavar=metavar, help=help)


def _default(spec: Field) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _shown(spec: Field) -> str:
    """The default as YAML would have it; nothing for what is empty."""
    default = _default(spec)
    return "" if default in ("", {}) else default if isinstance(default, str) else json.dumps(default)


def _allowed(spec: Field) -> str:
    words = ", ".join(spec.metadata["choices"]) or range_of(spec)
    return f" ({words})" if words else ""


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None)), True
    return hint, False


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def _nullable(convert: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() in NULLS else convert(text)

    parse.__name__ = convert.__name__  # argparse names the type in its messages
    return parse


class _Numbers(argparse.Action):
    """--opt_betas 0.9 0.95, or 0.9,0.95, or null."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        words = [word for value in values for word in value.split(",") if word]
        try:
            numbers = None if words[0].lower() in NULLS else [float(word) for word in words]
        except (ValueError, IndexError):
            parser.error(f"argument {option_string}: expected numbers, not {' '.join(values)!r}")
        setattr(namespace, self.dest, numbers)


class KeyValues(argparse.Action):
    """--model_kwargs n_win=8 depths=2,2,9,3: numbers, true, false, null, words; lists of them, with or without []."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        result = dict(getattr(namespace, self.dest, {}))
        for item in values:
            name, separator, text = item.partition("=")
            if not separator:
                parser.error(f"argument {option_string}: expected NAME=VALUE, not {item!r}")
            try:
                result[name] = _plain_value(f"[{text}]" if "," in text and not text.startswith("[") else text)
            except (OmegaConfBaseException, YAMLError):
                parser.error(f"argument {option_string}: cannot read {item!r}; write lists as depths=2,2,9,3")
        setattr(namespace, self.dest, result)


def _plain_value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def with_underscores(arg: str) -> str:
    """--batch-size=8 as --batch_size=8; anything else as it is."""
    if not arg.startswith("--"):
        return arg
    name, separator, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def _unknown_option(arg: str) -> str:
    if not arg.startswith("--"):
        return f"unexpected argument {arg!r}; options start with --, see --help"
    name = arg.partition("=")[0].removeprefix("--")
    return f"unknown option --{name}; {did_you_mean(name, names_of(Options), 'see --help', '--')}"


if __name__ == "__main__":
    print(markdown_table(), end="")
