"""One update at a time, and evaluation."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import nn

import main
import models  # noqa: F401
from engine import Precision, TrainStep, evaluate, train_one_epoch
from models.pixels import Pixels, normalize
from optim_factory import build_optimizer, build_scheduler
from runtime.distributed import DistInfo
from runtime.errors import NonFiniteLoss, UsageError
from runtime.meters import LossMeter
from tasks.classification.losses import DistillationLoss, build_loss
from tasks.classification.task import Classification
from tasks.options import Options

ALONE = DistInfo()
CPU = torch.device("cpu")


def batches_of(count, size=4, side=8, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "images": torch.randn(size, 3, side, side, generator=generator),
            "targets": torch.randint(classes, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def task_of(num_classes=10, **options):
    """Classification that leaves images and labels as they are."""
    task = Classification(Options(mixup=0, cutmix=0, smoothing=0, reprob=0, data_path="x", **options))
    task.num_classes = num_classes
    return task


def stepper_of(model, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainStep(task_of(), model, optimizer, Precision(CPU), ALONE, **kwargs)


def train(stepper, batches, updates, **kwargs):
    return train_one_epoch(stepper, batches, LossMeter(CPU, ALONE), epoch=0, updates=updates, **kwargs)


class Answers(nn.Module):
    """Says the same whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_answer_can_be_sought_among_some_classes():
    answers, task = Answers([9.0, 1.0, 3.0, 2.0]), task_of(4)
    batches = [{"images": batches_of(1)[0]["images"], "targets": torch.tensor([2, 2, 3, 1])}]
    assert evaluate(task, answers, batches, Precision(CPU))["acc1"] == 0
    task._subset = [1, 2, 3]
    metrics = evaluate(task, answers, batches, Precision(CPU))
    assert metrics["acc1"] == 50
    log_shares = torch.tensor([1.0, 3.0, 2.0]).log_softmax(0)
    assert metrics["loss"] == pytest.approx(-log_shares[[1, 1, 2, 0]].mean().item())


def test_images_may_have_several_right_classes():
    answers, images = Answers([float(-i) for i in range(8)]), batches_of(1)[0]["images"]
    shares = torch.zeros(4, 8)
    shares[0, [0, 7]] = shares[1, [3, 4]] = shares[2, [5, 6]] = 0.5
    shares[3, 1] = 1
    metrics = evaluate(task_of(8), answers, [{"images": images, "targets": shares}], Precision(CPU))
    assert (metrics["acc1"], metrics["acc5"], metrics["images"]) == (25, 75, 4)
    log_shares = -torch.arange(8.0) - (-torch.arange(8.0)).logsumexp(0)
    assert metrics["loss"] == pytest.approx(-(shares @ log_shares).mean().item())


def test_accumulated_batches_equal_one_large_batch():
    batches = batches_of(4)
    large = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in (batches[:2], batches[2:])]
    one, two = linear_model(), linear_model()
    assert train(stepper_of(one), large, 2)
    assert train(stepper_of(two, accum_steps=2), batches, 2)
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_gradients_are_clipped():
    model = linear_model()
    before = copy.deepcopy(model.state_dict())
    train(stepper_of(model, clip_grad=1e-3), batches_of(1), 1)
    moved = torch.cat([(model.state_dict()[name] - value).flatten() for name, value in before.items()])
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_average_follows_the_weights():
    model = linear_model()
    start = model[1].weight.clone()
    ema = ModelEmaV3(model, decay=0.75)
    train(stepper_of(model, ema=ema), batches_of(1), 1)
    torch.testing.assert_close(ema.module[1].weight, 0.75 * start + 0.25 * model[1].weight)


def test_data_that_ends_early_is_no_shorter_epoch():
    with pytest.raises(UsageError, match="the training data ended after 4 of epoch 1's 6 updates"):
        train(stepper_of(linear_model(), accum_steps=2), batches_of(9), 6)


def test_training_can_stop_after_any_update():
    seen = []

    def after_update(update, loss):
        seen.append(update)
        return update == 4

    assert not train(stepper_of(linear_model()), batches_of(10), 10, start=2, after_update=after_update)
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_on_the_cpu(dtype):
    model = linear_model()
    stepper = stepper_of(model)
    stepper.precision = Precision(CPU, dtype)
    losses = []
    batch = batches_of(1)[0]
    train(stepper, [batch] * 8, 8, after_update=lambda update, parts: losses.append(parts["loss"].item()))
    assert losses[-1] < losses[0] / 2
    assert stepper.precision.scaler.is_enabled() == (dtype == torch.float16)


def test_loss_that_is_not_finite_is_placed():
    model = linear_model()
    batches = batches_of(4)
    batches[2]["images"][0, 0, 0, 0] = float("nan")
    meter = LossMeter(CPU, ALONE)
    train_one_epoch(stepper_of(model), batches, meter, epoch=3, updates=4)
    with pytest.raises(NonFiniteLoss, match="epoch 4, update 3"):
        meter.check(3)


