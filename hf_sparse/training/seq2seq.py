"""`SparseDistillSeq2SeqTrainer`: what `Seq2SeqTrainer` is to `Trainer`, evaluation by generating text."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_sparse.training.config import SparseDistillConfig
from hf_sparse.training.trainer import SparseDistillTrainer


@dataclass
class SparseDistillSeq2SeqConfig(SparseDistillConfig, Seq2SeqTrainingArguments):
    """`SparseDistillConfig` with the fields of `Seq2SeqTrainingArguments`: `predict_with_generate` and its kin.

    Example:
        >>> SparseDistillSeq2SeqConfig(output_dir="out", predict_with_generate=True, sparsity=0.5).generation_num_beams
    """


class SparseDistillSeq2SeqTrainer(SparseDistillTrainer, Seq2SeqTrainer):
    """A `SparseDistillTrainer` that takes everything `Seq2SeqTrainer` takes, and generates where that does.

    Args:
        model, teacher_model: as for `SparseDistillTrainer`.
        args: a `SparseDistillSeq2SeqConfig`, or `Seq2SeqTrainingArguments`, which get the sparse defaults.
    """

    args: SparseDistillSeq2SeqConfig
    config_class = SparseDistillSeq2SeqConfig
