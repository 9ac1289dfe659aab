"""The examples of one task each: the whole run on a tiny task, how they read and measure, what they refuse."""

import gzip
import json
import re
import shlex
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import common
import numpy as np
import pytest
import run_clm
import run_image_classification
import run_ner
import run_qa
import run_seq2seq
import runs
import squad_answers
import tiny_tasks
import train_sentence_embeddings
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import AutoModel, AutoTokenizer, BertTokenizer

import hf_sparse
from hf_sparse.hub.card import facts_from_folder
from tests.examples.conftest import EXAMPLES

QUIET = ["--disable_tqdm", "true"]
SCRIPTS = {
    "run_qa": (run_qa, "eval_f1", 90.0, "question-answering"),
    "run_ner": (run_ner, "eval_f1", 0.9, "token-classification"),
    "run_clm": (run_clm, "eval_accuracy", 0.4, "text-generation"),
    "run_seq2seq": (run_seq2seq, "eval_rouge_l", 80.0, "text2text-generation"),
    "run_image_classification": (run_image_classification, "eval_accuracy", 0.9, "image-classification"),
    "train_sentence_embeddings": (train_sentence_embeddings, "eval_cosine_to_dense", 0.98, "sentence-similarity"),
}


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


# The whole run


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_trains_prunes_measures_and_saves(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, metric, least, task = SCRIPTS[name]
    folder = tmp_path / "out"
    script.main(["--smoke", *QUIET, "--output_dir", str(folder)])
    measured, report = results(folder), hf_sparse.report(folder)
    assert report.sparsity == pytest.approx(0.8, abs=0.005)
    assert measured[metric] > least
    assert metric.replace("eval", "dense") in measured
    out = capsys.readouterr().out
    assert str(report) in out and f"Saved in {folder}." in out
    pruned = next(line for line in out.splitlines() if line.startswith("pruned "))
    assert f"{measured[metric]:.4f}" in pruned and f"{report.bytes / 1e6:.2f} MB" in pruned
    facts = facts_from_folder(folder)
    assert facts.task == task and facts.data is not None
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.hf_quantizer is not None
    # A pooler is the only part that a head may do without.
    assert all("pooler" in key for key in info["missing_keys"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_launch_line_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script: ModuleType = SCRIPTS[name][0]
    text = str(script.__doc__).replace("\\\n", " ")
    lines = re.findall(rf"^ {{4}}(.*)examples/{name}\.py (.*)$", text, re.M)
    assert any("accelerate launch --multi_gpu" in before for before, _ in lines) and len(lines) >= 2
    taken: list[Any] = []
    monkeypatch.setattr(script, "run", lambda *parsed: taken.append(parsed))
    for _, arguments in lines:
        given = shlex.split(arguments.replace("...", "--model_name_or_path m --do_train"))
        script.main([*given, "--use_cpu"])
    assert len(taken) == len(lines)


def test_an_interrupted_run_goes_on_with_the_same_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--smoke", *QUIET, "--output_dir", str(tmp_path / "out"), "--save_strategy", "steps"]
    arguments += ["--save_steps", "4", "--num_train_epochs", "1", "--finetune_epochs", "1"]
    run_ner.main(arguments)
    first = results(tmp_path / "out")
    trained: list[str] = []
    plain = runs.Trainer.train

    def train(self: Any, *given: Any, **named: Any) -> Any:
        trained.append(type(self).__name__)
        return plain(self, *given, **named)

    monkeypatch.setattr(runs.Trainer, "train", train)
    run_ner.main(arguments)
    assert trained == ["SparseDistillTrainer"]
    assert results(tmp_path / "out")["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


def test_an_evaluation_alone(tmp_path: Path) -> None:
    given = tiny_tasks.ner(tmp_path)
    model, _, validation = given[:3]
    run_ner.main([model, validation, "--do_eval", "--use_cpu", *QUIET, "--output_dir", str(tmp_path / "out")])
    assert set(results(tmp_path / "out")) >= {"eval_f1", "eval_accuracy"}


# What cannot work is refused


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (run_qa, ["--do_train"], "model_name_or_path is missing: name the model to prune, or try"),
        (run_qa, ["--model_name_or_path=m"], "there is nothing to do: give --do_train or --do_eval"),
        (run_ner, ["--model_name_or_path=m", "--do_train"], "there is no data: give --dataset_name, or --train_file"),
        (run_ner, ["--model_name_or_path=m", "--do_train", "--train_file=no.json"], "'no.json' does not exist"),
        (run_image_classification, ["--model_name_or_path=m", "--do_train"], "there are no images: give"),
        (
            train_sentence_embeddings,
            ["--model_name_or_path=m", "--do_eval"],
            "this script prunes an encoder as it is: give --do_train",
        ),
        (run_clm, ["--smoke", "--config_name=gpt9"], "config_name='gpt9' is no kind of model that transformers knows"),
        (run_clm, ["--smoke", "--finetune_epochs=0"], "a model made from a config has learned nothing and"),
        (run_ner, ["--smoke", "--finetune_epochs=0"], r"has no trained head for this task \(classifier.bias is new\)"),
        (run_clm, ["--smoke", "--block_size=100000"], "the train data is shorter than one block: lower block_size"),
        (run_ner, ["--smoke", "--label_column=tags"], r"label_column='tags' is not among the columns \['tokens'"),
        (run_ner, ["--smoke", "--text_column=words"], r"the train data has no column 'words', only \['tokens'"),
        (run_ner, ["--smoke", "--do_predict"], "this script knows no --do_predict, only --do_train, --do_eval"),
        (run_ner, ["--smoke", "--finetune_epochs=-1"], "finetune_epochs=-1.0 must be at least 0"),
        (run_seq2seq, ["--smoke", "--max_train_samples=0"], "max_train_samples=0 must be at least 1; leave it out to"),
        (run_seq2seq, ["--smoke", "--target_column=summary"], r"no column 'summary', only \['source', 'target'\]"),
        (run_clm, ["--smoke", "--text_column=content"], r"the train data has no column 'content', only \['text'\]"),
        (run_clm, ["--smoke", "--block_size=1"], "block_size=1 must be at least 2: a token and the next one"),
        (run_clm, ["--config_name=gpt2", "--do_eval", "--kd_weight=0"], "a model made from a config is trained first"),
        (run_image_classification, ["--smoke", "--max_eval_samples=-3"], "max_eval_samples=-3 must be at least 1"),
        (train_sentence_embeddings, ["--smoke", "--score_column=s"], r"score_column='s' is not among the columns \["),
        (train_sentence_embeddings, ["--smoke", "--text_columns=a, b"], r"the train data has no column 'a', only \["),
        (
            train_sentence_embeddings,
            ["--smoke", "--text_columns=sentence1"],
            r"score_column needs two text_columns, found \['sentence1'\]",
        ),
    ],
)  # fmt: skip
def test_refusals(script: ModuleType, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.main([*arguments, "--use_cpu", "--output_dir", str(tmp_path / "out")])


def test_images_without_pillow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_image_classification.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="images are read by Pillow, which is not installed: pip install pillow"):
        run_image_classification.main(["--smoke"])


def test_what_does_not_fit_is_refused_before_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(runs.Trainer, "train", lambda self, *_, **__: trained.append(type(self).__name__))
    with pytest.raises(ValueError, match="7"):
        run_ner.main(["--smoke", *QUIET, "--block_height=7", "--output_dir", str(tmp_path / "out")])
    assert trained == []


def test_a_run_whose_dense_model_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(ValueError, match="out/_dense, the dense model that it began with, is gone: name that model"):
        run_ner.main(["--smoke", *QUIET, "--output_dir", str(tmp_path / "out")])


def test_rows_that_would_be_read_wrongly_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"w": [["a"], ["a", "b"]], "y": [["X"], ["X"]]})
    with pytest.raises(ValueError, match="row 1 of the dev data has 2 words and 1 tags: give one each"):
        run_ner.check_tags("dev", rows, "w", "y", {"X": 0})
    with pytest.raises(ValueError, match=r"the dev data holds the tag 'X', which is none of \['Y'\]"):
        run_ner.check_tags("dev", rows, "w", "y", {"Y": 0})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "0", "context": "a", "query": "b", "answers": []}))
    qa = ["--smoke", *QUIET, f"--train_file={tmp_path / 'rows.jsonl'}", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"the train data has no column 'question', only \['id', 'context', 'query'"):
        run_qa.main(qa)
    monkeypatch.setattr(BertTokenizer, "is_fast", False)
    with pytest.raises(ValueError, match="has no fast tokenizer, which alone tells where in the text its tokens are"):
        run_qa.main(["--smoke", *QUIET, "--output_dir", str(tmp_path / "out")])
    monkeypatch.undo()
    given = tiny_tasks.images(tmp_path)
    (tmp_path / "validation" / "left").rename(tmp_path / "validation" / "behind")
    with pytest.raises(ValueError, match=r"the validation data has the class 'behind', which is none of \['left', 'r"):
        run_image_classification.main([*given, *QUIET, "--output_dir", str(tmp_path / "out")])


