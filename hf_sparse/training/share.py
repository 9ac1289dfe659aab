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

UNITS = ("items", "samples", "tokens")


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Counts over all micro-batches of a step and all ranks.

    Attributes:
        counts: [3] int64, one per entry of `UNITS`. None means that one micro-batch is the whole step, so that every
            share is exactly 1.
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
        counts = torch.stack([count_units(batch, shifted).to(device) for batch in micro_batches]).sum(0)
        return cls(counts=sum_over_ranks(counts))

    def shares(self, inputs: Mapping[str, Any], shifted: bool) -> dict[str, Tensor | None]:
        """Give a micro-batch's share of the step, times the number of ranks.

        Ranks average their gradients, so the factor undoes that division.

        Returns:
            {unit of `UNITS`: a factor, scalar float32; None where it is exactly 1}, and under "sum" the factor of a
            loss that is a sum over samples.
        """
        if self.counts is None:
            return dict.fromkeys((*UNITS, "sum"))
        counts = count_units(inputs, shifted).to(self.counts.device)
        factors = counts * world_size() / self.counts.clamp(min=1)
        summed = torch.full((), float(world_size()), device=factors.device)
        return {**dict(zip(UNITS, factors.unbind(), strict=True)), "sum": summed}


def count_units(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """Count a micro-batch in each of `UNITS`, on its own device, without waiting for it.

    Items are what a task loss is a mean over: labels other than -100, or samples where labels are not integers.
    Tokens are the positions that are not padding.

    Returns:
        [3] int64: items, samples, tokens.

    Raises:
        ValueError: if the inputs hold no tensor to count samples by.

    Example:
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> count_units({"input_ids": ids, "labels": torch.tensor([[5, -100, 2], [1, 1, -100]])}, shifted=False)
        tensor([4, 2, 2])
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise ValueError(f"the batch holds no tensor, only {sorted(inputs)}: samples cannot be counted.")
    # Filled on the device: copying a number from the host would wait for it.
    samples = torch.full((), len(tensors[0]), dtype=torch.long, device=tensors[0].device)
    items, tokens = samples, samples
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
        items = (labels[..., 1:] if shifted and labels.ndim > 1 else labels).ne(-100).sum()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = (mask[:, 1:] if shifted else mask).ne(0).sum()
    return torch.stack([items, samples, tokens])
