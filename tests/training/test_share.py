"""The shares by which micro-batches add up to a step."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.training.share import UNITS, StepTotals, count_units

CPU = torch.device("cpu")


def batch(labels: list[list[int]], mask: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    made = {"input_ids": torch.ones(len(labels), len(labels[0]), dtype=torch.long), "labels": torch.tensor(labels)}
    return made if mask is None else {**made, "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    ("inputs", "shifted", "expected"),
    [
        (batch([[5, -100, 2], [1, 1, -100]], [[1, 1, 1], [1, 1, 0]]), False, [4, 2, 5]),
        # A causal model never predicts the first token of a row.
        (batch([[5, -100, 2], [1, 1, -100]], [[1, 1, 1], [1, 1, 0]]), True, [2, 2, 3]),
        (batch([[5, 3, 2], [1, 1, 1]]), False, [6, 2, 2]),
        ({"x": torch.ones(3, 4), "labels": torch.tensor([0, -100, 1])}, False, [2, 3, 3]),
        ({"x": torch.ones(3, 4), "labels": torch.tensor([0, 2, 1])}, True, [3, 3, 3]),
        ({"x": torch.ones(3, 4), "labels": torch.tensor([0.5, 0.1, 0.2])}, False, [3, 3, 3]),
        ({"x": torch.ones(3, 4), "labels": torch.ones(3, 5)}, False, [3, 3, 3]),
        ({"x": torch.ones(3, 4)}, False, [3, 3, 3]),
        ({"name": "a", "scalar": torch.tensor(1.0), "x": torch.ones(7, 1)}, False, [7, 7, 7]),
    ],
)
def test_units_are_counted(inputs: dict[str, torch.Tensor], shifted: bool, expected: list[int]) -> None:
    assert count_units(inputs, shifted).tolist() == expected


def test_one_micro_batch_has_no_factor_at_all() -> None:
    inputs = batch([[1, 2]])
    assert StepTotals.of([inputs], False, CPU).shares(inputs, False) == dict.fromkeys((*UNITS, "sum"))


def test_shares_add_up_to_one() -> None:
    parts = [batch([[1, -100, -100]], [[1, 1, 0]]), batch([[1, 2, 3], [1, 2, -100]], [[1, 1, 1], [1, 1, 1]])]
    totals = StepTotals.of(parts, False, CPU)
    shares = [totals.shares(part, False) for part in parts]
    for unit, expected in zip(UNITS, ([1 / 6, 5 / 6], [1 / 3, 2 / 3], [2 / 8, 6 / 8]), strict=True):
        assert [float(share[unit]) for share in shares] == pytest.approx(expected)


def test_a_loss_that_is_a_sum_is_left_as_it_is_on_one_rank() -> None:
    parts = [batch([[1, 2]]), batch([[1, 2], [3, 4]])]
    totals = StepTotals.of(parts, False, CPU)
    assert [float(totals.shares(part, False)["sum"]) for part in parts] == [1.0, 1.0]


def test_nothing_to_count_is_a_share_of_zero() -> None:
    parts = [batch([[-100, -100]]), batch([[-100, -100]])]
    shares = StepTotals.of(parts, False, CPU).shares(parts[0], False)
    assert float(shares["items"]) == 0.0
    assert float(shares["samples"]) == 0.5
