"""Folders converted tensor by tensor: the same files as through the model in memory, in a fraction of its memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import FormatError, compress, report
from hf_sparse.core.blocks import expand_mask
from hf_sparse.core.stored.reading import weight_files
from hf_sparse.core.structure.targets import find_targets, weight_view
from hf_sparse.inference.stored.shards import NewTensor, read_layout, write_bytes, write_file
from hf_sparse.inference.stored.streaming import NotStreamable, compress_folder, decompress_folder, work

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
    "bert with a tied head": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                  intermediate_size=32, vocab_size=40)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                                      vocab_size=40)),
}  # fmt: skip


def pruned(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for module in find_targets(model).values():
            weight = weight_view(module)
            weight.mul_(expand_mask(torch.rand(weight.shape[0] // 8, weight.shape[1]) < 0.3, (8, 1)))
    return model


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    files = sorted(folder.glob("model*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return tensors, [safe_open(file, framework="pt").metadata() for file in files]


def assert_same_files(first: Path, second: Path) -> None:
    (tensors, strings), (others, other_strings) = contents(first), contents(second)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
    assert strings == other_strings
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_the_model_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = pruned(name).to(dtype)
    dense, streamed, back, whole = (tmp_path / part for part in ("dense", "streamed", "back", "whole"))
    model.save_pretrained(dense)
    streamed.mkdir()
    back.mkdir()
    formats = compress_folder(dense, streamed, (8, 1))
    compress(model, block_shape=(8, 1)).save_pretrained(whole)
    assert formats.keys() == {layer.name for layer in report(whole).layers if layer.block_shape == (8, 1)}
    assert_same_files(streamed, whole)
    assert report(streamed) == report(whole)
    decompress_folder(streamed, back)
    assert_same_files(back, dense)


def test_shards_stay_shards_and_load(tmp_path: Path) -> None:
    model = pruned("llama")
    model.save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    (tmp_path / "small").mkdir()
    (tmp_path / "back").mkdir()
    seen: list[int] = []
    compress_folder(tmp_path / "dense", tmp_path / "small", (8, 1), seen.append)
    size = sum(file.stat().st_size for file in weight_files(tmp_path / "dense"))
    assert size < sum(seen) <= work(tmp_path / "dense", passes=2) == 2 * size
    names = [file.name for file in weight_files(tmp_path / "small")]
    assert len(names) > 2
    assert names == [file.name for file in weight_files(tmp_path / "dense")]
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in weight_files(tmp_path / "small") for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == report(tmp_path / "small").bytes
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    seen.clear()
    decompress_folder(tmp_path / "small", tmp_path / "back", seen.append)
    assert 0 < sum(seen) <= work(tmp_path / "small", passes=1)
    assert_same_files(tmp_path / "back", tmp_path / "dense")


def test_bitmaps_in_another_file_than_their_values(tmp_path: Path) -> None:
    pruned("bert").save_pretrained(tmp_path / "dense")
    (tmp_path / "small").mkdir()
    compress_folder(tmp_path / "dense", tmp_path / "small", (8, 1))
    tensors, [strings] = contents(tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").unlink()
    masks = {name: tensor for name, tensor in tensors.items() if name.endswith("_block_mask")}
    parts = {"a.safetensors": masks, "b.safetensors": {n: t for n, t in tensors.items() if n not in masks}}
    for file, part in parts.items():
        save_file(part, tmp_path / "small" / file, strings)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "small" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "back").mkdir()
    decompress_folder(tmp_path / "small", tmp_path / "back")
    back = {name: tensor for file in weight_files(tmp_path / "back") for name, tensor in load_file(file).items()}
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert back.keys() == dense.keys()
    assert all(torch.equal(back[name], dense[name]) for name in dense)


def test_a_model_without_zero_blocks_writes_nothing(tmp_path: Path) -> None:
    MODELS["bert"]().save_pretrained(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    assert compress_folder(tmp_path / "dense", tmp_path / "out", (8, 1)) == {}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_layer_with_nothing_left(tmp_path: Path) -> None:
    model = pruned("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "back").mkdir()
    assert compress_folder(tmp_path / "dense", tmp_path / "out", (8, 1))["bert.encoder.layer.1.output.dense"].kept == 0
    decompress_folder(tmp_path / "out", tmp_path / "back")
    assert_same_files(tmp_path / "back", tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("classifier.weight"),
            "1 tensors of .* are not stored, such as classifier.weight",
        ),
        (lambda tensors: tensors.update(more=torch.ones(1)), "1 stored tensors are not in .*, such as more"),
        (
            lambda tensors: tensors.update({"classifier.bias": torch.ones(7)}),
            r"classifier.bias is stored as \[7\], not as",
        ),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path: Path, change: object, message: str) -> None:
    pruned("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStreamable, match=message):
        compress_folder(tmp_path, tmp_path / "out", (8, 1))
    assert not (tmp_path / "out").exists()


def test_hostile_folders_are_refused(tmp_path: Path) -> None:
    pruned("bert").save_pretrained(tmp_path / "m", max_shard_size="8KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = index.read_text()
    for text, message in (
        ("[]", "must hold an object, found a list"),
        ("{}", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "names 3, which is no safetensors file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors', which is no safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "which is no safetensors file"),
    ):
        index.write_text(text)
        with pytest.raises(FormatError, match=message):
            decompress_folder(tmp_path / "m", tmp_path / "out")
    index.write_text(whole)
    shard = weight_files(tmp_path / "m")[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FormatError, match=re.escape(f"{shard.name} is not a whole safetensors file")):
        compress_folder(tmp_path / "m", tmp_path / "out", (8, 1))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {re.escape(shard.name)}"):
        compress_folder(tmp_path / "m", tmp_path / "out", (8, 1))


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16),
               "mask": torch.arange(5, dtype=torch.uint8), "none": torch.empty(0, 8, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "library", {"format": "pt", "who": "me"})
    layout, strings = read_layout(tmp_path / "library")
    assert all(torch.equal(layout[name].read(), tensor) for name, tensor in tensors.items())
    new = {name: NewTensor(raw.dtype, raw.shape, raw.size, lambda file, raw=raw: raw.copy_to(file, int))
           for name, raw in layout.items()}  # fmt: skip
    write_file(tmp_path / "ours", new, strings)
    ours = load_file(tmp_path / "ours")
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    assert safe_open(tmp_path / "ours", framework="pt").metadata() == {"format": "pt", "who": "me"}
    sizes = {name: (raw.start, raw.size) for name, raw in read_layout(tmp_path / "ours")[0].items()}
    assert sizes == {name: (raw.start, raw.size) for name, raw in layout.items()}


def test_a_tensor_of_another_size_than_announced_is_a_bug(tmp_path: Path) -> None:
    wrong = NewTensor("F32", (3,), 12, lambda file: write_bytes(torch.ones(2), file))
    with pytest.raises(RuntimeError, match="a took 8 bytes instead of 12"):
        write_file(tmp_path / "x", {"a": wrong}, {})


MEASURE = """
import sys
from pathlib import Path
import torch, transformers, hf_sparse
from hf_sparse.core.report import report
from hf_sparse.inference.stored.streaming import compress_folder, decompress_folder

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def convert(dense, small, back):
    small.mkdir()
    back.mkdir()
    compress_folder(dense, small, (8, 1))
    report(small)
    decompress_folder(small, back)
    report(back)

