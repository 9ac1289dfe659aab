"""The four kinds of input: weights, config, index, card. Each damages a copy, reads it in every way, and judges."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import traceback
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub import ModelCard
from torch import Tensor

import hf_sparse
from hf_sparse import FormatError, compress, decompress
from hf_sparse.core.report import report
from hf_sparse.hub.card import card_metadata, is_rendered, render_card, write_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, read_facts
from hf_sparse.hub.html import render_report
from hf_sparse.hub.masks import read_mask_maps
from hf_sparse.inference.compress import compressed_tensors
from hf_sparse.inference.stored.streaming import decompress_folder
from tests.fuzz.mutations import harmless_text, mutate_safetensors, mutate_text, mutate_tree
from tests.fuzz.oracle import NotReadable, Plain, read_dense, read_file
from tests.hub.test_facts import FULL
from tests.inference import models
from tests.mixtures import logits as logits_of
from tests.mixtures import mixture

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
_OURS = str(Path(hf_sparse.__file__).parent)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32}  # fmt: skip
_MAX_MESSAGE = 1200


class Wrong(AssertionError):
    """The library did what it must not do."""


class Case:
    """Folders of one kind of input.

    Args:
        top: an empty folder; `whole` in it stays, `broken` is damaged, `out` is written to.
    """

    kind = ""
    sharded = False
    auto: Any = tf.AutoModelForSequenceClassification
    prefix = "bert."

    def __init__(self, top: Path) -> None:
        self.whole, self.broken, self.out = top / "whole", top / "broken", top / "out"
        model, masks = self.pruned()
        self.dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.expected = self.outputs(model)
        compress(model, masks).save_pretrained(self.whole, **({"max_shard_size": "8KB"} if self.sharded else {}))
        # Bait: what a loader would run if it could be led to.
        (self.whole / "evil.py").write_text("open('EXECUTED', 'w').write('x')\n")
        (self.whole / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch EXECUTED'\ntR.")
        # Outside of the folder, and a whole checkpoint.
        shutil.copytree(self.whole, top / "outside")
        shutil.copytree(self.whole, self.broken)
        self.out.mkdir()
        # What is restored before each case: only what the case may have changed.
        self.kept = {name: (self.whole / name).read_bytes() for name in self.changed()}
        # Kernels and all else that is loaded once.
        self.outputs(self.auto.from_pretrained(self.whole))

    def pruned(self) -> tuple[Any, dict[str, Tensor]]:
        """A model with zero blocks, and its masks."""
        return models.pruned("bert")

    def outputs(self, model: Any) -> Tensor:
        """What a model computes."""
        return models.outputs(model, "bert")

    def changed(self) -> list[str]:
        """Names of the files that a case may damage."""
        raise NotImplementedError

    def damage(self, draw: random.Random) -> str:
        """Damage `broken`; "harmless" where it has to load."""
        raise NotImplementedError

    def restore(self) -> None:
        for name, data in self.kept.items():
            (self.broken / name).write_bytes(data)

    def run(self, draw: random.Random, number: int) -> str:
        """Damage and read; give the kind of answer.

        Raises:
            Wrong: if something was read that is not there, or refused without a clear error.
        """
        self.restore()
        done = self.damage(draw)
        truth = self.truth()
        answers = [attempt(lambda: self.check_report(truth)), attempt(lambda: self.check_folder(truth))]
        if number % 8 == 0:
            answers.append(attempt(lambda: read_mask_maps(self.broken)))
        if self.loads(number):
            answers.append(attempt(lambda: self.check_loading(truth, draw.random() < 0.4), foreign=True))
        if done == "harmless" and any(answers):
            raise Wrong(f"refused what is whole: {[answer for answer in answers if answer][0]}")
        return next((type(answer).__name__ for answer in answers if answer), "loaded")

    def loads(self, number: int) -> bool:
        """Whether from_pretrained is tried as well, which takes ten times as long as the other ways."""
        return number % 12 == 0

    def truth(self) -> dict[str, Plain] | None:
        """What the folder says; None where it says nothing."""
        try:
            return read_dense(self.broken)
        except NotReadable:
            return None

    def check_report(self, truth: dict[str, Plain] | None) -> None:
        found = report(self.broken)
        told = found.to_dict()
        json.dumps(told, allow_nan=False)
        assert str(found)
        if truth is not None and found.layers:
            for layer in found.layers:
                *first, columns = (truth.get(layer.name) or truth[layer.name + ".weight"]).shape
                if (math.prod(first), columns) != layer.shape:
                    raise Wrong(f"report tells shape {layer.shape} of {layer.name}")

    def check_folder(self, truth: dict[str, Plain] | None) -> None:
        for file in self.out.iterdir():
            file.unlink()
        decompress_folder(self.broken, self.out)
        written = {name: tensor for file in self.out.glob("*.safetensors") for name, tensor in read_file(file).items()}
        if truth is None:
            raise Wrong("decompressed what by docs/format.md is no checkpoint")
        if written != truth:
            names = [name for name in written.keys() | truth.keys() if written.get(name) != truth.get(name)]
            raise Wrong(f"decompressed to other values: {sorted(names)[:3]}")

    def check_loading(self, truth: dict[str, Plain] | None, ignore: bool) -> None:
        model = self.auto.from_pretrained(self.broken, ignore_mismatched_sizes=ignore)
        if getattr(model, "hf_quantizer", None) is None:
            self.check_plain(model)
            return
        if truth is None:
            raise Wrong("loaded what by docs/format.md is no checkpoint")
        layers = compressed_tensors(model)[0]
        logits = self.outputs(model)
        config, model = model.config, decompress(model)
        twin = type(model)(config).eval()
        state = model.state_dict()
        for name, tensor in state.items():
            # A checkpoint of the bare model fits the one with a head, and that of one with a head around it.
            others = (name, name.removeprefix(self.prefix), self.prefix + name)
            said = next((truth[other] for other in others if other in truth), None)
            if said is None or (said.shape != tuple(tensor.shape) and not name.startswith("classifier.")):
                raise Wrong(f"loaded {name}, which is not in the files like that")
            if said.shape == tuple(tensor.shape) and not same(as_tensor(said).to(tensor.dtype), tensor):
                raise Wrong(f"loaded other values of {name}")
        if not layers and any("block_mask" in name for name in state):
            raise Wrong("a compressed layer is left over")
        twin.load_state_dict(state)
        if max(float(tensor.abs().max()) for tensor in state.values()) > 100:
            # Sums of huge values depend on their order. The bits have been compared.
            return
        if not torch.allclose(self.outputs(twin.to(model.dtype)), logits, 1e-4, 1e-4, equal_nan=True):
            raise Wrong("computes something else than the same dense model")

    def check_plain(self, model: Any) -> None:
        """Judge what loaded without any word of hf_sparse in its config: transformers alone has answered."""
        quantization = model.config.to_dict().get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "hf_sparse":
            raise Wrong("loaded a compressed model without its quantizer")


class Weights(Case):
    """The safetensors file: header, bitmaps, offsets, values."""

    kind = "weights"

    def changed(self) -> list[str]:
        return [WEIGHTS]

    def damage(self, draw: random.Random) -> str:
        return mutate_safetensors(self.broken / WEIGHTS, draw)


class Config(Case):
    """config.json: the geometry of the layers, and everything around it."""

    kind = "config"

    def changed(self) -> list[str]:
        return [CONFIG]

    def loads(self, number: int) -> bool:
        return number % 4 == 0

    def damage(self, draw: random.Random) -> str:
        text, action = self.kept[CONFIG], draw.randrange(10)
        if action == 0:
            (self.broken / CONFIG).write_bytes(harmless_text(text, draw))
            return "harmless"
        if action <= 3:
            (self.broken / CONFIG).write_bytes(mutate_text(text, draw))
            return "text"
        tree = mutate_tree(json.loads(text), draw, draw.choice(("modules", "modules", "quantization_config", None)))
        if isinstance(tree, dict) and isinstance(tree.get("num_labels"), int) and tree["num_labels"] > 1000:
            # transformers makes a name for each label before anybody else sees the config.
            del tree["num_labels"]
        (self.broken / CONFIG).write_text(json.dumps(tree))
        return "tree"


class Mixture(Case):
    """A mixture of experts, whose fused weights are compressed, too."""

    auto = tf.AutoModelForCausalLM
    prefix = "model."

    def pruned(self) -> tuple[Any, dict[str, Tensor]]:
        model = mixture("mixtral")
        return model, models.prune(model)

    def outputs(self, model: Any) -> Tensor:
        return logits_of(model)


class MixtureWeights(Mixture, Weights):
    """The safetensors file of a mixture."""

    kind = "mixture weights"


class MixtureConfig(Mixture, Config):
    """config.json of a mixture."""

    kind = "mixture config"

    def damage(self, draw: random.Random) -> str:
        done = super().damage(draw)
        try:
            tree = json.loads((self.broken / CONFIG).read_bytes())
        except (ValueError, RecursionError):
            return done
        sizes = ("num_local_experts", "num_experts_per_tok", "intermediate_size", "hidden_size", "vocab_size")
        if isinstance(tree, dict) and any(isinstance(tree.get(n), int) and tree[n] > 4096 for n in sizes):
            # Not ours: transformers lists the experts of each token before anybody else sees the model.
            (self.broken / CONFIG).write_bytes(self.kept[CONFIG])
            return "left whole"
        return done


class Index(Case):
    """The index of a model in several files, and one of the files."""

    kind = "index"
    sharded = True

    def changed(self) -> list[str]:
        return [INDEX, *sorted(file.name for file in self.whole.glob("*.safetensors"))]

    def restore(self) -> None:
        super().restore()
        for file in self.broken.glob("*.safetensors"):
            if file.name not in self.kept:
                file.unlink()

    def damage(self, draw: random.Random) -> str:
        text, action = self.kept[INDEX], draw.randrange(10)
        if action == 0:
            (self.broken / INDEX).write_bytes(harmless_text(text, draw))
            return "harmless"
        if action <= 2:
            (self.broken / INDEX).write_bytes(mutate_text(text, draw))
            return "text"
        if action <= 5:
            tree = mutate_tree(json.loads(text), draw, "weight_map")
            (self.broken / INDEX).write_text(json.dumps(tree))
            return "tree"
        shards = [name for name in self.kept if name != INDEX]
        if action == 6:
            tree = json.loads(text)
            bad = draw.choice(
                ("../outside/" + shards[0], str(self.broken.parent / "outside" / shards[0]), "pytorch_model.bin",
                 "evil.py", "sub/" + shards[0], ".", "", "x" * 5000 + ".safetensors", "a\0.safetensors", "/dev/zero",
                 CONFIG, INDEX, shards[0].upper())
            )  # fmt: skip
            for name in draw.choice((list(tree["weight_map"]), [draw.choice(list(tree["weight_map"]))])):
                tree["weight_map"][name] = bad
            (self.broken / INDEX).write_text(json.dumps(tree))
            return "shard name"
        if action == 7:
            one, two = draw.sample(shards, 2)
            (self.broken / one).write_bytes(self.kept[two])
            return "shard twice"
        if action == 8:
            (self.broken / draw.choice(shards)).unlink()
            return "shard gone"
        shard = self.broken / draw.choice([name for name in shards if b"_block_mask" in self.kept[name]])
        return "shard: " + mutate_safetensors(shard, draw)


class Card(Case):
    """The recorded facts of a card, and a README.md beside them."""

    kind = "card"

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        layers = tuple(report(self.whole).layers)
        self.facts = CardFacts.from_dict({**FULL.to_dict(), "layers": [vars(layer) for layer in layers]})
        self.kept = {FACTS_FILE: self.facts.to_json().encode(), CARD: render_card(self.facts).encode()}
        self.restore()
        self.tags = tags_of(render_report(self.broken))

    def changed(self) -> list[str]:
        return []

    def damage(self, draw: random.Random) -> str:
        text, action = self.kept[FACTS_FILE], draw.randrange(10)
        if action == 0:
            (self.broken / FACTS_FILE).write_bytes(harmless_text(text, draw))
            return "harmless"
        if action <= 2:
            (self.broken / FACTS_FILE).write_bytes(mutate_text(text, draw))
            return "text"
        if action == 3:
            (self.broken / CARD).write_bytes(mutate_text(self.kept[CARD], draw))
            return "README"
        (self.broken / FACTS_FILE).write_text(json.dumps(mutate_tree(json.loads(text), draw)))
        return "tree"

    def run(self, draw: random.Random, number: int) -> str:
        self.restore()
        done = self.damage(draw)
        if done == "README":
            return self.run_edited()
        refused = attempt(lambda: self.check_card(number))
        if refused and done == "harmless":
            raise Wrong(f"refused what is whole: {refused}")
        return type(refused).__name__ if refused else "loaded"

    def run_edited(self) -> str:
        now = (self.broken / CARD).read_bytes()
        if now == self.kept[CARD]:
            return "loaded"
        refused = attempt(lambda: write_card(self.broken, self.facts, keep_edited=True))
        if not isinstance(refused, FileExistsError):
            raise Wrong(f"an edited card was taken for a rendered one: {refused!r}")
        if (self.broken / CARD).read_bytes() != now:
            raise Wrong("an edited card was changed")
        return "FileExistsError"

    def check_card(self, number: int) -> None:
        facts = read_facts(self.broken / FACTS_FILE)
        if CardFacts.from_dict(json.loads(facts.to_json())) != facts:
            raise Wrong("facts change when they are written and read")
        text = render_card(facts)
        if not is_rendered(text):
            raise Wrong("a rendered card is not known as one")
        # A thorough reader of YAML is slow, and so is a page with its pictures.
        if number % 4 == 0 and ModelCard(text).data.to_dict() != card_metadata(facts).to_dict():
            raise Wrong("the metadata of the card are not those of its facts")
        body = re.sub(r"```.*?```|`[^`\n]*`", "", text.split("\n---\n", 1)[1], flags=re.DOTALL)
        body = re.sub(r"<details><summary>Pruned layers \(\d+\)</summary>\n|\n</details>\n", "", body)
        if tag := re.search(r"<(?!!-- rendered by hf_sparse)[a-zA-Z/!?]", body):
            raise Wrong(f"the card holds HTML of its facts: {body[tag.start() : tag.start() + 60]!r}")
        if number % 24 == 0 and (new := tags_of(render_report(self.broken)) - self.tags):
            raise Wrong(f"the page holds HTML of its facts: {new}")


KINDS: dict[str, Callable[[Path], Case]] = {
    case.kind: case for case in (Weights, Config, MixtureWeights, MixtureConfig, Index, Card)
}


def attempt(read: Callable[[], object], foreign: bool = False) -> Exception | None:
    """Read; give the error where it is a clear one.

    Args:
        read: what to call.
        foreign: whether transformers is called, which refuses some configs before hf_sparse sees them.

    Raises:
        Wrong: if it is not: of another type, raised by a library underneath, empty, or endless.
    """
    try:
        read()
    except Wrong:
        raise
    except Exception as error:  # noqa: BLE001 (whatever comes is judged)
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        through = any(name.startswith(_OURS) for name in frames)
        if foreign and not through:
            return error
        clear = isinstance(error, FormatError | FileNotFoundError | FileExistsError | ValueError | OSError)
        if not clear or not frames[-1].startswith(_OURS):
            raise Wrong(f"no clear error: {type(error).__name__}: {error} from {frames[-1]}") from error
        if not 0 < len(str(error).strip()) <= _MAX_MESSAGE:
            raise Wrong(f"a message of {len(str(error))} characters: {str(error)[:200]}") from error
        return error
    return None


def as_tensor(plain: Plain) -> Tensor:
    dtype = _DTYPES[plain.dtype]
    if not plain.data:
        return torch.empty(plain.shape, dtype=dtype)
    return torch.frombuffer(bytearray(plain.data), dtype=dtype).view(plain.shape)


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same bits: a NaN is a value, too."""
    return one.dtype == two.dtype and one.contiguous().view(torch.uint8).equal(two.contiguous().view(torch.uint8))


def tags_of(page: str) -> set[tuple[str, ...]]:
    """Tell which tags with which attributes a page has, and of links where they lead."""
    found: set[tuple[str, ...]] = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            kinds = [f"{name}={(value or '')[:5]}" if name in ("href", "src") else name for name, value in attrs]
            found.add((tag, *sorted(kinds)))

    Parser().feed(page)
    return found
