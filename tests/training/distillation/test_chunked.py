"""The distillation loss in chunks: the plain one to the last digits, forward and backward, without its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from hf_sparse import SparseDistillConfig, SparseDistillTrainer
from hf_sparse.training.distillation.chunked import soft_divergence
from hf_sparse.training.distillation.distill import distillation_loss
from tests.training.tiny import arguments, llama, pad, rows


def plainly(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, 24, 10**6])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 4)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_values_and_gradients_are_the_plain_ones(shape: tuple[int, ...], chunk: int, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weights = torch.rand(shape[:-1], dtype=torch.float64)
    mine, expected = student.float().requires_grad_(), student.clone().requires_grad_()
    value, reference = (
        soft_divergence(mine, teacher.float(), temperature, chunk),
        plainly(expected, teacher, temperature),
    )
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
    (value * weights.float()).sum().backward()
    (reference * weights).sum().backward()
    assert mine.grad is not None and expected.grad is not None
    torch.testing.assert_close(mine.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_chunks_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 11), torch.randn(50, 11)
    whole = soft_divergence(student, teacher, 2.0)
    assert all(torch.equal(soft_divergence(student, teacher, 2.0, chunk), whole) for chunk in (1, 30, 64, 11 * 49))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_its_gradient_in_its_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 9).to(dtype), torch.randn(6, 9).to(dtype)
    half, full = logits.clone().requires_grad_(), logits.float().requires_grad_()
    for student in (half, full):
        soft_divergence(student, teacher, 2.0, 20).sum().backward()
    assert half.grad is not None and full.grad is not None
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, full.grad.to(dtype))


def test_rows_that_do_not_count_may_hold_anything() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    student[1] = float("inf")
    student.requires_grad_()
    mask = torch.tensor([True, False, True])
    distillation_loss(student, teacher, 2.0, mask=mask).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()
    assert student.grad[0].abs().sum() > 0


class Sizes(TorchDispatchMode):
    """Records the bytes of every tensor that an operation makes; views of others are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old]
        self.made.extend(x.untyped_storage().nbytes() for x in new)
        return result


def test_only_the_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, vocabulary, chunk = 2, 32, 500, 2000
    monkeypatch.setattr("hf_sparse.training.distillation.chunked.CHUNK", chunk)
    student, teacher = (torch.randn(batch, length, vocabulary).bfloat16() for _ in range(2))
    student.requires_grad_()
    mask = torch.ones(batch, length, dtype=torch.bool)
    logits = student.untyped_storage().nbytes()
    with Sizes() as sizes:
        distillation_loss(student, teacher, 2.0, mask=mask).backward()
    large = [size for size in sizes.made if size > 4 * chunk]
    assert large == [logits], "one gradient, in the dtype of the logits"
    with Sizes() as sizes:
        plainly(student.float(), teacher.float(), 2.0).mean().backward()
    assert sum(size >= logits for size in sizes.made) > 8, "written plainly it takes many, which this test would see"


def large_tensors(folder: Path, kind: Any, **given: Any) -> int:
    """How many tensors of the size of the logits one training step of a language model makes."""
    vocabulary, data = 4000, rows("lm", 8)
    logits = 8 * max(len(row["input_ids"]) for row in data) * vocabulary * 4
    settings = {key: value for key, value in arguments(folder, max_steps=1, **given).items() if key != "block_height"}
    args = (TrainingArguments if kind is Trainer else SparseDistillConfig)(**settings)
    trainer = kind(llama(vocab_size=vocabulary), args, train_dataset=data, data_collator=pad)
    sizes = Sizes()

    def train_step(*inputs: Any, **keywords: Any) -> Any:
        with sizes:
            return step(*inputs, **keywords)

    step, trainer.training_step = trainer.training_step, train_step
    trainer.train()
    return sum(size >= logits for size in sizes.made)


def test_a_training_step_makes_three_more_tensors_of_the_size_of_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The teacher's logits, the gradient of the distillation loss, and its sum with that of the task loss.
    monkeypatch.setattr("hf_sparse.training.distillation.chunked.CHUNK", 8000)
    plain = large_tensors(tmp_path, Trainer)
    assert plain > 3
    off = large_tensors(tmp_path, SparseDistillTrainer, sparsity=0.0, kd_weight=0.0)
    assert off == plain
    assert large_tensors(tmp_path, SparseDistillTrainer, sparsity=0.0) <= plain + 3
