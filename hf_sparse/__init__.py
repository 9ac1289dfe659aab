"""hf_sparse: make a fine-tuned transformer small and fast without losing its accuracy.

Importing this package registers the checkpoint format with transformers, so that plain `from_pretrained` reads
compressed models. Everything else loads on first use: neither `hf-sparse --help` nor a serving process pays for the
trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_sparse.registration import register_when_imported
from hf_sparse.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_sparse.core.report import report
    from hf_sparse.core.stored.packing import FormatError as FormatError
    from hf_sparse.inference.compress import compress, decompress
    from hf_sparse.inference.exits.crop import crop
    from hf_sparse.inference.exits.export import export
    from hf_sparse.inference.layers.linear import BlockSparseLinear
    from hf_sparse.inference.loading import BlockSparseConfig, load_dense
    from hf_sparse.training.config import SparseDistillConfig
    from hf_sparse.training.distillation.distill import distillation_loss
    from hf_sparse.training.distillation.graft import graft
    from hf_sparse.training.pruning.masks import BlockMasks
    from hf_sparse.training.pruning.penalty import group_lasso
    from hf_sparse.training.schedules import plan_step
    from hf_sparse.training.seq2seq import SparseDistillSeq2SeqConfig, SparseDistillSeq2SeqTrainer
    from hf_sparse.training.trainer import SparseDistillTrainer

_LAZY = {
    "FormatError": "hf_sparse.core.stored.packing",
    "report": "hf_sparse.core.report",
    "compress": "hf_sparse.inference.compress",
    "decompress": "hf_sparse.inference.compress",
    "crop": "hf_sparse.inference.exits.crop",
    "export": "hf_sparse.inference.exits.export",
    "BlockSparseLinear": "hf_sparse.inference.layers.linear",
    "BlockSparseConfig": "hf_sparse.inference.loading",
    "load_dense": "hf_sparse.inference.loading",
    "SparseDistillConfig": "hf_sparse.training.config",
    "SparseDistillSeq2SeqConfig": "hf_sparse.training.seq2seq",
    "SparseDistillSeq2SeqTrainer": "hf_sparse.training.seq2seq",
    "SparseDistillTrainer": "hf_sparse.training.trainer",
    "BlockMasks": "hf_sparse.training.pruning.masks",
    "distillation_loss": "hf_sparse.training.distillation.distill",
    "graft": "hf_sparse.training.distillation.graft",
    "group_lasso": "hf_sparse.training.pruning.penalty",
    "plan_step": "hf_sparse.training.schedules",
}

__all__ = [
    "BlockMasks",
    "BlockSparseConfig",
    "BlockSparseLinear",
    "SparseDistillConfig",
    "SparseDistillSeq2SeqConfig",
    "SparseDistillSeq2SeqTrainer",
    "SparseDistillTrainer",
    "compress",
    "crop",
    "decompress",
    "distillation_loss",
    "export",
    "graft",
    "group_lasso",
    "load_dense",
    "plan_step",
    "report",
]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    # Kept, so that the next look-up does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