def test_the_word_na_is_text_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n")
    assert common.load_splits({"train": str(tmp_path / "a.csv")}, None, None, None)["train"]["text"][:] == [
        "NA",
        "null",
    ]
    args = SimpleNamespace(do_train=True, do_eval=False)
    with pytest.raises(ValueError, match="the train data is empty"):
        common.wanted_splits(args, common.FileArguments(), {"train": Dataset.from_dict({"text": []})}, ["text"])


def test_files_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="its name must end in one of"):
        common.load_splits({"train": str(tmp_path / "data.xml")}, None, None, None)


# Question answering

ARTICLES = [
    {"title": title, "paragraphs": [{"context": f"{title} was built in 1889 by the Romans.", "qas": [
        {"id": f"{title}-{i}", "question": question, "answers": [{"text": text, "answer_start": len(title) + at}]}
        for i, (question, text, at) in enumerate((("When?", "1889", 14), ("By whom?", "the Romans", 22)))
    ]}]}
    for title in ("Rome", "Paris", "Oslo", "Bern")
]  # fmt: skip


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_squad_files_are_read_as_published(name: str, tmp_path: Path) -> None:
    content = json.dumps({"version": "1.1", "data": ARTICLES})
    file = tmp_path / name
    with gzip.open(file, "wt") if name.endswith("gz") else file.open("w") as handle:
        handle.write(content)
    data = squad_answers.read_squad(str(file))
    assert data is not None and len(data) == 8
    assert data[3]["context"].startswith("Paris") and data[3]["answers"] == {
        "text": ["the Romans"],
        "answer_start": [27],
    }
    (tmp_path / "rows.json").write_text(json.dumps({"id": "a"}) + "\n" + json.dumps({"id": "b"}) + "\n")
    assert squad_answers.read_squad(str(tmp_path / "rows.json")) is None


