"""How options are declared, and those that every run has whatever its task.

An option is a field of its owner's dataclass, made by `option`: the command line, --help, Hydra's schema, the checks
and docs/OPTIONS.md derive from it. The optimizer's and the schedule's are in optim_factory.py, a task's in its folder;
`tasks.options` puts them together.
"""

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.errors import UsageError, did_you_mean

RECIPES = Path(__file__).parents[1] / "configs" / "recipe"

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


def table_of(group: type) -> list[str]:
    """Return the documentation of a group of options as lines of Markdown."""
    lines = [f"## {group.__doc__}", "", "| option | default | meaning |", "|---|---|---|"]
    for spec in fields(group):
        lines.append(f"| `{spec.name}` | {shown(spec)} | {spec.metadata['help']}{allowed(spec)} |")
    return [*lines, ""]


def default_of(spec: Field) -> Any:
    """Return an option's default."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def shown(spec: Field) -> str:
    """The default as YAML would have it; nothing for what is empty."""
    default = default_of(spec)
    return "" if default in ("", {}) else default if isinstance(default, str) else json.dumps(default)


def allowed(spec: Field) -> str:
    """Say what values an option takes, in brackets; nothing if any."""
    words = ", ".join(spec.metadata["choices"]) or range_of(spec)
    return f" ({words})" if words else ""


# -- what every run has


@dataclass
class RunOptions:
    """Run"""

    task: str = option("classification", "what is learnt: classification, or what tasks/ holds besides")
    recipe: str = option("", "name of a YAML file under configs/recipe/ (or a path) whose values become the defaults")
    batch_size: int = option(64, "images per process and step; evaluation uses 1.5 times as many", at_least=1)
    epochs: int = option(300, "epochs to train", at_least=1)
    iterations: int = option(
        0, "train so many updates instead of --epochs, over one permutation of the images after another", at_least=0
    )
    eval_every: int = option(
        0, "with --iterations: updates from one evaluation and checkpoint to the next, an epoch of its own", at_least=0
    )
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
    max_image_pixels: int = option(100_000_000, "larger images end the run before they are decoded", at_least=1)
    num_workers: int = option(
        10, "data loading processes per training process, at most its share of the usable CPUs", at_least=0
    )
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
    freeze: str = option(
        "",
        "with --finetune or --load_release: leave the stem and so many stages, counted from the input, as they are "
        "and in evaluation mode; backbone: all but the classifier, a linear probe",
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


NAMES_ELSEWHERE = OWN_OPTIONS | {
    "amp_dtype": "amp",
    "checkpoint": "resume",
    "checkpoint_hist": "keep",
    "data_dir": "data_path",
    "dataset": "data_set",
    "grad_accum_steps": "accum_steps",
    "initial_checkpoint": "finetune",
    "learning_rate": "lr",
    "log_interval": "print_freq",
    "nb_classes": "num_classes",
    "output": "output_dir",
    "torchcompile": "compile",
    "wd": "weight_decay",
    "workers": "num_workers",
}
"""What timm's and DeiT's training scripts call our options."""


def closest_option(name: str, known: Sequence[str], otherwise: str, mark: str = "") -> str:
    """'did you mean MARKx?' with the option that another program calls so, or that is spelt alike; else `otherwise`."""
    if NAMES_ELSEWHERE.get(name) in known:
        return f"did you mean {mark}{NAMES_ELSEWHERE[name]}?"
    return did_you_mean(name, known, otherwise, mark)


def check_model(options: Any) -> None:
    """UsageError if arguments of the model, or what is done with its weights, contradict other options."""
    for name, option in OWN_OPTIONS.items():
        if name in options.model_kwargs:
            raise UsageError(f"--model_kwargs {name}: that has an option of its own, use --{option}")
    if options.fuse and not options.eval:
        raise UsageError("--fuse is for inference, merged weights are not trained: add --eval or leave it out")
    sources = [f"--{name}" for name in ("resume", "finetune", "load_release") if getattr(options, name)]
    if "--load_release" in sources and len(sources) > 1:
        raise UsageError(f"{' and '.join(sources)} both name weights to start from; leave one out")
    if options.freeze and options.freeze != "backbone" and not options.freeze.isdecimal():
        raise UsageError(f"--freeze takes a number of stages or backbone, not {options.freeze!r}")
    if options.freeze and not (options.finetune or options.load_release or options.eval):
        raise UsageError("--freeze keeps weights of another training: add --finetune or --load_release")
    if options.finetune_eval_mode and not (options.finetune or options.load_release):
        raise UsageError("--finetune_eval_mode is for --finetune or --load_release: add one or leave it out")


@dataclass
class InertOptions:
    """Without effect, accepted because published commands have them"""

    world_size: int = option(1, "the launcher's environment decides")
    cooldown_epochs: int = option(10, "training ends after `epochs`; the schedules are defined up to there")
    patience_epochs: int = option(10, "for the plateau schedule, which is not offered")
    resplit: bool = option(False, "for augmentation splits, which are not made here")


def inert_notes(options: Any) -> list[str]:
    """One line for each option without effect that has another value than its default."""
    given = [spec for spec in fields(InertOptions) if getattr(options, spec.name) != default_of(spec)]
    return [f"--{spec.name} has no effect: {spec.metadata['help']}" for spec in given]


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
