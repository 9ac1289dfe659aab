"""The card: facts in, the same text out; what was not recorded is never made up."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_eval_result
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_sparse import FormatError
from hf_sparse.hub.card import CARD_FILE, facts_from_folder, is_rendered, render_card, write_card
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, DataFacts, MetricFacts, read_facts
from hf_sparse.hub.filters import GAP, percent, score, shape
from tests.hub.loopback_hub import card_errors
from tests.hub.test_facts import FULL

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
BARE = CardFacts(name="bare", save_format="dense")


def rows(card: str) -> list[list[str]]:
    """All table rows of a card as lists of cells."""
    lines = (line for line in card.splitlines() if line.startswith("|") and not re.fullmatch(r"[|:-]+", line))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_fact_is_in_the_card() -> None:
    card = render_card(FULL)
    assert ["accuracy", "0.9125", "0.9200", "-0.0075"] in rows(card)
    assert ["F1 (macro)", "0.5000", "not measured", "not measured"] in rows(card)
    assert ["weights file (bytes)", "1,000,000", "2,500,000", "2.50x smaller"] in rows(card)
    assert ["1", "128", "3.22", "12", "3.73x", "cpu", "torch eager", "float32", "2"] in rows(card)
    assert ["8", "16", "30", "not measured", "not measured", "cpu", "", "", ""] in rows(card)
    assert ["`encoder.0.q`", "16 x 8", "8 x 1", "3", "16", "81.25 %", "98", "512"] in rows(card)
    assert ["block shape (rows x columns)", "8 x all"] in rows(card)
    assert ["sparsity asked", "75 %"] in rows(card)
    assert ["sparsity reached", "75.12 %"] in rows(card)
    assert ["training", "1,234 steps, 100 seconds on a box"] in rows(card)
    assert ["seed", "0"] in rows(card)
    assert ["versions", "hf_sparse 0.1.0, torch 2.13.0"] in rows(card)
    assert ["base model", "[tester/tiny](https://huggingface.co/tester/tiny)"] in rows(card)
    assert ["teacher", "the dense model, fine-tuned by the same script"] in rows(card)
    assert ["`learning_rate`", "`0.0001`"] in rows(card)
    data = "[Toy Set](https://huggingface.co/datasets/tester/toy) (plain); train: 4,000 rows of split train; "
    assert ["data", data + "eval: 500 rows of split validation"] in rows(card)
    assert "One script measured both models: `python eval.py | tee log`." in card
    assert "Made up | for tests." in card
    assert "Without the teacher." in card
    assert "- English only.\n- Never shown a &lt;script&gt;.\n" in card


def test_latency_is_told_with_the_run_that_measured_it() -> None:
    latency = section(render_card(FULL), "Latency")
    first, second = latency.split("Median times on a box. Command: `hf-sparse bench x`.")
    assert first.count("| cpu |") == 2
    assert "| gpu |" in second
    assert "Median times on a card. Command: `hf-sparse bench y`." in second


def test_a_model_that_lost_says_so() -> None:
    slower = replace(FULL, latency=(replace(FULL.latency[0], ms=15.0),), file_bytes=5_000_000,
                     metrics=(MetricFacts(type="accuracy", value=0.5, dense_value=0.25),))  # fmt: skip
    card = render_card(slower)
    assert rows(section(card, "Latency"))[1][4] == "0.80x"
    assert ["weights file (bytes)", "5,000,000", "2,500,000", "0.50x smaller"] in rows(card)
    assert ["accuracy", "0.5000", "0.2500", "+0.2500"] in rows(card)


def test_absent_facts_are_called_absent() -> None:
    card = render_card(BARE)
    assert section(card, "Results").strip() == "Metrics: not measured."
    assert section(card, "Latency").strip() == "Not measured."
    made = dict(rows(section(card, "How it was made"))[1:])
    assert made.pop("sparsity reached") == "not measured"
    assert set(made.values()) == {"not recorded"}
    assert "None were recorded" in section(card, "Limits")
    assert "<details>" not in card
    assert not re.search(r"\bNone\b(?! were)|\bnan\b|Undefined", card)


@pytest.mark.parametrize("absent", [name for name in FULL.to_dict() if name not in ("name", "save_format")])
def test_each_fact_may_be_absent(absent: str) -> None:
    facts = {name: value for name, value in FULL.to_dict().items() if name != absent}
    card = render_card(CardFacts.from_dict(facts))
    assert not re.search(r"\bNone\b(?! were)|Undefined", card)
    ModelCard(card)


def test_citations_and_loading() -> None:
    card = render_card(FULL)
    assert "https://aclanthology.org/2022.acl-long.16" in card
    assert "https://aclanthology.org/2020.findings-emnlp.286" in card
    loading = section(card, "How to load")
    blocks = re.findall(r"```python\n(.*?)```", loading, re.DOTALL)
    statements = [statement for block in blocks for statement in ast.parse(block).body]
    assert ast.unparse(statements[0]) == "import hf_sparse"
    called = "AutoModelForSequenceClassification.from_pretrained('tester/tiny-80')"
    assert called in [ast.unparse(getattr(s, "value", s)) for s in statements]
    assert "hf_sparse.load_dense(AutoModelForSequenceClassification" in loading
    assert "stops with an error" in loading
    assert "ignore_mismatched_sizes" in loading


def test_a_dense_model_loads_without_hf_sparse() -> None:
    loading = section(render_card(replace(FULL, save_format="dense")), "How to load")
    assert "import hf_sparse" not in loading
    assert "load_dense" not in loading


def test_metadata() -> None:
    data = ModelCard(render_card(FULL)).data
    assert data.library_name == "hf_sparse"
    assert data.base_model == "tester/tiny"
    assert data["base_model_relation"] == "finetune"
    assert data.tags == ["hf_sparse", "block-sparse", "pruned"]
    assert data.pipeline_tag == "text-classification"
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.datasets == ["tester/toy"]
    assert data.metrics == ["accuracy", "f1"]
    assert data.model_name == "tiny-80"
    accuracy, f1 = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.9125)
    assert (accuracy.dataset_type, accuracy.dataset_name, accuracy.dataset_config) == (
        "tester/toy",
        "Toy Set",
        "plain",
    )
    assert (accuracy.dataset_split, accuracy.task_type) == ("validation", "text-classification")
    assert (f1.metric_name, f1.metric_value) == ("F1 (macro)", 0.5)


def test_metadata_of_a_dense_model_without_results() -> None:
    data = ModelCard(render_card(BARE)).data
    assert data.to_dict() == {"library_name": "transformers", "tags": ["hf_sparse", "block-sparse", "pruned"]}


def test_data_that_is_not_on_the_hub_still_has_results() -> None:
    data = ModelCard(render_card(replace(FULL, data=DataFacts(name="My Own, Private Set")))).data
    assert data.datasets is None
    assert data.eval_results[0].dataset_type == "my-own-private-set"


def test_hostile_text_stays_text() -> None:
    nasty = 'x|y`z\n---\n# <b onclick="a()">{{ 7 * 7 }}'
    card = render_card(
        replace(FULL, name=nasty, teacher=nasty, limits=(nasty,), eval_command=nasty, recipe={"a`|b": nasty},
                repo_id='a"); import os  # ', versions={"to|rch": nasty}, latency=(replace(FULL.latency[0],
                hardware=nasty, engine=nasty, command=nasty),), data=DataFacts(name=nasty, note=nasty))
    )  # fmt: skip
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", ModelCard(card).text, flags=re.DOTALL)
    assert prose.strip().startswith("# x|y&#96;z --- # &lt;b onclick=")
    assert "<b" not in prose
    assert "\n---\n" not in prose
    assert card.count("{{ 7 * 7 }}") > 5
    assert len(ModelCard(card).data.eval_results) == 2
    assert {len(row) for row in rows(section(card, "Latency"))} == {9}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        tree = ast.parse(block)
        assert not any(isinstance(n, ast.Import) and n.names[0].name == "os" for n in ast.walk(tree))


def test_write_and_render_again(tmp_path: Path) -> None:
    card = write_card(tmp_path / "new", FULL)
    assert card == tmp_path / "new" / "README.md"
    written = facts_from_folder(tmp_path / "new")
    assert card.read_text(encoding="utf-8") == render_card(written)
    assert replace(written, pictures=()) == FULL
    pictures = [picture.file for picture in written.pictures]
    assert pictures == ["training.png", "tradeoff.png"]
    assert sorted(path.name for path in card.parent.iterdir()) == ["README.md", FACTS_FILE, *sorted(pictures)]
    assert f"]({pictures[0]})" in section(card.read_text(encoding="utf-8"), "Pictures")


def test_paths_of_local_folders_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path, replace(FULL, base_model="/home/me/secret/bert-tuned/", teacher="out/teacher"))
    text = (tmp_path / "README.md").read_text() + (tmp_path / FACTS_FILE).read_text()
    assert "secret" not in text
    assert "out/teacher" not in text
    assert ["base model", "`bert-tuned`"] in rows(text)
    assert ModelCard(text).data.base_model is None


def test_wrong_facts_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="seed='0' must be int"):
        write_card(tmp_path, replace(FULL, seed="0"))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_card_edited_by_hand_is_kept_on_request(tmp_path: Path) -> None:
    card = write_card(tmp_path, FULL)
    write_card(tmp_path, replace(FULL, seed=1), keep_edited=True)
    assert is_rendered(card.read_text())
    edited = card.read_text().replace("English only.", "English and Latin.")
    assert not is_rendered(edited)
    card.write_text(edited)
    with pytest.raises(FileExistsError, match=r"README\.md was written or edited by hand"):
        write_card(tmp_path, FULL, keep_edited=True)
    assert card.read_text() == edited
    assert facts_from_folder(tmp_path).seed == 1
    write_card(tmp_path, FULL)
    assert card.read_text() == render_card(facts_from_folder(tmp_path))


@pytest.mark.parametrize("text", ["", "# mine\n", "---\nlicense: mit\n---\n# mine\n"])
def test_a_card_that_somebody_wrote_is_told_apart(text: str) -> None:
    assert not is_rendered(text)
    assert not is_rendered(render_card(BARE) + "One more line.\n")


def test_facts_of_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{FACTS_FILE} is missing"):
        facts_from_folder(tmp_path)


def published_cards() -> dict[str, tuple[Path, Path]]:
    """{name: (facts, card)}: a folder each, like that of a model without its weights."""
    return {facts.parent.name: (facts, facts.parent / CARD_FILE) for facts in MODEL_CARDS.glob(f"*/{FACTS_FILE}")}


def test_model_cards_are_rendered_from_their_facts() -> None:
    cards = published_cards()
    assert cards
    assert set(MODEL_CARDS.rglob("*.md")) - {MODEL_CARDS / "README.md"} == {x for _, x in cards.values()}
    for name, (facts, card) in cards.items():
        assert card.read_text(encoding="utf-8") == render_card(read_facts(facts)), f"hf-sparse card model_cards/{name}"
        pictures = {picture.file for picture in read_facts(facts).pictures}
        assert {path.name for path in card.parent.iterdir()} == {FACTS_FILE, CARD_FILE, *pictures}


def test_model_cards_have_metadata_that_the_hub_takes() -> None:
    for name, (file, card) in published_cards().items():
        text, facts = card.read_text(encoding="utf-8"), read_facts(file)
        assert card_errors(text) == []
        data = ModelCard(text, ignore_metadata_errors=False).data
        assert data.base_model == facts.base_model
        assert {"hf_sparse", "block-sparse", "pruned"} <= set(data.tags or ())
        results = data.eval_results or []
        assert [(x.metric_type, x.metric_value) for x in results] == [(m.type, m.value) for m in facts.metrics]
        # There and back through the client's own reader and writer of model-index.
        index = eval_results_to_model_index(name, results)
        assert model_index_to_eval_results(index) == (name, results)
        for result in results:
            assert metadata_eval_result(
                model_pretty_name=name, task_pretty_name="x", task_id=result.task_type, metrics_id=result.metric_type,
                metrics_pretty_name=result.metric_type, metrics_value=result.metric_value,
                dataset_id=result.dataset_type, dataset_pretty_name=result.dataset_name,
            )["model-index"]  # fmt: skip


def test_model_cards_tell_what_a_card_has_to_tell() -> None:
    for name, (_, card) in published_cards().items():
        text = card.read_text(encoding="utf-8")
        for heading in ("Results", "Pictures", "How to load", "How it was made", "Limits", "Citation"):
            assert f"\n## {heading}\n" in text, f"{name}: {heading}"
        for row in ("base model", "teacher", "data", "block shape", "sparsity asked", "sparsity reached", "training",
                    "seed", "versions"):  # fmt: skip
            assert f"\n| {row}" in text, f"{name}: {row}"
        for word in ("dense teacher", "weights file (bytes)", "One script measured both", "import hf_sparse",
                     "hf_sparse.load_dense", "Pruned layers (", "huang-etal-2022", "li-etal-2020"):  # fmt: skip
            assert word in text, f"{name}: {word}"


def test_model_cards_are_listed_with_their_numbers() -> None:
    expected = []
    for name, (file, _) in sorted(published_cards().items()):
        facts = read_facts(file)
        metric, block, sparsity = facts.metrics[0], facts.block_shape, facts.sparsity_reached
        assert block is not None and sparsity is not None
        dense = GAP if metric.dense_value is None else score(metric.dense_value)
        told = f"{metric.name or metric.type} {score(metric.value)}"
        cells = (f"[{name}]({name}/{CARD_FILE})", facts.task, shape(block), percent(sparsity), told, dense)
        expected.append(f"| {' | '.join(map(str, cells))} |")
    lines = (MODEL_CARDS / CARD_FILE).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| [")] == expected


def test_facts_file_is_plain_json(tmp_path: Path) -> None:
    write_card(tmp_path, FULL)
    told = json.loads((tmp_path / FACTS_FILE).read_text())
    assert [picture["file"] for picture in told.pop("pictures")] == ["training.png", "tradeoff.png"]
    assert told == json.loads(FULL.to_json())


def test_a_card_that_is_no_text_was_not_rendered(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe not text")
    with pytest.raises(FileExistsError, match="edited by hand"):
        write_card(tmp_path, FULL, keep_edited=True)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe not text"
