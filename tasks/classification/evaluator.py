"""Top-1 and top-5 accuracy, and cross-entropy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import DistInfo, all_reduce_sum
from runtime.errors import UsageError
from tasks.base import Batch, Evaluator


class TopK(Evaluator):
    """Sums in float64, so that they do not depend on how the images are split.

    Args:
        device: where batches are.
        info: the processes whose images all count together; None: this one's alone.
        class_subset: the class numbers among which the answer is sought; None: all.
    """

    def __init__(
        self, device: torch.device, info: DistInfo | None = None, class_subset: Sequence[int] | None = None
    ) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.info, self.sums = info, torch.zeros(4, dtype=dtype, device=device)
        self.subset = None if class_subset is None else torch.tensor(class_subset, device=device)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in logits (B, C) and "targets", (B,) classes or, where several are right, their shares (B, C)."""
        logits, targets = outputs.float(), batch["targets"]
        if self.subset is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(1, self.subset, logits[:, self.subset])
        losses = F.cross_entropy(logits, targets, reduction="none").to(self.sums.dtype)
        top = logits.topk(min(5, logits.shape[1])).indices
        ranked = top == targets[:, None] if targets.ndim == 1 else targets.gather(1, top) > 0
        count = losses.new_tensor(len(targets))
        self.sums += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), losses.sum(), count])

    def compute(self) -> dict[str, float]:
        if self.info is not None:
            all_reduce_sum(self.sums, self.info)
        correct1, correct5, loss, images = self.sums.tolist()
        if not images:
            raise UsageError("there are no images to evaluate on")
        return {
            "acc1": 100 * correct1 / images,
            "acc5": 100 * correct5 / images,
            "loss": loss / images,
            "images": int(images),
        }
