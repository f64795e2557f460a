"""Functions with a backward pass of their own, as operators: torch.compile, torch.export and autograd see one node.

An operator takes tensors, then options, and returns one or more tensors; `NAME_backward` takes the gradients of the
first outputs (None for one that has none, where `Tensor | None` is annotated, else zeros), the tensors, all outputs and
the options. Bodies run on real tensors only, on the tensors' own device: at once where nothing asks for operators, for
PyTorch's way to them takes Python longer than most kernels take the GPU.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "debiformer"


class Operator:
    """A function that is `registered` as an operator, and runs without PyTorch's dispatcher where that is all the same.

    body: the function itself. directly: does what the operator does to plain tensors.
    """

    def __init__(
        self, registered: torch.library.CustomOpDef, body: Callable[..., Any], directly: Callable[..., Any]
    ) -> None:
        self.registered, self.body, self.directly = registered, body, directly

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(arguments):
            return self.registered(*arguments)
        return self.directly(*arguments)


operators: dict[str, Operator] = {}
"""By name."""


def _is_watched(arguments: Sequence[Any]) -> bool:
    """Whether somebody records, traces or transforms operators, or tensors do."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(isinstance(x, Tensor) and (type(x) not in (Tensor, nn.Parameter) or x.is_meta) for x in arguments)
    )


def operator(
    name: str,
    function: Callable[..., Any],
    outputs_like: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Operator:
    """Register a function without gradients.

    Args:
        outputs_like: the function's arguments -> empty tensors like its outputs.
        flops: floating-point operations, by the arguments with shapes in place of tensors.
    """
    schema, runs = torch.library.infer_schema(function, mutates_args=()), _on_device(function)
    registered = torch.library.custom_op(f"{NAMESPACE}::{name}", runs, mutates_args=(), schema=schema)
    registered.register_fake(outputs_like)
    if flops:
        register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)
    operators[name] = Operator(registered, function, runs)
    return operators[name]


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
    outputs_like: Callable[..., Any],
    gradients: Sequence[int],
    differentiated: int = 1,
    packed: int = 0,
    flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
) -> Operator:
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

    forward_operator = operator(name, forward, outputs_like, flops and flops[0])
    backward_operator = operator(f"{name}_backward", backward, gradients_like, flops and flops[1])
    schema = backward_operator.registered._opoverload._schema
    optional = [n for n, x in enumerate(schema.arguments) if isinstance(x.type, torch.OptionalType)]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.inputs = len(inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*tensors, *outputs)
        ctx.mark_non_differentiable(*outputs[differentiated:])
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

    forward_operator.registered.register_autograd(spread, setup_context=save)
    directly = _recorded(name, forward_operator, save, spread)
    operators[name] = Operator(forward_operator.registered, forward, directly)
    return operators[name]


def _recorded(
    name: str, operator: Operator, save: Callable[..., None], spread: Callable[..., Any]
) -> Callable[..., Any]:
    """What runs an operator at once, with gradients where they are wanted: `save` keeps what `spread` makes them of."""

    def run_and_save(ctx: Any, *arguments: Any) -> Any:
        output = operator.directly(*arguments)
        save(ctx, arguments, output)
        return output

    steps = {"forward": run_and_save, "backward": once_differentiable(spread)}
    function = type(name, (torch.autograd.Function,), {step: staticmethod(f) for step, f in steps.items()})

    def directly(*arguments: Any) -> Any:
        return (function.apply if torch.is_grad_enabled() else operator.directly)(*arguments)

    return directly


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run with its first tensor's GPU as the current one: Triton launches on the current GPU."""

    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            return function(*arguments)

    return run
