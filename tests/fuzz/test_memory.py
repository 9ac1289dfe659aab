"""A hostile size is refused before anything of that size is allocated: loading gets four times the bytes of the file.

The memory of a whole process is limited while it loads a file of some megabytes, sound and damaged in the sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOADER = """
import json, resource, sys, threading
from pathlib import Path
import torch, transformers as tf
import hf_sparse
from hf_sparse import FormatError, compress
from hf_sparse.core.blocks import scale_blocks_
from hf_sparse.core.structure.targets import find_targets
from hf_sparse.inference.stored.streaming import decompress_folder
from tests.fuzz.guard import limit_memory
from tests.fuzz.mutations import put_together, take_apart

tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()
threading.stack_size(2**18)
torch.manual_seed(0)
folder, out = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "out"
out.mkdir()
config = tf.BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048,
                       vocab_size=100, max_position_embeddings=64)
model, masks = tf.BertForSequenceClassification(config).eval(), {}
for name, module in find_targets(model).items():
    rows, columns = module.weight.shape
    masks[name] = torch.rand(rows // 32, columns // 32) < 0.5
    scale_blocks_(module.weight.data, masks[name], (32, 32))
compress(model, masks).save_pretrained(folder)
del model
text, weights = (folder / "config.json").read_text(), folder / "model.safetensors"
raw, size = weights.read_bytes(), weights.stat().st_size
header, data = take_apart(weights)
layer = "bert.encoder.layer.0.output.dense"

def load():
    return tf.AutoModelForSequenceClassification.from_pretrained(folder)

def told(read):
    try:
        read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "read"

huge = (2**20, 2**31, 2**40, 2**62, 10**30)
damages = [("config", key, [n, 512]) for n in huge for key in ("dense_shape", "block_shape")]
damages += [("config", "dense_shape", [n, n]) for n in huge] + [("config", "kept", n) for n in huge]
# Beyond these torch itself refuses to name such a shape, before a loader sees the model.
sizes = ("vocab_size", "intermediate_size", "max_position_embeddings", "type_vocab_size", "num_hidden_layers")
damages += [("size", key, n) for n in huge[:3] for key in sizes]
damages += [("header", "shape", [n, 32, 32]) for n in huge] + [("header", "data_offsets", [0, n]) for n in huge]
damages += [("length", "", n) for n in (size, 2**27, 2**40, 2**63)]
load(), told(lambda: decompress_folder(folder, out)), hf_sparse.report(folder)
limit_memory(4 * size)
answers = {"sound": [told(load), told(lambda: decompress_folder(folder, out)), told(lambda: hf_sparse.report(folder))]}
for kind, key, value in damages:
    (folder / "config.json").write_text(text)
    with weights.open("wb") as file:
        file.write(raw)
    changed = json.loads(text)
    if kind == "config":
        changed["quantization_config"]["modules"][layer][key] = value
    elif kind == "size":
        changed[key] = value
    elif kind == "header":
        entry = {**header[layer + ".weight"], key: value}
        put_together(weights, json.dumps({**header, layer + ".weight": entry}).encode(), data)
    else:
        put_together(weights, json.dumps(header).encode(), data, value)
    (folder / "config.json").write_text(json.dumps(changed))
    reads = [load, lambda: decompress_folder(folder, out), lambda: hf_sparse.report(folder)]
    reads = reads[:1] if kind == "size" else reads
    answers[f"{kind} {key} {value}"] = [told(read) for read in reads]
print(json.dumps({"size": size, "answers": answers}))
"""


def test_a_hostile_size_allocates_nothing(tmp_path: Path) -> None:
    # One arena: each further one would reserve 64 MiB of addresses without using them.
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, "-c", LOADER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["size"] > 20 * 2**20
    answers = result["answers"]
    # The limit is enough for what is sound, so it is not what refuses the rest.
    assert answers.pop("sound") == ["read", "read", "read"]
    assert len(answers) == 49
    for damage, told in answers.items():
        assert all(answer.startswith("FormatError: ") for answer in told), f"{damage}: {told}"
