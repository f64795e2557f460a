"""The options of classification."""

import re
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError
from runtime.options import option


@dataclass
class AugmentationOptions:
    """Augmentation"""

    color_jitter: float | None = option(0.4, "colour jitter, used where --aa is off", at_least=0)
    aa: str | None = option("rand-m9-mstd0.5-inc1", "AutoAugment or RandAugment policy; null or none: off")
    augment_on: str = option(
        "worker",
        "what flips images and does what --aa draws: the loader's workers, or the device, in batches; random numbers "
        "are the same, pixels differ by roundings, and are a little softer where an image is turned or shifted",
        choices=("worker", "device"),
    )
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
    eval_resize: str = option(
        "pillow",
        "evaluation: what resizes; torch takes a fourth of the time, and differs by a rounding of some pixels",
        choices=("pillow", "torch"),
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


def check_mixing(options: Any) -> None:
    """UsageError if a batch cannot be mixed."""
    if mixing(options) and options.batch_size % 2 and not options.eval:
        raise UsageError(f"mixup and CutMix pair images: --batch_size must be even, not {options.batch_size}")


HOW_FAR = (
    "cosine, 1 - the cosine of the angle at each place; smooth_l1, from the teacher's with mean 0 and deviation 1 at "
    "each place"
)
LOGITS, TOKENS, FEATURES = LESSONS = ("logits", "tokens", "features")
"""What a teacher may teach: its answer for the image, its answers for each place, its maps."""


@dataclass
class DistillationOptions:
    """Distillation"""

    teacher_model: str = option("regnety_160", "any model of timm")
    teacher_path: str = option("", "checkpoint of the teacher; empty: timm's pretrained weights")
    teacher_input_size: int | None = option(
        None,
        "side in pixels of what the teacher is shown, the student's image resized; null: what it was trained with",
        at_least=1,
    )
    distill: str = option(
        "",
        "what the teacher teaches, joined by commas (or by +, for Hydra): logits, its answer for the image (soft, "
        "unless --distillation_type hard); tokens, its answers for each place; features, its maps",
    )
    distillation_type: str = option(
        "none", "how logits are taught; none: only if --distill says so", choices=("none", "soft", "hard")
    )
    distillation_alpha: float = option(0.5, "weight of the teacher's logits", at_least=0, at_most=1)
    distillation_tau: float = option(1.0, "temperature of soft distillation", above=0)
    distill_dense_weight: float = option(1.0, "weight of the loss of tokens, and of that of features", above=0)
    distill_feature_loss: str = option(
        "cosine", f"how far features are from the teacher's: {HOW_FAR}", choices=("cosine", "smooth_l1")
    )


def lessons_of(options: Any) -> set[str]:
    """Which of `LESSONS` a run has."""
    named = set(filter(None, re.split("[,+ ]+", options.distill)))
    return named | ({LOGITS} if options.distillation_type != "none" else set())


def check_distillation(options: Any) -> None:
    """UsageError if there is no such lesson, or a student that would not answer for its places."""
    lessons = lessons_of(options)
    unknown = sorted(lessons - set(LESSONS))
    if unknown:
        raise UsageError(f"--distill {options.distill}: {unknown[0]!r} is none of {', '.join(LESSONS)}")
    if lessons - {LOGITS} and options.finetune_eval_mode and not options.eval:
        raise UsageError("--finetune_eval_mode goes with --distill logits alone; leave it out")


@dataclass
class DataOptions:
    """Data"""

    data_path: str = option(
        "", "folder of the data; ImageNet: with train/ and val/, or as save_to_disk of Hugging Face's datasets wrote it"
    )
    data_set: str = option(
        "IMNET",
        "IMNET (any folder with train/CLASS/ and val/CLASS/, or one of save_to_disk), CIFAR (100), INAT, INAT19, "
        "DIGITS (1,797 scanned digits, no download), TAR (train.tar and val.tar), or a timm dataset such as hfds/NAME "
        "or wds/NAME",
    )
    eval_set: str = option(
        "val",
        "with --eval: which test set of ImageNet to use; real: the images of val/ with ReaL's labels; for the others "
        "--data_path is the folder of ImageNet-V2, -A, -R or -Sketch that holds the class folders",
        choices=("val", "real", "v2", "a", "r", "sketch"),
    )
    num_classes: int | None = option(None, "classes of the classifier; null: as many as the data has", at_least=1)
    val_fraction: float = option(
        0.0,
        "where IMNET or TAR has no val/: share of each class of train/ that is kept for evaluation, chosen by name; a "
        "run that goes on, and an evaluation of its weights, keep what it chose",
        at_least=0,
        below=1,
    )
    train_split: str = option("train", "training split of a timm dataset, or of save_to_disk")
    val_split: str = option("validation", "evaluation split of a timm dataset, or of save_to_disk")
    inat_category: str = option(
        "name",
        "level of iNaturalist's labels",
        choices=("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus"),
    )


def check_data(options: Any) -> None:
    """UsageError if there is no such test set of what is evaluated."""
    if options.eval_set != "val" and not (options.eval and options.data_set == "IMNET"):
        raise UsageError(f"--eval_set {options.eval_set} is for evaluating on ImageNet: --eval, and no --data_set")


def mixing(options: MixingOptions) -> bool:
    """Whether batches are mixed (by mixup or CutMix)."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