top = Path(sys.argv[1])
# Once with a tiny model, for what is imported on the way.
convert(*(top / "tiny" / part for part in ("dense", "small", "back")))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
convert(*(top / "large" / part for part in ("dense", "small", "back")))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=64, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Written by hand: initialising a model of that size takes longer than all the rest.
    pruned("llama").save_pretrained(tmp_path / "tiny" / "dense")
    dense = tmp_path / "large" / "dense"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(dense)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        tensors = {}
        for name in part:
            shape = model.state_dict()[name].shape
            tensors[name] = torch.ones(shape)
            if len(shape) == 2 and "layers" in name:
                tensors[name].mul_(expand_mask(torch.rand(shape[0] // 8, shape[1]) < 0.2, (8, 1)))
        save_file(tensors, dense / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    size = sum(file.stat().st_size for file in weight_files(dense))
    assert size > 130e6
    largest = 4 * 512 * 2048
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # A weight, its blocks and its mask, with what the allocator keeps of them: of layers, however many there are.
    assert int(done.stdout) < 10 * largest < size / 3, f"{int(done.stdout):,} bytes"
    assert_same_weights(dense, tmp_path / "large" / "back")


def assert_same_weights(first: Path, second: Path) -> None:
    for file in weight_files(first):
        ours, others = load_file(file), load_file(second / file.name)
        assert ours.keys() == others.keys()
        assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_linears_that_their_module_reads_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.dt_proj.weight[:8] = 0.0
            layer.mixer.in_proj.weight[:8] = 0.0
    (tmp_path / "dense").mkdir()
    (tmp_path / "out").mkdir()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"MambaMixer reads the weight of backbone\.layers\.0\.mixer\.dt_proj"):
        compress_folder(tmp_path / "dense", tmp_path / "out", (4, 1))
    assert not list((tmp_path / "out").iterdir())
    formats = compress_folder(tmp_path / "dense", tmp_path / "out", (4, 1), exclude_modules=r".*dt_proj")
    assert list(formats) == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