def test_articles_are_held_out_whole(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps({"data": ARTICLES}))
    data = squad_answers.read_squad(str(tmp_path / "squad.json"))
    train, held = squad_answers.split_articles(data, 0.25)
    assert set(train["title"]) == {"Rome", "Paris", "Oslo"} and set(held["title"]) == {"Bern"}
    with pytest.raises(ValueError, match="eval_articles=0.01 of 4 articles leaves no article on one side"):
        squad_answers.split_articles(data, 0.01)
    arguments = run_qa.DataTrainingArguments(train_file=str(tmp_path / "squad.json"), eval_articles=0.5)
    loaded = run_qa.load_data(arguments, None)
    assert (len(loaded["train"]), len(loaded["validation"])) == (4, 4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"who is where a b c d e f g h i j paris rome".split()]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def test_right_logits_give_the_text_of_the_answer_back(tokenizer: Any) -> None:
    context = "A b c d e f g h Paris Rome i j"
    rows = [
        {
            "id": "0",
            "context": context,
            "question": "where",
            "answers": {"text": ["Paris Rome"], "answer_start": [16]},
        },
        {"id": "1", "context": context, "question": "who", "answers": {"text": ["A"], "answer_start": [0]}},
        {"id": "2", "context": context, "question": "is", "answers": {"text": [], "answer_start": []}},
    ]
    examples = Dataset.from_list(rows)
    features = examples.map(
        lambda batch: squad_answers.encode(batch, tokenizer, length=10, stride=3),
        batched=True, remove_columns=examples.column_names,
    )  # fmt: skip
    assert len(features) > 3  # the context did not fit into one
    longest = max(map(len, features["input_ids"]))
    start, end = np.full((len(features), longest), -5.0), np.full((len(features), longest), -5.0)
    for i, (first, last) in enumerate(zip(features["start_positions"], features["end_positions"], strict=True)):
        if last:
            start[i, first] = end[i, last] = 5.0
            # A better score for an answer that ends before it begins, or lies in the question, counts for nothing.
            end[i, 1] = 9.0
    metric = squad_answers.SquadMetric(examples, features)
    labels = [np.array(features[name]) for name in ("start_positions", "end_positions")]
    found = metric(SimpleNamespace(predictions=(start, end), label_ids=labels))
    assert metric.answers["0"] == "Paris Rome" and metric.answers["1"] == "A"
    # The third question has no answer, and logits that are the same everywhere give it some.
    assert found["exact_match"] == pytest.approx(200 / 3)


