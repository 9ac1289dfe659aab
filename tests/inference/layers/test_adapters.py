"""LoRA on compressed models: only kept blocks are reached, merging is exact, and the result is compressed still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import hf_sparse  # noqa: E402
from hf_sparse import BlockSparseLinear, compress, decompress  # noqa: E402
from hf_sparse.inference.compress import compressed_layers  # noqa: E402
from hf_sparse.inference.layers.adapters import BlockSparseLora, support_compressed  # noqa: E402
from tests.inference import models  # noqa: E402

TARGETS = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}


def compressed(family: str) -> tuple[Any, Any]:
    model, masks = models.pruned(family)
    return compress(model, masks=masks), masks


def config(family: str, **changes: Any) -> LoraConfig:
    return support_compressed(LoraConfig(r=4, target_modules=TARGETS[family], **changes))


def stir(model: Any) -> None:
    """Let the adapters do something: PEFT begins with B = 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(module: torch.nn.Module) -> list[BlockSparseLora]:
    return [m for m in module.modules() if isinstance(m, BlockSparseLora)]


@pytest.mark.parametrize("family", TARGETS)
def test_what_is_trained_is_what_is_merged(family: str) -> None:
    model, masks = compressed(family)
    before = models.outputs(model, family)
    peft = get_peft_model(model, config(family))
    assert adapted(peft)
    models.assert_same(models.outputs(peft, family), before)
    stir(peft)
    during = models.outputs(peft, family)
    assert (during - before).abs().max() > 0.01
    merged = peft.merge_and_unload()
    models.assert_same(models.outputs(merged, family), during)
    assert not adapted(merged)
    for name, layer in compressed_layers(merged).items():
        assert torch.equal(layer.block_mask(), masks[name])


def test_a_step_of_training_is_that_of_masked_dense_weights() -> None:
    model, masks = compressed("bert")
    peft = get_peft_model(model, config("bert"))
    stir(peft)
    peft.train()
    for module in peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = models.inputs("bert")
    peft(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    layer = adapted(peft)[0]
    base = layer.get_base_layer()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert base.weight.grad is None and a.grad.abs().max() > 0 and b.grad.abs().max() > 0
    # The same in dense: W0 + scaling * B A, cut to the mask, through autograd.
    x, y = torch.randn(3, 16), torch.randn(3, 16)
    ours = torch.autograd.grad((layer(x) * y).sum(), (a, b))
    mask = hf_sparse.core.blocks.expand_mask(base.block_mask(), base.block_shape)
    weight = base.dense_weight() + mask * (b @ a) * layer.scaling["default"]
    theirs = torch.autograd.grad((torch.nn.functional.linear(x, weight, base.bias) * y).sum(), (a, b))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_trained_adapter_is_saved_loaded_merged_and_saved_compressed(tmp_path: Path) -> None:
    model, masks = compressed("bert")
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(model, config("bert"))
    rows = [{"input_ids": torch.randint(3, 50, (7,)), "labels": torch.tensor(i % 3)} for i in range(16)]
    args = TrainingArguments(tmp_path / "run", max_steps=3, learning_rate=0.05, use_cpu=True, report_to=[],
                             save_strategy="no", disable_tqdm=True)  # fmt: skip
    Trainer(peft, args, train_dataset=rows).train()
    peft.save_pretrained(tmp_path / "adapter")
    after = models.outputs(peft, "bert")
    again = type(model).from_pretrained(tmp_path / "base")
    assert (models.outputs(again, "bert") - after).abs().max() > 1e-3
    loaded_config = support_compressed(PeftConfig.from_pretrained(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter", config=loaded_config)
    models.assert_same(models.outputs(loaded, "bert"), after)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert hf_sparse.report(tmp_path / "merged").bytes == hf_sparse.report(tmp_path / "base").bytes
    final = type(model).from_pretrained(tmp_path / "merged")
    models.assert_same(models.outputs(final, "bert"), after)


def test_adapters_are_merged_unmerged_and_switched_off() -> None:
    model, _ = compressed("bert")
    before = models.outputs(model, "bert")
    peft = get_peft_model(model, config("bert", lora_bias=True))
    stir(peft)
    during = models.outputs(peft, "bert")
    peft.merge_adapter()
    models.assert_same(models.outputs(peft, "bert"), during)
    with peft.disable_adapter():
        models.assert_same(models.outputs(peft, "bert"), before)
    peft.merge_adapter(safe_merge=True)
    models.assert_same(models.outputs(peft, "bert"), during)
    peft.unmerge_adapter()
    models.assert_same(models.outputs(peft, "bert"), during)


def test_two_adapters_add_up_or_take_turns() -> None:
    model, _ = compressed("bert")
    peft = get_peft_model(model, config("bert"))
    peft.add_adapter("other", config("bert"))
    stir(peft)
    first = models.outputs(peft, "bert")
    peft.set_adapter("other")
    assert (models.outputs(peft, "bert") - first).abs().max() > 0.01
    peft.set_adapter("default")
    models.assert_same(models.outputs(peft, "bert"), first)
    with pytest.raises(ValueError, match="adapter_names is not supported on compressed layers"):
        adapted(peft)[0](torch.randn(1, 16), adapter_names=["default"])


def test_dense_layers_beside_compressed_ones_get_ordinary_adapters() -> None:
    model, masks = compressed("bert")
    peft = get_peft_model(model, support_compressed(LoraConfig(r=2, target_modules=["query", "classifier"])))
    assert type(peft.base_model.model.classifier).__name__ == "Linear" and len(adapted(peft)) == 2
    stir(peft)
    during = models.outputs(peft, "bert")
    models.assert_same(models.outputs(peft.merge_and_unload(), "bert"), during)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_dropout=0.1 cannot be used on compressed layers: set lora_dropout=0"):
        config("bert", lora_dropout=0.1)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' reads a dense weight"):
        config("bert", init_lora_weights="pissa")
    with pytest.raises(ValueError, match='"all-linear" would leave compressed layers out'):
        support_compressed(LoraConfig(target_modules="all-linear"))
    model, _ = compressed("bert")
    with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
        get_peft_model(model, config("bert", use_dora=True))
    # Without being told of compressed layers, PEFT says that it does not know them.
    with pytest.raises(ValueError, match="BlockSparseLinear"):
        get_peft_model(compressed("bert")[0], LoraConfig(target_modules=["query"]))


def test_a_decompressed_model_takes_any_adapter() -> None:
    model, _ = compressed("bert")
    peft = get_peft_model(decompress(model), LoraConfig(target_modules=["query"], lora_dropout=0.1, use_dora=True))
    assert not any(isinstance(m, BlockSparseLinear) for m in peft.modules())
