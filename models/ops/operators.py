"""Functions with a backward pass of their own, as operators: torch.compile, torch.export and autograd see one node.

An operator takes tensors, then options, and returns one or more tensors; `NAME_backward` takes the gradients of the
first outputs (None for one that has none, where `Tensor | None` is annotated, else zeros), the tensors, all outputs and
the options. Bodies run on real tensors only, on the tensors' own device.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "debiformer"
_bodies: dict[str, Callable[..., Any]] = {}


def body(name: str) -> Callable[..., Any]:
    """What an operator runs."""
    return _bodies[name]


def operator(
    name: str,
    function: Callable[..., Any],
    outputs_like: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> torch.library.CustomOpDef:
    """Register a function without gradients.

    Args:
        outputs_like: the function's arguments -> empty tensors like its outputs.
        flops: floating-point operations, by the arguments with shapes in place of tensors.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    registered = torch.library.custom_op(f"{NAMESPACE}::{name}", _on_device(function), mutates_args=(), schema=schema)
    registered.register_fake(outputs_like)
    _bodies[name] = function
    if flops:
        register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)
    return registered


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
    outputs_like: Callable[..., Any],
    gradients: Sequence[int],
    differentiated: int = 1,
    packed: int = 0,
    flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
) -> torch.library.CustomOpDef:
    """Register `forward` and `backward` as operators.

    Args:
        outputs_like: forward's arguments -> empty tensors like its outputs.
        gradients: for each of the first inputs, which of the tensors that backward returns is its gradient; -1: the
            incoming gradient is. Backward returns contiguous tensors that share no memory.
        differentiated: how many of the first outputs have gradients, which backward takes.
        packed: how many of the last gradients backward returns as one vector, one behind the other.
        flops: floating-point operations of forward and backward, by the arguments with shapes in place of tensors.
    """
    firsts = [gradients.index(number) for number in range(max(gradients) + 1)]
    alone, together = firsts[: len(firsts) - packed], firsts[len(firsts) - packed :]

    def gradients_like(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = arguments[differentiated:]
        vector = [inputs[together[0]].new_empty(sum(inputs[i].numel() for i in together))] if packed else []
        return (*(inputs[i].new_empty(inputs[i].shape) for i in alone), *vector)

    registered = operator(name, forward, outputs_like, flops and flops[0])
    backward_operator = operator(f"{name}_backward", backward, gradients_like, flops and flops[1])
    schema = backward_operator._opoverload._schema
    optional = [n for n, x in enumerate(schema.arguments) if isinstance(x.type, torch.OptionalType)]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*tensors, *(output if isinstance(output, tuple) else (output,)))
        ctx.set_materialize_grads(False)  # else there would be a tensor of zeros for every output without a gradient

    def spread(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        outputs = saved[len(saved) - len(grads) :]
        given = [
            torch.zeros_like(x) if g is None and number not in optional else g
            for number, (g, x) in enumerate(zip(grads[:differentiated], outputs, strict=False))
        ]
        found = list(backward_operator(*given, *saved, *ctx.options))
        if packed:
            parts = found.pop().split([saved[i].numel() for i in together])
            found += [part.view_as(saved[i]) for part, i in zip(parts, together, strict=True)]
        of_inputs = (grads[0] if number < 0 else found[number] for number in gradients)
        return (*of_inputs, *(None,) * (ctx.inputs - len(gradients)))

    registered.register_autograd(spread, setup_context=save)
    return registered


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run with its first tensor's GPU as the current one: Triton launches on the current GPU."""

    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            return function(*arguments)

    return run