def test_predictions_in_another_order_are_refused_and_do_not_occur(tmp_path: Path) -> None:
    features = Dataset.from_dict({"example_id": ["0", "1"], "offset_mapping": [[None], [None]],
                                  "start_positions": [3, 5], "end_positions": [4, 5]})  # fmt: skip
    metric = squad_answers.SquadMetric(Dataset.from_list([]), features)
    with pytest.raises(ValueError, match="predictions come in another order than the features"):
        metric(SimpleNamespace(predictions=(None, None), label_ids=([5, 3], [5, 4])))
    # Trainer groups what it evaluates by length as well, where it is told to group what it trains on.
    grouped = [
        "--train_sampling_strategy",
        "group_by_length",
        "--num_train_epochs",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    run_qa.main(["--smoke", *QUIET, *grouped])
    assert results(tmp_path)["dense_f1"] > 90.0


def test_exact_match_and_f1_are_those_of_squad() -> None:
    assert squad_answers.normalise("The  Broncos!") == squad_answers.normalise("broncos") == "broncos"
    assert squad_answers.word_f1("the Denver Broncos", "Broncos") == pytest.approx(2 / 3)
    assert squad_answers.word_f1("", "") == 1.0 and squad_answers.word_f1("x", "") == 0.0


# Token classification


def test_entities_are_whole_or_wrong() -> None:
    metric = run_ner.EntityMetric(["B-PER", "I-PER", "O"])
    logits = np.eye(3)[[[0, 1, 2, 0], [2, 2, 0, 2]]]
    labels = np.array([[0, 1, 2, 2], [0, 2, 0, -100]])
    found = metric(SimpleNamespace(predictions=logits, label_ids=labels))
    # Found 3 entities, 2 of them right, of 3.
    assert found == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "accuracy": 5 / 7}


def test_tags_go_to_the_first_token_of_their_word(tokenizer: Any) -> None:
    rows = {"tokens": [["a", "zz", "b"]], "tags": [["X", "Y", "X"]]}
    options = {"text": "tokens", "label": "tags", "ids": {"X": 0, "Y": 1}, "length": 16}
    assert run_ner.encode(rows, tokenizer, every=False, **options)["labels"] == [[-100, 0, 1, 0, -100]]
    words = BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##z"])}
    )
    split = {"tokens": [["azz", "a"]], "tags": [["X", "Y"]]}
    assert run_ner.encode(split, words, every=False, **options)["labels"] == [[-100, 0, -100, -100, 1, -100]]
    assert run_ner.encode(split, words, every=True, **options)["labels"] == [[-100, 0, 0, 0, 1, -100]]


def test_tags_are_named_by_the_dataset_where_it_does() -> None:
    features = Features({"t": Sequence(Value("string")), "y": Sequence(ClassLabel(names=["O", "B-X"]))})
    assert run_ner.tag_names(Dataset.from_dict({"t": [["a"]], "y": [[1]]}, features=features), "y") == ["O", "B-X"]
    assert run_ner.tag_names(Dataset.from_dict({"y": [["b", "a"], ["c"]]}), "y") == ["a", "b", "c"]


# Language modelling


def test_text_is_joined_and_cut() -> None:
    class Words(SimpleNamespace):
        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    rows = {"text": ["1 2 3", "", " ", "4 5"]}
    cut = run_clm.into_blocks(rows, Words(eos_token_id=9), "text", 3)
    assert cut["input_ids"] == [[1, 2, 3], [9, 4, 5]] == cut["labels"]
    assert run_clm.into_blocks({"text": [""]}, Words(eos_token_id=9), "text", 3)["input_ids"] == []


def test_perplexity_is_told_beside_the_loss() -> None:
    assert run_clm.with_perplexity({"eval_loss": 0.0, "dense_loss": np.log(2.0)})["dense_perplexity"] == pytest.approx(
        2
    )
    output = SimpleNamespace(predictions=np.array([[5, 6, 0]]), label_ids=np.array([[4, 5, 7]]))
    assert run_clm.next_token_accuracy(output) == {"accuracy": 0.5}


# Summaries


def test_rouge_l_is_what_its_definition_says() -> None:
    # The longest common subsequence of 4 and 6 words has 3.
    assert run_seq2seq.rouge_l("a b x c", "a q b q c q") == pytest.approx(2 * 3 / 10)
    assert run_seq2seq.rouge_l("", "a") == 0.0 and run_seq2seq.rouge_l("A b", "a B") == 1.0


# Sentence embeddings


def test_a_folder_of_sentence_transformers_stays_one(tmp_path: Path) -> None:
    given = tiny_tasks.sentences(tmp_path)
    source = tmp_path / "model"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    out = tmp_path / "out"
    train_sentence_embeddings.main([*given, *QUIET, "--num_train_epochs", "1", "--output_dir", str(out)])
    assert json.loads((out / "modules.json").read_text()) == modules
    transformers = pytest.importorskip("sentence_transformers")
    encoder = transformers.SentenceTransformer(str(out), device="cpu")
    embed = train_sentence_embeddings.Embedder(AutoTokenizer.from_pretrained(out), "mean", 64, 8)
    own = embed(AutoModel.from_pretrained(out), ["filler1 filler2", "filler3"])
    theirs = encoder.encode(["filler1 filler2", "filler3"], normalize_embeddings=True)
    np.testing.assert_allclose(theirs, own, rtol=1e-5, atol=1e-5)
    assert hf_sparse.report(out).sparsity == pytest.approx(0.8, abs=0.005)


def test_the_examples_are_listed_in_the_docs() -> None:
    text = (EXAMPLES.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert all(f"examples/{name}.py" in text for name in SCRIPTS)
