"""Tiny models, data and arguments for the tests of the training wing. Everything is made in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_sparse import SparseDistillConfig, SparseDistillTrainer

VOCAB = 40
# The name of the option has changed between the oldest and the newest transformers that are supported.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(tf.TrainingArguments, name)
)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_config(**changes: Any) -> tf.BertConfig:
    """A BERT of 2 layers, hidden size 16, 3 labels and no dropout."""
    return tf.BertConfig(
        **{"vocab_size": VOCAB, "max_position_embeddings": 32, "num_labels": 3, **SMALL, **NO_DROPOUT, **changes}
    )


def bert(seed: int = 0, kind: str = "SequenceClassification", **changes: Any) -> Any:
    """`BertFor<kind>` of `bert_config`, with random biases and norms so that no gradient vanishes by chance."""
    torch.manual_seed(seed)
    return stirred(getattr(tf, f"BertFor{kind}")(bert_config(**changes)))


def llama(seed: int = 0, **changes: Any) -> tf.LlamaForCausalLM:
    """A Llama of 2 layers with grouped-query attention."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        **SMALL,
    }
    return stirred(tf.LlamaForCausalLM(tf.LlamaConfig(**{**settings, **changes})))


def gpt2(seed: int = 0, kind: str = "LMHeadModel", **changes: Any) -> Any:
    """A GPT-2 of 2 layers without dropout: linears stored the other way round, and a class older than its scheme."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3,
                "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2, **changes}  # fmt: skip
    return stirred(getattr(tf, f"GPT2{kind}")(tf.GPT2Config(**settings)))


def t5(seed: int = 0, **changes: Any) -> tf.T5ForConditionalGeneration:
    """A T5 of 2 + 2 layers without dropout."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
                "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0, **changes}  # fmt: skip
    return stirred(tf.T5ForConditionalGeneration(tf.T5Config(**settings)))


def stirred(model: Any, scale: float = 0.1) -> Any:
    """Add noise to all parameters, so that biases are not zero and scores do not tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def tokens(count: int, seed: int = 1, low: int = 3, high: int = 10) -> list[list[int]]:
    """Rows of random token ids, ragged: `low` to `high` tokens each, never the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def rows(task: str, count: int, seed: int = 1, labels: int = 3) -> list[dict[str, Any]]:
    """Make samples for a task: classes, multi_label, regression, tagging, qa, lm, mlm, seq2seq."""
    generator = torch.Generator().manual_seed(seed + 100)

    def pick(high: int, size: int = 1) -> list[int]:
        return torch.randint(0, high, (size,), generator=generator).tolist()

    made = []
    for ids in tokens(count, seed):
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if task == "classes":
            row["labels"] = pick(labels)[0]
        elif task == "multi_label":
            row["labels"] = [float(bit) for bit in pick(2, labels)]
        elif task == "regression":
            row["labels"] = torch.randn(1, generator=generator).item()
        elif task == "tagging":
            # The first token carries no label, as a [CLS] does.
            row["labels"] = [-100, *pick(labels, len(ids) - 1)]
        elif task == "qa":
            row["start_positions"], row["end_positions"] = pick(len(ids))[0], pick(len(ids))[0]
        elif task in ("lm", "gpt2"):
            row["labels"] = list(ids)
        elif task == "mlm":
            row["labels"] = [token if i % 3 == 1 else -100 for i, token in enumerate(ids)]
        elif task == "seq2seq":
            row["labels"] = [token + 1 for token in pick(VOCAB - 1, 2 + len(ids) % 4)]
        else:
            raise ValueError(task)
        made.append(row)
    return made


def pad(batch: Sequence[dict[str, Any]], length: int = 0) -> dict[str, Tensor]:
    """Collate: pad ids and masks with 0 and labels per token with -100, to the longest row or to `length`."""
    length = max([length, *(len(row["input_ids"]) for row in batch)])
    out = {}
    for key in batch[0]:
        values = [row[key] for row in batch]
        if key in ("input_ids", "attention_mask"):
            values = [value + [0] * (length - len(value)) for value in values]
        elif isinstance(values[0], list) and isinstance(values[0][0], int):
            longest = max(map(len, values))
            values = [value + [-100] * (longest - len(value)) for value in values]
        out[key] = torch.tensor(values)
    return out


def pad_to_10(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate to 10 tokens, for heads whose own loss sees the padding (extractive QA)."""
    return pad(batch, 10)


def arguments(folder: Path | str, **given: Any) -> dict[str, Any]:
    """Keyword arguments for a quiet run on the CPU, 8 samples per step, nothing saved or logged."""
    return {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 11,
        "save_strategy": "no", "logging_strategy": "no", "per_device_train_batch_size": 8, "max_steps": 4,
        "learning_rate": 1e-2, "block_height": 4, **given,
    }  # fmt: skip


def sparse_config(folder: Path | str, **given: Any) -> SparseDistillConfig:
    """A `SparseDistillConfig` from `arguments`."""
    return SparseDistillConfig(**arguments(folder, **given))


def make_trainer(
    model: Any, folder: Path | str, data: Any, teacher: Any = None, extra: Any = None, **given: Any
) -> Any:
    """A `SparseDistillTrainer` with `pad` as its collator; `extra` goes to the trainer, `given` to the config."""
    extra = {"data_collator": pad, "train_dataset": data, **(extra or {})}
    return SparseDistillTrainer(model, sparse_config(folder, **given), teacher_model=teacher, **extra)


class Watch(TrainerCallback):
    """Calls a function at one moment of training: Watch(on_step_end=f) calls f(state) there."""

    def __init__(self, **functions: Callable[[Any], Any]) -> None:
        for moment, function in functions.items():
            setattr(self, moment, self._caller(function))

    @staticmethod
    def _caller(function: Callable[[Any], Any]) -> Callable[..., None]:
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            function(state)

        return call


class Recorder(SparseDistillTrainer):
    """Keeps every batch and loss, the weights after every step, and the steps with new coefficients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.after: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.renewals: list[int] = []
        self.add_callback(Watch(on_step_end=lambda state: self.after.append(weights_of(self.student))))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(dict(inputs))
        if self.plan.update_coefs:
            self.renewals.append(self.plan.step)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def gradients_of(trainer: Any) -> list[dict[str, Tensor]]:
    """Train, and give the gradients that each optimizer step saw: {parameter name: gradient}."""
    seen: list[dict[str, Tensor]] = []

    def keep(state: Any) -> None:
        named = trainer.student.named_parameters()
        seen.append({name: whole(p.grad) for name, p in named if p.grad is not None})

    trainer.add_callback(Watch(on_pre_optimizer_step=keep))
    trainer.train()
    return seen


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, by name; sharded ones are gathered, so that all ranks have to call it."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: Any) -> Tensor:
    """A copy of a tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit, naming the first that is not."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name}: {(value - second[name]).abs().max().item()}"


def pruned_zero(trainer: Any) -> bool:
    """Tell, in plain loops, whether every weight of every pruned block is exactly zero, and something is pruned."""
    pruned = 0
    for name, module in trainer.pruner.masks.targets.items():
        weight = module.weight.detach()
        weight = weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(0, -2)
        mask = trainer.pruner.masks.masks[name]
        height, width = weight.shape[0] // mask.shape[0], weight.shape[1] // mask.shape[1]
        for r in range(mask.shape[0]):
            for c in range(mask.shape[1]):
                if not mask[r, c]:
                    pruned += 1
                    if (weight[r * height : (r + 1) * height, c * width : (c + 1) * width] != 0).any():
                        return False
    return pruned > 0
