"""What hf_sparse sends between GPUs, by formula; tests/distributed/test_traffic.py compares it with counted bytes.

Usage: python benchmarks/at_scale.py      prints the tables of docs/at_scale.md
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

RANKS = (1, 8, 64, 512)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as its pruned layers see it.

    Attributes:
        name: of the model.
        weights: (O, I) of every pruned layer.
        parameters: of the whole model.
        block: weights per block.
    """

    name: str
    weights: tuple[tuple[int, int], ...]
    parameters: int
    block: int

    @property
    def blocks(self) -> int:
        """Blocks of all pruned layers."""
        return sum(rows * cols // self.block for rows, cols in self.weights)

    @property
    def inputs(self) -> int:
        """Input features of all pruned layers."""
        return sum(cols for _, cols in self.weights)


def step_bytes(model: Model, sharded: bool, penalty: bool) -> int:
    """Bytes of the messages of one optimizer step: counts of samples and tokens, norms of shards for the penalty."""
    return 24 + (4 * model.blocks if sharded and penalty else 0)


def mask_update_bytes(model: Model, sharded: bool, activation: bool) -> int:
    """Bytes of the messages of one mask update: norms of shards, sizes of inputs, the masks, two comparisons."""
    norms = 4 * model.blocks if sharded else 0
    sizes = 4 * (model.inputs + len(model.weights)) if activation else 0
    masks = sum(-(-(rows * cols // model.block) // 8) for rows, cols in model.weights)
    return norms + sizes + masks + 2 * 16 * len(model.weights)


def coef_update_bytes(model: Model, sharded: bool) -> int:
    """Bytes of the messages of one reweighting: norms of shards, the coefficients."""
    return (8 if sharded else 4) * model.blocks


def end_bytes(model: Model) -> int:
    """Bytes of the messages at the end of training: masks compared, weights checked."""
    return 16 * len(model.weights) + 8 * len(model.weights) + 8


def sent(message: int, ranks: int, sides: int = 2) -> float:
    """Bytes that each GPU sends around a ring: (ranks - 1) / ranks of the message, twice for an all-reduce."""
    return sides * message * (ranks - 1) / ranks


def bert_base() -> Model:
    """BERT-base in blocks of 8 x 1."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return Model(name="BERT-base, 8 x 1", weights=tuple(layer * 12), parameters=109_483_778, block=8)


def llama_7b() -> Model:
    """Llama 2 7B in blocks of 32 x 32."""
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return Model(name="Llama 2 7B, 32 x 32", weights=tuple(layer * 32), parameters=6_738_415_616, block=1024)


def table() -> str:
    """Lay out what each GPU sends, in megabytes."""
    lines = [
        "| model | engine | what | message | "
        + " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS)
        + " |",
        "|---|---|---|--:|" + "--:|" * len(RANKS),
    ]
    for model in (bert_base(), llama_7b()):
        for engine, sharded in (("DDP", False), ("FSDP2", True)):
            # FSDP2 adds up gradients where they stay, half an all-reduce, and gathers weights twice.
            sides = 3 if sharded else 2
            lines.append(_row(model, engine, "each step without hf_sparse", 4 * model.parameters, sides))
            rows = {
                "counts, each step": step_bytes(model, sharded, penalty=False),
                "counts and penalty, each step": step_bytes(model, sharded, penalty=True),
                "mask update": mask_update_bytes(model, sharded, activation=False),
                "mask update by activations": mask_update_bytes(model, sharded, activation=True),
                "reweighting": coef_update_bytes(model, sharded),
            }
            lines += [_row(model, engine, what, message) for what, message in rows.items()]
    return "\n".join(lines)


def _row(model: Model, engine: str, what: str, message: int, sides: int = 2) -> str:
    each = " | ".join(_megabytes(sent(message, ranks, sides)) for ranks in RANKS)
    return f"| {model.name} | {engine} | {what} | {_megabytes(message)} | {each} |"


def _megabytes(size: float) -> str:
    if size >= 1e6:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1e3 else f"{size:.0f} B"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())


if __name__ == "__main__":
    main()
