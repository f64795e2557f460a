"""A run's checkpoints, written while it trains on.

The training thread lists the tensors of the state, which takes milliseconds. Another thread copies them to host memory
and writes the files. Until they are copied no update may change them; losses and gradients may be computed.

torch.distributed.checkpoint.async_save is not used: it writes a folder of shards, where a checkpoint here is one file
that torch.load reads, and its stagers copy tensor by tensor in Python, which holds up the training thread.
"""

import copy
import ctypes
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint import TrainingState, build_checkpoint, weights_only
from runtime.errors import warn
from runtime.preemption import PreemptionHandler
from runtime.run_folder import RunFolder

WITH_TENSORS = ("model", "model_ema", "optimizer")
"""The parts of a checkpoint that hold tensors. All but the model's buffers change in updates alone."""


class Saver:
    """Writes the states of a run into its folder, one after the other. At the end of a `with` block all are written.

    What goes wrong while a state is written is raised by whichever method the training thread calls next.

    device: of the training.
    """

    def __init__(self, folder: RunFolder, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._writing: _Writing | None = None
        self._place: tuple[int, int, bool] | None = None  # epoch, position, evaluated: of what was saved last
        self._content: dict[str, Any] = {}  # of a state that will be saved again when it has been evaluated

    def save(self, state: TrainingState, best: str = "") -> None:
        """Wait until the state before is written, and begin to write this one, unless it is the same.

        best: "model" or "model_ema", if these weights are the best so far. They get a file of their own.
        """
        self.wait()
        place = state.epoch, state.position, state.evaluated
        if place == self._place and not best:
            return
        content, fresh = build_checkpoint(state), not self._content or self._place[:2] != place[:2]
        if fresh:
            content |= {name: _mapped(lambda tensor: tensor, content[name]) for name in _parts(content)}
            for name, buffer in state.model.named_buffers():
                if name in content["model"]:
                    content["model"][name] = buffer.clone()
        else:
            content |= {name: self._content[name] for name in _parts(content)}
        self._place, self._content = place, {} if state.evaluated else content

        def write() -> None:
            if best:
                self.folder.save_best(weights_only(content, best))
            self.folder.save(content)

        self._writing = _Writing(content if fresh else {}, self.device, write)
        self._writing.start()

    def wait_for_copy(self) -> None:
        """Wait until the state may change."""
        if self._writing is not None:
            self._writing.wait_for_copy()

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        if self._writing is not None:
            self._writing.join()
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong, if anything has."""
        if self._writing is not None and self._writing.error is not None:
            error, self._writing = self._writing.error, None
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:
            if kind is KeyboardInterrupt:
                self._writing.give_up()
            self._writing.join()
            if isinstance(self._writing.error, Exception):
                warn(str(self._writing.error))


class _Writing(threading.Thread):
    """Copies the tensors of a checkpoint, in place of which it puts the copies, and calls `write`."""

    def __init__(self, content: dict[str, Any], device: torch.device, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._content, self._device, self._write = content, device, write
        self._begun = threading.Event()  # all copies are made, or asked of the device
        self._before, self._after = (None, None) if device.type != "cuda" else (torch.cuda.Event(), torch.cuda.Event())
        if self._before is not None:
            self._before.record(torch.cuda.current_stream(device))

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PreemptionHandler.SIGNALS)  # they wake the main thread
        try:
            self._copy()
            self._begun.set()
            if self._after is not None:
                self._after.synchronize()
            self._write()
        except BaseException as error:
            self.error = error
        finally:
            self._begun.set()
            self._content, self._write = {}, None

    def _copy(self) -> None:
        found: dict[tuple, list[Tensor]] = {}
        for name in _parts(self._content):
            _mapped(lambda tensor: found.setdefault(_memory(tensor), []).append(tensor), self._content[name])
        tensors = [same[0] for same in found.values()]
        on_cuda = self._after is not None
        copies = [torch.empty_like(tensor, device="cpu", pin_memory=on_cuda) for tensor in tensors]
        if on_cuda:
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(self._before)
            with torch.cuda.stream(stream):
                torch._foreach_copy_(copies, tensors, non_blocking=True)
            self._after.record(stream)
        elif tensors:
            torch._foreach_copy_(copies, tensors)
        copy_of = dict(zip(found, copies, strict=True))
        for name in _parts(self._content):
            self._content[name] = _mapped(lambda tensor: copy_of[_memory(tensor)], self._content[name])

    def wait_for_copy(self) -> None:
        self._begun.wait()
        if self._after is not None:
            torch.cuda.current_stream(self._device).wait_event(self._after)

    def give_up(self) -> None:
        """Have KeyboardInterrupt raised in this thread; a file that it writes stays unfinished, under its own name."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))


def _parts(content: dict[str, Any]) -> list[str]:
    return [name for name in WITH_TENSORS if name in content]


def _memory(tensor: Tensor) -> tuple:
    """What tensors have in common that are the same; empty ones only with themselves."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same containers, of what `function` makes of their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # a state dict carries its versions as an attribute
        for key, each in value.items():
            mapped[key] = _mapped(function, each)
        return mapped
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, each) for each in value)
    return value
