"""Mean intersection over union from one matrix of counts."""

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts pixels by (true class, predicted class), in int64, so that sums are exact in any order.

    counts: (K, K) on the device.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", ignored: int = 255) -> None:
        self.num_classes, self.ignored = num_classes, ignored
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count label maps of the same shape, of classes 0..K-1; pixels whose label is `ignored` do not count."""
        valid = labels != self.ignored
        cells = labels[valid].long() * self.num_classes + predicted[valid].long()
        self.counts += torch.bincount(cells, minlength=self.num_classes**2).view_as(self.counts)

    def compute(self) -> dict[str, float]:
        """Return mIoU, mAcc and aAcc in percent; classes that occur neither in labels nor predictions are left out."""
        hits = self.counts.diagonal().double()
        labelled, predicted = self.counts.sum(1).double(), self.counts.sum(0).double()
        return {
            "mIoU": 100 * (hits / (labelled + predicted - hits)).nanmean().item(),
            "mAcc": 100 * (hits / labelled).nanmean().item(),
            "aAcc": 100 * (hits.sum() / labelled.sum()).item(),
        }
