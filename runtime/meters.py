"""The loss of an epoch, and whether training has diverged."""

import math

import torch
from torch import Tensor, nn

from runtime.distributed import DistInfo, all_reduce_sum
from runtime.errors import NonFiniteLoss

DIVERGED = "the last good checkpoint is kept. Try a lower --lr, --clip_grad 5 or --amp bf16"


def check_weights(model: nn.Module, epoch: int) -> None:
    """NonFiniteLoss if an update of this epoch made a parameter infinite or NaN. Waits for the device."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    if nn.utils.get_total_norm(parameters).isfinite():
        return
    if not all(parameter.isfinite().all() for parameter in parameters):  # large ones have an infinite norm, too
        raise NonFiniteLoss(f"the weights are not finite after an update of epoch {epoch + 1}; {DIVERGED}")


class LossMeter:
    """Mean of an epoch's losses, kept on the device so that adding to it waits for nothing."""

    def __init__(self, device: torch.device, processes: DistInfo) -> None:
        self.processes = processes
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=dtype, device=device)  # of losses, and how many
        self.first_bad = torch.full((), -1, device=device)
        self.gathered: list[list[float]] = []

    def reset(self) -> None:
        self.sums.zero_()
        self.first_bad.fill_(-1)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What `gather` collected."""
        return {"sums": self.gathered}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Each process takes its own sums; among another number of processes, the main one takes all."""
        self.reset()
        rows = torch.tensor(state["sums"], dtype=self.sums.dtype)
        if len(rows) == self.processes.world_size:
            self.sums.copy_(rows[self.processes.rank])
        elif self.processes.is_main:
            self.sums.copy_(rows.sum(0))

    def add(self, loss: Tensor, update: int) -> None:
        loss = loss.detach()
        self.sums += torch.stack([loss, torch.ones_like(loss)])
        bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, update, self.first_bad)

    def check(self, epoch: int) -> None:
        """NonFiniteLoss if any loss so far was not finite. Waits for the device."""
        bad = int(self.first_bad.item())
        if bad >= 0:
            raise NonFiniteLoss(f"the loss is not finite at epoch {epoch + 1}, update {bad + 1}; {DIVERGED}")

    def gather(self) -> None:
        """Collect the sums of all processes, for the state dict. Waits for the device."""
        rows = self.sums.new_zeros(self.processes.world_size, 2)
        rows[self.processes.rank] = self.sums
        self.gathered = all_reduce_sum(rows, self.processes).tolist()

    def average(self) -> float:
        """Mean loss over all updates and processes; NaN without any."""
        total, count = all_reduce_sum(self.sums.clone(), self.processes).tolist()
        return total / count if count else math.nan