def test_meter_goes_on_from_its_state():
    whole, part, rest = (LossMeter(CPU, ALONE) for _ in range(3))
    losses = torch.rand(6)
    for number, loss in enumerate(losses):
        whole.add(loss, number)
        if number < 3:
            part.add(loss, number)
    part.gather()
    rest.load_state_dict(part.state_dict())
    for number, loss in enumerate(losses[3:]):
        rest.add(loss, number)
    assert rest.average() == whole.average() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_by_hand(classes):
    logits = torch.randn(30, classes, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(classes, (30,), generator=torch.Generator().manual_seed(1))
    batches = [(logits[i : i + 7], targets[i : i + 7]) for i in range(0, 30, 7)]
    batches = [{"images": a[:, :, None, None], "targets": b} for a, b in batches]
    metrics = evaluate(task_of(classes), nn.Flatten(), batches, Precision(CPU))
    ranks = (logits > logits[torch.arange(30), targets][:, None]).sum(1)
    assert metrics["acc1"] == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert metrics["acc5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert metrics["images"] == 30


def test_position_tables_norms_and_biases_do_not_decay():
    model = timm.create_model("debiformer_nano", num_classes=10)
    optimizer = build_optimizer(model, Options(), total_batch=512)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decaying) == (parameter.ndim > 1 and not name.endswith("rpe_table")), name


def test_rate_scales_with_the_total_batch():
    optimizer = build_optimizer(linear_model(), Options(lr=1e-3), total_batch=2048)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-3)


def test_layer_decay_slows_the_stem_most():
    model = timm.create_model("debiformer_nano", num_classes=10)
    optimizer = build_optimizer(model, Options(layer_decay=0.5), total_batch=512)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    rates = [
        scale[id(parameter)]
        for parameter in (
            model.downsample_layers[0][0].weight,
            model.stages[0][0].pos_embed1.weight,
            model.stages[2][0].pos_embed1.weight,
            model.stages[2][1].pos_embed1.weight,
            model.head.weight,
        )
    ]
    assert rates == sorted(rates)
    assert len(set(rates)) == 5


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "lamb"])
def test_timm_optimizers_are_built(opt):
    assert build_optimizer(linear_model(), Options(opt=opt), total_batch=512).param_groups


@pytest.mark.parametrize("sched", ["cosine", "step", "constant", "poly"])
def test_schedule_warms_up(sched):
    options = Options(sched=sched, warmup_epochs=2, epochs=10, warmup_lr=1e-6)
    optimizer = build_optimizer(linear_model(), options, total_batch=512)
    scheduler = build_scheduler(optimizer, options)
    rates = []
    for epoch in range(3):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[0] < rates[1] < rates[2] <= 5e-4


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_mixes_in_the_teacher(kind):
    images = torch.randn(4, 3, 8, 8)
    targets = torch.tensor([0, 1, 2, 3])
    teacher, student = linear_model(), torch.randn(4, 10)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha=0.3, tau=2.0)(images, student, targets)
    said = teacher(images)
    if kind == "hard":
        expected = F.cross_entropy(student, said.argmax(1))
    else:
        p, q = F.softmax(said / 2, 1), F.softmax(student / 2, 1)
        expected = (p * (p.log() - q.log())).sum() * 4 / 40
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(student, targets) + 0.3 * expected)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_smoothing_is_left_to_mixing():
    assert "Soft" in type(build_loss(Options()).base).__name__
    assert "Smoothing" in type(build_loss(Options(mixup=0, cutmix=0)).base).__name__
    assert type(build_loss(Options(mixup=0, cutmix=0, smoothing=0)).base) is nn.CrossEntropyLoss


# -- pixels


def test_pixels_are_normalised_on_the_device_as_timm_does_on_the_host():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 44, 3)).astype(np.uint8)
    plain, expected = (create_transform(32, normalize=on_host)(Image.fromarray(pixels)) for on_host in (False, True))
    assert plain.dtype == torch.uint8
    assert torch.equal(normalize(plain[None], Pixels())[0], expected)
    assert torch.equal(normalize(expected, Pixels()), expected)


def test_training_run_erases_parts_of_its_images(small_options, monkeypatch):
    seen = []

    class Watching(RandomErasing):
        def __call__(self, images):
            before = images.clone()
            seen.append((super().__call__(images) != before).flatten(1).any(1))
            return images

    monkeypatch.setattr("tasks.classification.task.RandomErasing", Watching)
    main.run(small_options("--epochs", "1", "--reprob", "0.5"))
    erased = torch.cat(seen)
    assert len(erased) == 48
    assert 10 < erased.sum() < 38
