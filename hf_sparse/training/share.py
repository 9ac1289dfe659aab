"""What share of an optimizer step a micro-batch is, so that the gradient does not depend on how samples are split.

A model's loss is a mean over its micro-batch. Plain sums of such means weigh samples by how they happened to be
grouped; here every mean is multiplied by local count / count over all micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.training.distributed import sum_over_ranks, world_size


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Counts over all micro-batches of a step and all ranks.

    Attributes:
        counts: [2] float: items (labels that count; samples where labels are one per sample) and samples. None means
            that one micro-batch is the whole step, so that every share is exactly 1.
    """

    counts: Tensor | None = None

    @classmethod
    def of(cls, micro_batches: Sequence[Mapping[str, Any]], shifted: bool, device: torch.device) -> StepTotals:
        """Count what a step will see.

        Args:
            micro_batches: the inputs of this rank's micro-batches.
            shifted: whether position i predicts label i + 1, so that the first label of a row never counts.
            device: where the ranks communicate.
        """
        if len(micro_batches) == 1 and world_size() == 1:
            return cls()
        counts = torch.stack([count_items(batch, shifted).to(device) for batch in micro_batches]).sum(0)
        return cls(counts=sum_over_ranks(counts))

    def shares(self, inputs: Mapping[str, Any], shifted: bool) -> tuple[Tensor | float, Tensor | float]:
        """Give a micro-batch's share of the step by items and by samples, times the number of ranks.

        Ranks average their gradients, so the factor undoes that division.

        Returns:
            Two factors: for losses per item, for losses per sample.
        """
        if self.counts is None:
            return 1.0, 1.0
        counts = count_items(inputs, shifted).to(self.counts.device)
        factors = counts * world_size() / self.counts.clamp(min=1.0)
        return factors[0], factors[1]


def count_items(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """Count items and samples of one micro-batch, on its own device, without waiting for it.

    Returns:
        [2] float64: items, samples.

    Raises:
        ValueError: if the inputs hold no tensor to count samples by.

    Example:
        >>> count_items({"labels": torch.tensor([[5, -100, 2], [1, 1, -100]])}, shifted=False).tolist()
        [4.0, 2.0]
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise ValueError(f"the batch holds no tensor, only {sorted(inputs)}: samples cannot be counted.")
    samples, labels = len(tensors[0]), inputs.get("labels")
    items = torch.tensor(float(samples), dtype=torch.float64, device=tensors[0].device)
    if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
        counted = labels[..., 1:] if shifted and labels.ndim > 1 else labels
        items = (counted != -100).sum().to(torch.float64)
    return torch.stack([items, torch.full_like(items, float(samples))])
