"""Tiny models and made-up tasks for the `--smoke` runs, written in a moment without a network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

_FILLERS = [f"filler{i}" for i in range(40)]
_NAMES = ["ada", "bob", "cleo", "dan", "eve", "finn", "gail", "hugo"]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_RUN = "--do_train --do_eval --logging_steps 16 --save_strategy no --use_cpu --per_device_train_batch_size 32"


def qa(folder: Path) -> list[str]:
    """Question answering: "who is here" is answered by the one name in the context."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "is", "here", *_FILLERS, *_NAMES]
    _save(folder / "model", tf.BertForQuestionAnswering(_bert(len(words))), words)
    for split, count, seed in (("train", 512, 0), ("validation", 64, 1)):
        chance = random.Random(seed)
        rows = []
        for i in range(count):
            context = [*chance.choices(_FILLERS, k=chance.randint(4, 10)), chance.choice(_NAMES)]
            chance.shuffle(context)
            name = next(word for word in context if word in _NAMES)
            text = " ".join(context)
            answers = {"text": [name], "answer_start": [text.index(name)]}
            rows.append({"id": str(i), "context": text, "question": "who is here", "answers": answers})
        _write(folder / f"{split}.jsonl", rows)
    return [*_given(folder), *f"--max_seq_length 32 {_training(4, '1e-2', 4)} --output_dir smoke_qa".split()]


def clm(folder: Path) -> list[str]:
    """Language modelling: a language in which every word is followed by one of two others."""
    for split, count, seed in (("train", 400, 0), ("validation", 60, 1)):
        chance, lines = random.Random(seed), []
        for _ in range(count):
            at, line = chance.randrange(40), []
            for _ in range(24):
                line.append(_FILLERS[at])
                at = (3 * at + chance.choice((1, 2))) % 40
            lines.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    files = [f"--train_file={folder / 'train.txt'}", f"--validation_file={folder / 'validation.txt'}"]
    model = "--config_name gpt2 --config_overrides n_embd=32,n_layer=2,n_head=2 --vocab_size 400 --block_size 32"
    return [*files, *f"{model} {_training(6, '1e-2', 4)} --output_dir smoke_clm".split()]


def ner(folder: Path) -> list[str]:
    """Token classification: "sir" and the name after it are a person, some words are places."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sir", *_FILLERS, *_NAMES]
    _save(folder / "model", tf.BertModel(_bert(len(words))), words)
    for split, count, seed in (("train", 256, 0), ("validation", 64, 1)):
        chance, rows = random.Random(seed), []
        for _ in range(count):
            tokens, tags = [], []
            for _ in range(chance.randint(3, 7)):
                if chance.random() < 0.3:
                    tokens, tags = [*tokens, "sir", chance.choice(_NAMES)], [*tags, "B-PER", "I-PER"]
                word = chance.choice(_FILLERS)
                tokens, tags = [*tokens, word], [*tags, "B-LOC" if word in _FILLERS[:8] else "O"]
            rows.append({"tokens": tokens, "ner_tags": tags})
        _write(folder / f"{split}.jsonl", rows)
    return [*_given(folder), *f"{_training(4, '1e-2', 4)} --output_dir smoke_ner".split()]


def images(folder: Path) -> list[str]:
    """Image classification: which corner is bright."""
    from PIL import Image  # which the other tasks do not need

    names = ["left", "right", "upper"]
    torch.manual_seed(0)
    model = tf.ViTForImageClassification(tf.ViTConfig(**_SIZES, image_size=16, patch_size=4, num_labels=len(names)))
    model.save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    tf.ViTImageProcessor(size=size).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("validation", 16)):
        for label, (top, left) in zip(names, ((8, 0), (8, 8), (0, 4)), strict=True):
            target = folder / split / label
            target.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 90, (16, 16, 3), generator=generator, dtype=torch.uint8)
                pixels[top : top + 8, left : left + 8] += 120
                Image.fromarray(pixels.numpy()).save(target / f"{i}.png")
    data = [f"--train_dir={folder / 'train'}", f"--validation_dir={folder / 'validation'}", "--flip", "false"]
    model_args = [f"--model_name_or_path={folder / 'model'}"]
    return [*model_args, *data, *f"{_training(8, '5e-3', 6)} --output_dir smoke_images".split()]


def seq2seq(folder: Path) -> list[str]:
    """Summaries: of all that is said, the two names count."""
    words = ["<pad>", "</s>", "<unk>", "meets", *_FILLERS, *_NAMES]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = tf.T5Config(vocab_size=len(words), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    tf.T5ForConditionalGeneration(config).save_pretrained(folder / "model")
    for split, count, seed in (("train", 512, 0), ("validation", 32, 1)):
        chance, rows = random.Random(seed), []
        for _ in range(count):
            first, second = chance.sample(_NAMES[:4], 1) + chance.sample(_NAMES[4:], 1)
            text = [*chance.choices(_FILLERS, k=chance.randint(2, 5)), first, second]
            chance.shuffle(text)
            rows.append({"source": " ".join(text), "target": f"{first} meets {second}"})
        _write(folder / f"{split}.jsonl", rows)
    lengths = "--max_source_length 16 --max_target_length 8 --predict_with_generate"
    return [*_given(folder), *f"{lengths} {_training(8, '1e-2', 5)} --output_dir smoke_seq2seq".split()]


def sentences(folder: Path) -> list[str]:
    """Sentence embeddings: pairs that share some of their words, as similar as the share."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_FILLERS]
    model = tf.BertModel(_bert(len(words)))
    with torch.no_grad():
        # Words that differ more than they do at random, so that embeddings say something.
        model.embeddings.word_embeddings.weight.mul_(20)
    _save(folder / "model", model, words)
    for split, count, seed in (("train", 256, 0), ("validation", 64, 1)):
        chance, rows = random.Random(seed), []
        for _ in range(count):
            first = chance.sample(_FILLERS, 8)
            shared = chance.randint(0, 8)
            second = [*first[:shared], *chance.sample(_FILLERS, 8 - shared)]
            rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": shared / 8})
        _write(folder / f"{split}.jsonl", rows)
    columns = "--text_columns sentence1,sentence2 --score_column score"
    training = f"--num_train_epochs 6 --learning_rate 5e-3 {_RUN} --output_dir smoke_sentences"
    return [*_given(folder), *f"{columns} {training}".split()]


def _training(finetune_epochs: int, rate: str, epochs: int) -> str:
    tuning = f"--finetune_epochs {finetune_epochs} --finetune_learning_rate {rate}"
    return f"{tuning} --num_train_epochs {epochs} --learning_rate 5e-3 {_RUN}"


def _bert(vocab_size: int, **changes: Any) -> tf.BertConfig:
    torch.manual_seed(0)
    return tf.BertConfig(vocab_size=vocab_size, max_position_embeddings=64, **{**_SIZES, **changes})


def _save(folder: Path, model: Any, words: list[str]) -> None:
    model.save_pretrained(folder)
    tf.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=64).save_pretrained(folder)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _given(folder: Path) -> list[str]:
    files = (f"--{split}_file={folder / f'{split}.jsonl'}" for split in ("train", "validation"))
    return [f"--model_name_or_path={folder / 'model'}", *files]
