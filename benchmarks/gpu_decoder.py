"""A decoder of the Llama kind with random weights: enough of it to time prefill and decoding, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu_cases import DEVICE

MakeLinear = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Size:
    """How large a decoder is; the default is Llama-7B."""

    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000


class Layer(nn.Module):
    """One layer: attention over a cache of keys and values, and a gated MLP."""

    keys: Tensor
    past: Tensor
    before: Tensor
    between: Tensor

    def __init__(self, size: Size, make: MakeLinear, batch: int, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv, self.out = make(3 * size.hidden, size.hidden), make(size.hidden, size.hidden)
        self.gate_up, self.down = make(2 * size.inner, size.hidden), make(size.hidden, size.inner)
        shape = (batch, size.heads, context, size.hidden // size.heads)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype, device=DEVICE))
        self.register_buffer("past", torch.zeros(shape, dtype=dtype, device=DEVICE))
        for name in ("before", "between"):
            self.register_buffer(name, torch.ones(size.hidden, dtype=dtype, device=DEVICE))

    def forward(self, x: Tensor, turn: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Compute [batch, length, hidden]; places [length] are the positions of x, turn their rotations."""
        batch, length, hidden = x.shape
        q, k, v = self.qkv(rms_norm(x, (hidden,), self.before)).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = _rotate(q, turn).transpose(1, 2), _rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        if mask is None:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            self.keys.index_copy_(2, places, k)
            self.past.index_copy_(2, places, v)
            mixed = scaled_dot_product_attention(q, self.keys, self.past, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(rms_norm(x, (hidden,), self.between)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Decoder(nn.Module):
    """Embeddings, layers, head.

    Args:
        size: how large.
        make: gives a linear for (out, in); the head is dense whatever it gives.
        batch, context: rows and length of the cache.
        dtype: of everything.
    """

    table: Tensor
    turns: Tensor
    ones: Tensor

    def __init__(self, size: Size, make: MakeLinear, batch: int, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size, make, batch, context, dtype) for _ in range(size.layers))
        generator = torch.Generator(DEVICE).manual_seed(1)
        table = torch.randn(size.vocabulary, size.hidden, generator=generator, device=DEVICE).to(dtype)
        self.register_buffer("table", table)
        depth = size.hidden // size.heads
        angles = torch.arange(context, device=DEVICE)[:, None] / 10000 ** (
            torch.arange(0, depth, 2, device=DEVICE) / depth
        )
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]).to(dtype))
        self.register_buffer("ones", torch.ones(size.hidden, dtype=dtype, device=DEVICE))
        self.context = context

    def prefill(self, ids: Tensor) -> Tensor:
        """Compute the logits [batch, vocabulary] after ids [batch, length], the cache left alone."""
        x, turn = self.table[ids], self.turns[:, : ids.shape[1], None]
        for layer in self.layers:
            x = layer(x, turn, None, None)
        return self._logits(x[:, -1])

    def decode(self, ids: Tensor, place: Tensor) -> Tensor:
        """Compute the logits [batch, vocabulary] of one more token, ids [batch, 1], at position place [1]."""
        x, turn = self.table[ids], self.turns[:, place, None]
        mask = (torch.arange(self.context, device=DEVICE) <= place)[None, None, None]
        for layer in self.layers:
            x = layer(x, turn, place, mask)
        return self._logits(x[:, -1])

    def _logits(self, x: Tensor) -> Tensor:
        # Logits of the size of one: the embeddings serve as the head.
        return linear(rms_norm(x, x.shape[-1:], self.ones), self.table) / x.shape[-1] ** 0.5


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
