"""The order in which images are seen.

`position` numbers the images that all processes together see in an epoch; together with (seed, epoch) it decides which
image comes, and every random choice about it. So a place in the data is one number.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from runtime.distributed import DistInfo
from runtime.errors import UsageError
from utils import unite_seeds

REPEATS = 3
"""Views of one image under repeated augmentation (Hoffer et al., arXiv 1902.05509)."""


class Key(NamedTuple):
    """What a sampler hands to a dataset: which image, and what its random numbers are drawn from."""

    index: int
    epoch: int = 0
    position: int = 0


class TrainSampler(Sampler):
    """This process's share of an epoch's stream of images, from any position on.

    The stream is a function of (seed, epoch) alone; every `world_size`-th element goes to the same process. So
    with the same total batch, any number of processes sees the same batches. `length` images are seen per epoch,
    a multiple of the total batch. With repeated augmentation an image comes three times in a row in the stream, and an
    epoch ends after as many images as the dataset has, rounded down to a multiple of 256 as published.

    updates: batches per epoch; then the epochs are parts of one stream, permutation after permutation. None: an epoch
    is one permutation.
    groups: (size,) integers; every permutation is rearranged by them (see `in_groups`). None: it is as drawn.
    """

    def __init__(
        self,
        size: int,
        total_batch: int,
        seed: int,
        repeats: int,
        processes: DistInfo,
        updates: int | None = None,
        groups: Tensor | None = None,
    ) -> None:
        assert groups is None or (repeats == 1 and len(groups) == size)
        self.size, self.total_batch, self.seed, self.repeats, self.groups = size, total_batch, seed, repeats, groups
        stream = size // 256 * 256 if repeats > 1 and size >= 256 else size
        self.endless = updates is not None
        self.length = updates * total_batch if self.endless else stream // total_batch * total_batch
        self.rank, self.world_size = processes.rank, processes.world_size
        self.epoch = self.start = 0
        if self.length == 0:
            raise UsageError(
                f"{size} training images do not fill one batch of {total_batch} "
                "(batch_size x processes x accum_steps); lower --batch_size"
            )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Continue at image `start` (a multiple of the total batch) of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.length - self.start) // self.world_size

    def __iter__(self) -> Iterator[Key]:
        order, drawn = None, None
        for position in range(self.start + self.rank, self.length, self.world_size):
            turn, place = self.epoch, position // self.repeats
            if self.endless:
                turn, place = divmod((self.epoch * self.length + position) // self.repeats, self.size)
            if turn != drawn:
                order, drawn = self._permutation(turn), turn
            yield Key(int(order[place]), self.epoch, position)

    def _permutation(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(unite_seeds(self.seed, turn))
        order = torch.randperm(self.size, generator=generator)
        if self.groups is None:
            return order
        begun = -turn * self.size % self.total_batch if self.endless else 0  # the last batch of the turn before
        return torch.cat([order[:begun], in_groups(order[begun:], self.groups, self.total_batch)])


def in_groups(order: Tensor, groups: Tensor, batch: int) -> Tensor:
    """Rearrange image numbers into batches of one group each, for less padding where a group is a shape.

    Batches come in the order in which they are complete, images in theirs; those that fill no batch come last.

    Args:
        order: (N,) image numbers.
        groups: the group of every image by its number.
        batch: images per batch.

    Returns:
        (N,) the same numbers.
    """
    group_at, batches, left = groups[order], [order.new_empty(0, batch)], [order.new_empty(0)]
    for group in group_at.unique():
        places = (group_at == group).nonzero().flatten()
        full = len(places) // batch * batch
        batches.append(places[:full].view(-1, batch))
        left.append(places[full:])
    whole = torch.cat(batches)
    return order[torch.cat([whole[whole[:, -1].argsort()].flatten(), torch.cat(left).sort().values])]


class EvalSampler(Sampler):
    """Every image once: all of them, or every `world_size`-th when the evaluation is split. Nothing is padded."""

    def __init__(self, size: int, processes: DistInfo, split: bool) -> None:
        self.indices = range(processes.rank, size, processes.world_size) if split else range(size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Key]:
        return (Key(index) for index in self.indices)
