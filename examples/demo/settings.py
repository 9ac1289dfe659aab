"""Every number of the demo that somebody chose, and the folder it fills."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run does.

    Attributes:
        train_rows, test_rows: rows of the corpus.
        max_tokens: longer sentences are cut.
        batch: rows per step.
        dense_epochs, dense_learning_rate: fine-tuning of the dense model.
        sparse_epochs, sparse_learning_rate: pruning and distillation.
        block_shape: (h, w) in weights.
        sparsities: tried in this order until the score falls by no more than `allowed_fall`.
        allowed_fall: largest difference to the dense score, in [0, 1].
        minutes: no further sparsity is tried if the run would then take longer than this.
        seed: of everything random.
        tiny: a small model with random weights in place of the pretrained one: nothing to learn from, but quick.
        timing_seconds, timing_rounds: per measured latency, see `time_interleaved`.
    """

    train_rows: int = 6000
    test_rows: int = 1200
    max_tokens: int = 48
    batch: int = 32
    dense_epochs: float = 1.0
    dense_learning_rate: float = 1e-4
    sparse_epochs: float = 2.0
    sparse_learning_rate: float = 4e-4
    block_shape: tuple[int, int] = (8, 1)
    sparsities: tuple[float, ...] = (0.8, 0.7, 0.6, 0.5)
    allowed_fall: float = 0.02
    minutes: float = 9.0
    seed: int = 0
    tiny: bool = False
    timing_seconds: float = 5.0
    timing_rounds: int = 9

    def to_dict(self) -> dict[str, Any]:
        """Give plain numbers and lists, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Read what `to_dict` gave."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


SMOKE = Settings(
    train_rows=240, test_rows=60, sparsities=(0.8,), tiny=True, timing_seconds=0.2, timing_rounds=3, sparse_epochs=1.0
)


@dataclass(frozen=True)
class Paths:
    """Where a run keeps what.

    Attributes:
        root: the folder of the run.
    """

    root: Path

    @property
    def dense(self) -> Path:
        """The fine-tuned dense model."""
        return self.root / "dense"

    @property
    def pruned(self) -> Path:
        """The pruned model, as a user would publish it."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """The corpus, one parquet file per split."""
        return self.root / "data"

    @property
    def expected(self) -> Path:
        """Logits of the student as it stood in memory after training."""
        return self.root / "expected.safetensors"
