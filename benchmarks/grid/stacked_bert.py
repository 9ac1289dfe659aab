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
# In elements: what tensor cores want rows of memory to begin at.
_ALIGNED = 64
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
        self.depth: int = self.config.num_hidden_layers
        self.eps: float = self.config.layer_norm_eps
        self.targets = [f"bert.encoder.layer.{i}.{kind}" for i in range(self.depth) for kind in LINEARS]
        shapes = {name: p.shape for name, p in first.named_parameters() if ".embeddings." not in name}
        # One flat tensor per kind, so that what is done to all weights is one kernel: [N, P].
        self.bounds: dict[str, tuple[int, int]] = {}
        end = 0
        for name, shape in shapes.items():
            self.bounds[name] = end, end + shape.numel()
            end += -(-shape.numel() // _ALIGNED) * _ALIGNED
        self.shapes = shapes
        self.flat = torch.zeros(self.size, end, device=device)
        self.weights = self.views(self.flat)
        copied: dict[int, dict[str, Tensor]] = {}
        for n, model in enumerate(models):
            if id(model) not in copied:
                copied[id(model)] = {
                    name: p.detach().to(device) for name, p in model.named_parameters() if name in shapes
                }
            for name, values in copied[id(model)].items():
                self.weights[name][n].copy_(values)
        self.low = self.flat if compute == torch.float32 else self.flat.to(compute)
        self.leaves = {name: view.detach().requires_grad_(trained) for name, view in self.views(self.low).items()}
        self.grad = torch.zeros_like(self.flat) if trained else torch.empty(0)
        self.grads = self.views(self.grad) if trained else {}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """See a flat tensor [N, P] as weights: {name: [N, ...]}."""
        return {name: flat[:, begin:end].unflatten(1, self.shapes[name]) for name, (begin, end) in self.bounds.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of the last backward into `grad`, in float32."""
        found = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        if len(found) < len(self.leaves):
            self.grad.zero_()
        torch._foreach_copy_([self.grads[name] for name in found], list(found.values()))
        for leaf in self.leaves.values():
            leaf.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights to the compute dtype, after they have changed."""
        if self.low is not self.flat:
            self.low.copy_(self.flat)

    @torch.no_grad()
    def embed(self, ids: Tensor, types: Tensor) -> Tensor:
        """Embed tokens: ids, types [..., T] -> [..., T, D]."""
        flat = self.embeddings(input_ids=ids.flatten(0, -2), token_type_ids=types.flatten(0, -2))
        return flat.view(*ids.shape, -1).to(self.compute)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear of every model: [N, M, I] -> [N, M, O]."""
        return _Linear.apply(x, self.leaves[f"{name}.weight"], self.leaves[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply a LayerNorm of every model: [N, M, D] -> [N, M, D]."""
        plain = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.leaves[f"{name}.bias"][:, None], plain, self.leaves[f"{name}.weight"][:, None])

    def layer(self, index: int, x: Tensor, real: Tensor, watch: Watch | None = None) -> Tensor:
        """Run one layer: x [N, B, T, D], real [N, B, T] bool -> [N, B, T, D]."""
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
