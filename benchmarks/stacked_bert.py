"""Several BERT classifiers as one: every weight has a leading axis of models, so that one GPU trains a grid at once.

Shape letters: N models, S streams of batches (one per seed), B rows, T tokens, D hidden size, M = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
Watch = Callable[[str, Tensor], None]


class _Linear(torch.autograd.Function):
    """x [N, M, I], weight [N, O, I], bias [N, O] -> [N, M, O]; its gradients lie in memory as the weights do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needs[0] else None,
            torch.bmm(gradient.transpose(1, 2), x) if needs[1] else None,
            gradient.sum(1) if needs[2] else None,
        )


class StackedBert:
    """N `BertForSequenceClassification` without dropout, whose frozen embeddings they share.

    Args:
        models: of one shape; their weights are copied, embeddings are taken from the first.
        compute: dtype of matrix products; bfloat16 as autocast does, float32 for exactness.
        device: where it runs.
        trained: whether weights take gradients.
    """

    def __init__(
        self, models: Sequence[nn.Module], compute: torch.dtype, device: torch.device, trained: bool = True
    ) -> None:
        first: Any = models[0]
        self.config = first.config
        self.compute, self.size = compute, len(models)
        self.embeddings = first.bert.embeddings.to(device).eval().requires_grad_(False)
        states = [dict(model.named_parameters()) for model in models]
        self.weights: dict[str, Tensor] = {
            name: torch.stack([state[name].detach().to(device, torch.float32) for state in states])
            for name in states[0]
            if ".embeddings." not in name
        }
        if trained:
            for weight in self.weights.values():
                weight.requires_grad_()
        self.depth: int = self.config.num_hidden_layers
        self.eps: float = self.config.layer_norm_eps
        self.targets = [f"bert.encoder.layer.{i}.{kind}" for i in range(self.depth) for kind in LINEARS]

    @torch.no_grad()
    def embed(self, ids: Tensor, types: Tensor) -> Tensor:
        """Embed tokens: ids, types [..., T] -> [..., T, D] float32."""
        flat = self.embeddings(input_ids=ids.flatten(0, -2), token_type_ids=types.flatten(0, -2))
        return flat.view(*ids.shape, -1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear of every model: [N, M, I] -> [N, M, O] in the compute dtype."""
        weight, bias = (self.weights[f"{name}.{kind}"].to(self.compute) for kind in ("weight", "bias"))
        return _Linear.apply(x.to(self.compute), weight, bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply a LayerNorm of every model, in float32: [N, M, D] -> [N, M, D]."""
        plain = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.weights[f"{name}.bias"][:, None], plain, self.weights[f"{name}.weight"][:, None])

    def layer(self, index: int, x: Tensor, real: Tensor, watch: Watch | None = None) -> Tensor:
        """Run one layer: x [N, B, T, D], real [N, B, T] bool -> [N, B, T, D] float32."""
        n, b, t, d = x.shape
        heads, name = self.config.num_attention_heads, f"bert.encoder.layer.{index}"
        flat = x.reshape(n, b * t, d)

        def project(kind: str, inputs: Tensor) -> Tensor:
            if watch is not None:
                watch(f"{name}.{kind}", inputs)
            return self.linear(f"{name}.{kind}", inputs)

        q, k, v = (project(kind, flat).view(n * b, t, heads, -1).transpose(1, 2) for kind in LINEARS[:3])
        allowed = real.reshape(n * b, 1, 1, t).expand(-1, 1, t, t)
        # Lengths change from step to step, and another backend would prepare itself anew for each.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        mixed = mixed.transpose(1, 2).reshape(n, b * t, d)
        middle = self.norm(f"{name}.attention.output.LayerNorm", project("attention.output.dense", mixed) + flat)
        inner = F.gelu(project("intermediate.dense", middle))
        return self.norm(f"{name}.output.LayerNorm", project("output.dense", inner) + middle).view(n, b, t, d)

    def classify(self, x: Tensor) -> Tensor:
        """Give the logits [N, B, labels] of hidden states [N, B, T, D]."""
        return self.linear("classifier", torch.tanh(self.linear("bert.pooler.dense", x[:, :, 0])))

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        watch: Watch | None = None,
        teacher: StackedBert | None = None,
        grafted: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers.

        Args:
            x: [N, B, T, D] embedded tokens.
            real: [N, B, T] bool, False = padding.
            watch: called with the name and the inputs [N, M, I] of every linear.
            teacher: a stack of one whose layers stand in.
            grafted: for every layer the models in which they do.

        Returns:
            Logits [N, B, labels] and hidden states, embeddings first.
        """
        states = [x]
        for index in range(self.depth):
            out = self.layer(index, x, real, watch)
            if teacher is not None and grafted is not None and grafted[index]:
                chosen = torch.tensor(grafted[index], device=x.device)
                given = teacher.layer(index, x[chosen].flatten(0, 1)[None], real[chosen].flatten(0, 1)[None])
                out = out.index_copy(0, chosen, given.view(len(chosen), *x.shape[1:]))
            x = out
            states.append(x)
        return self.classify(x), states

    def load_into(self, model: Any, index: int) -> Any:
        """Copy the weights of one model of the stack into a model of transformers."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                parameter.data.copy_(self.weights[name][index].detach().cpu())
        return model
