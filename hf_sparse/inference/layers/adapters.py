"""LoRA on compressed models: adapters of PEFT that reach kept blocks alone, so that merging keeps the others absent.

PEFT adds B A to a weight. On a compressed layer it is added where blocks are kept and nowhere else:
W = M * (W_0 + scaling * B A) with the layer's mask M. What is trained is thus exactly what `merge_and_unload` writes
into the kept blocks, and a merged model is as small and as fast as before.

Source: SparsePEFT in SQFT (Munoz et al., Findings of EMNLP 2024).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor
from torch.nn.functional import linear

from hf_sparse.core.blocks import to_blocks
from hf_sparse.inference.kernels import to_dense
from hf_sparse.inference.layers.linear import BlockSparseLinear


class BlockSparseLora(lora.Linear):
    """What PEFT puts around a `BlockSparseLinear`; made by PEFT, for configs that `support_compressed` was given."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: the others read the weight as a dense one."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: if the config asks for what has no meaning here.
        """
        _check(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Give what an adapter adds to the kept blocks: [N, h, w], in the adapter's dtype. Differentiable."""
        base: Any = self.get_base_layer()
        index = base.index()
        down: Any = self.lora_A[adapter].weight
        up: Any = self.lora_B[adapter].weight
        delta = (up @ down) * self.scaling[adapter]
        return to_blocks(delta, base.block_shape)[index.rows, index.cols]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute [..., O] from x [..., I]; with adapters that are not merged, through a dense weight.

        Raises:
            ValueError: if a batch mixes adapters.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is not supported on compressed layers: call the model once per adapter.")
        base: Any = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if not active:
            return base(x)
        values: Tensor = base.weight
        bias: Tensor | None = base.bias
        for adapter in active:
            values = values + self.get_delta_weight(adapter).to(values.dtype)
            if self.lora_bias[adapter]:
                shift: Any = (self.lora_B[adapter].bias * self.scaling[adapter]).to(values.dtype)
                bias = shift if bias is None else bias + shift
        return linear(x, to_dense(values, base.index()), bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the kept blocks; arguments as in PEFT. Pruned blocks stay absent."""
        super().merge(safe_merge, adapter_names)
        self._forget()

    def unmerge(self) -> None:
        """Take merged adapters out of the kept blocks again."""
        super().unmerge()
        self._forget()

    def _forget(self) -> None:
        # PEFT writes through `.data`, of which a layer that is ready for its next call is not told.
        base: Any = self.get_base_layer()
        base.train(base.training)


def support_compressed(config: LoraConfig) -> LoraConfig:
    """Let a LoRA config reach compressed layers.

    Args:
        config: of PEFT; changed in place. `target_modules` has to name the layers: "all-linear" means `nn.Linear`
            alone. PEFT does not save what is registered here, so that a config that was read from a folder needs it
            again, and is then given to `PeftModel.from_pretrained(model, folder, config=config)`.

    Returns:
        The same config.

    Raises:
        ValueError: if it asks for what has no meaning on kept blocks: dropout on the input of the adapter, or an
            initialisation that reads the dense weight.

    Example:
        >>> support_compressed(LoraConfig(target_modules=["query"], lora_dropout=0.1))
        Traceback (most recent call last):
        ...
        ValueError: lora_dropout=0.1 cannot be used on compressed layers: set lora_dropout=0.
    """
    _check(config)
    if config.target_modules == "all-linear":
        raise ValueError(
            'target_modules="all-linear" would leave compressed layers out: name them, as in ["query", "value"].'
        )
    config._register_custom_module({BlockSparseLinear: BlockSparseLora})
    return config


def _check(config: LoraConfig) -> None:
    # W is made before it meets x, so that there is no input of the adapter to drop.
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} cannot be used on compressed layers: set lora_dropout=0."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} reads a dense weight, which compressed layers lack: "
            f'use True or "gaussian".'
        )
