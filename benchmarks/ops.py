"""How near single attentions come to what the machine can do.

python -m benchmarks.ops                         the models' shapes, and a detector's at 800x1344 pixels, per backend
python -m benchmarks.ops --write                 also writes benchmarks/results/

Counted: the floating-point operations of the matrix products, two forward and five backward (logits are computed
again); and the bytes of all inputs and outputs, each once, whatever is read repeatedly. Neither can be faster than the
machine's rates, measured in the same run; the slower of the two binds, and its share of the time is shown.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from models import ops
from models.ops.backend import BACKENDS
from models.pyramid import FeaturePyramid
from runtime import distributed
from runtime.errors import UsageError, exit_on_error
from runtime.model import is_ours

from .markdown import table
from .measure import (
    DTYPES,
    RESULTS,
    copy_bandwidth,
    describe_machine,
    interleaved_seconds,
    machine_line,
    matrix_rate,
    write_result,
)
from .speed import DEFAULTS, resolve_backends

DIRECTIONS = ("forward", "forward + backward")
MODELS = ("debiformer_tiny", "debiformer_small", "debiformer_base")
BAR = 0.6
"""The share of its roof that a kernel shall reach on a GPU."""


@dataclass(frozen=True)
class Attention:
    """A call of an attention: its shapes, as `ops` states them.

    name: of the function in `ops`. extra: shape of idx (routed), or shapes of rpe_table and positions (deformable).
    windows: rows and columns of windows (routed).
    """

    name: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    extra: tuple[tuple[int, ...], ...]
    num_heads: int
    scale: float
    windows: tuple[int, ...] = ()

    @property
    def keys_per_query(self) -> int:
        """Keys that a query attends to."""
        keys = prod(self.k[1:3])
        return self.extra[0][-1] * keys // self.extra[0][1] if self.name == "routed_attention" else keys

    def flops(self, direction: str) -> int:
        """Two operations per multiply-accumulate in two matrix products, in seven with backward."""
        return 2 * prod(self.q) * self.keys_per_query * (2 if direction == "forward" else 7)

    def bytes(self, direction: str, itemsize: int) -> int:
        """Inputs and output once forward; backward inputs and the output's gradient, and the inputs' gradients."""
        q, kv = prod(self.q) * itemsize, 2 * prod(self.k) * itemsize
        if self.name == "routed_attention":
            fixed, learnt = prod(self.extra[0]) * torch.int64.itemsize, 0
        else:
            fixed, learnt = 0, prod(self.extra[0]) * itemsize + prod(self.extra[1]) * torch.float32.itemsize
        forward = q + kv + fixed + learnt + q
        backward = q + kv + fixed + learnt + q + (q + kv + learnt)
        return forward if direction == "forward" else forward + backward

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Random tensors in the function's order, and those among them that have gradients."""
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in (self.q, self.k, self.k))
        if self.name == "routed_attention":
            b, p, topk = self.extra[0]
            return [q, k, v, torch.rand(b, p, p, device=device).topk(topk).indices], [q, k, v]
        table, positions = self.extra
        offsets = 0.1 * torch.randn(positions[:-1], device=device)
        learnt = [q, k, v, torch.randn(table, device=device, dtype=dtype), ops.agent_positions(offsets)]
        return learnt, learnt

    def build(self, direction: str, backend: str, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
        """A function that runs it once."""
        inputs, learnt = self.inputs(device, dtype)
        function, windows = getattr(ops, self.name), (self.windows,) if self.windows else ()

        def forward() -> Tensor:
            return function(*inputs, *windows, self.num_heads, self.scale, backend=backend)

        if direction == "forward":
            return torch.no_grad()(forward)
        for x in learnt:
            x.requires_grad_()
        gradient = torch.randn(self.q, device=device, dtype=dtype)
        return lambda: torch.autograd.grad(forward(), learnt, gradient)


class _Recorder(TorchDispatchMode):
    """Notes the attentions that run, by their operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        name = function.name().removeprefix("debiformer::")
        if name in ("routed_attention", "deformable_attention"):
            q, k, _, *others, num_heads, scale, _backend, _workspace = args
            extra = tuple(tuple(x.shape) for x in others if isinstance(x, Tensor))
            windows = tuple(x for x in others if not isinstance(x, Tensor))
            self.found.append(Attention(name, tuple(q.shape), tuple(k.shape), extra, num_heads, scale, windows))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def attentions_of(model: nn.Module, images: Tensor) -> list[Attention]:
    """The different attentions of one forward pass, in their order. On the meta device this takes no memory."""
    with _Recorder() as recorder:
        model.eval()(images)
    return list(dict.fromkeys(recorder.found))


def all_attentions(models: Iterable[str], batch_size: int, dense: bool) -> dict[Attention, list[str]]:
    """Every attention to measure, and the models that have it.

    dense: also those of debiformer_small as a detector's backbone (16x16 windows) for one image of 800x1344 pixels.
    """
    where: dict[Attention, list[str]] = {}
    with torch.device("meta"):
        for name in models:
            model = timm.create_model(name)
            images = torch.empty(batch_size, *model.default_cfg["input_size"])
            for attention in attentions_of(model, images):
                where.setdefault(attention, []).append(name)
        if dense:
            detector = FeaturePyramid(timm.create_model("debiformer_small", n_win=16))
            for attention in attentions_of(detector, torch.empty(1, 3, 800, 1344)):
                where.setdefault(attention, []).append("debiformer_small dense")
    return where


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row per attention, direction and backend, as JSON takes it."""
    device = utils.choose_device(args.device, distributed.DistInfo())
    torch.set_num_threads(args.threads)
    defaults = DEFAULTS.get(device.type, DEFAULTS["cpu"])
    dtype_name = args.dtype or defaults.dtype
    dtype = DTYPES[dtype_name]
    backends = resolve_backends(args.backends, device, dtype_name)
    if not args.backends and "reference" not in backends:
        backends.append("reference")
    bandwidth, rate = copy_bandwidth(device), matrix_rate(device, dtype)
    rows = []
    for attention, where in all_attentions(
        args.models, args.batch_size or defaults.batch_size, not args.no_dense
    ).items():
        for direction in DIRECTIONS:
            tasks = {backend: attention.build(direction, backend, device, dtype) for backend in backends}
            timed = interleaved_seconds(tasks, args.repeats, device, warmup=1, at_least=0.01)
            flops, count = attention.flops(direction), attention.bytes(direction, dtype.itemsize)
            roofs = {"bandwidth": count / bandwidth, "matrix": flops / rate}
            binds = max(roofs, key=roofs.__getitem__)
            for backend, seconds in timed.items():
                row = {
                    **asdict(attention),
                    **{"models": where, "direction": direction, "backend": backend, "dtype": dtype_name},
                    **{"flops": flops, "bytes": count, "seconds": seconds, "binds": binds},
                    "share": roofs[binds] / statistics.median(seconds),
                }
                rows.append(row)
                print(" | ".join(cells(row)), flush=True)
    return {
        "machine": describe_machine(device),
        "copy_bandwidth": bandwidth,
        "matrix_rate": rate,
        "rows": rows,
    }


HEADER = (
    *("operator", "models", "q", "k, v", "keys per query", "dtype", "direction", "backend"),
    *("GFLOP", "MB", "ms", "binds", "share (%)"),
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    attention = Attention(**{name: row[name] for name in Attention.__dataclass_fields__})
    models = ", ".join(name.removeprefix("debiformer_") for name in row["models"])
    shapes = ("x".join(map(str, shape)) for shape in (attention.q, attention.k))
    return (
        *(attention.name.removesuffix("_attention"), models, *shapes, f"{attention.keys_per_query}"),
        *(row["dtype"], row["direction"], row["backend"]),
        *(f"{row['flops'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.2f}"),
        *(f"{1e3 * statistics.median(row['seconds']):.3f}", row["binds"], f"{100 * row['share']:.0f}"),
    )


def report(result: dict[str, Any]) -> str:
    """The page."""
    parts = [
        "# Single attentions",
        machine_line(result["machine"]) + ".",
        f"Measured in the same run: copies {result['copy_bandwidth'] / 1e9:.1f} GB/s, "
        f"matrix products {result['matrix_rate'] / 1e12:.3f} TFLOP/s.",
        table(HEADER, [cells(row) for row in result["rows"]], text_columns=2),
    ]
    shares = [row["share"] for row in result["rows"] if row["backend"] == "triton"]
    if shares:
        reached = sum(share >= BAR for share in shares)
        least = f"the least is {min(shares):.0%}"
        parts.append(f"Triton's kernels shall reach {BAR:.0%}: {reached} of {len(shares)} rows do, {least}.")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="of this project, at their native sizes")
    parser.add_argument("--no_dense", action="store_true", help="leave out the detector's shapes")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="the fastest, and reference")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batch_size", type=int, help="8 on a CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N or cpu")
    parser.add_argument("--write", action="store_true", help="write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    args = parser.parse_args(argv)
    for name in args.models:
        if not is_ours(name):
            raise UsageError(f"--models {name}: not a model of this project; see the table of README.md")
    result = measure(args)
    if args.write:
        write_result("ops", result, report(result), args.results)
    else:
        print(report(result))


if __name__ == "__main__":
    exit_on_error("benchmarks.ops", main)
