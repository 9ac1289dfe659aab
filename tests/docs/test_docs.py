"""Every block of code and every command in docs/, README.md and CONTRIBUTING.md: run, or held against what runs it.

Python and `bash` blocks of the pages in RUN are executed here, top to bottom, in a folder with small stand-ins for the
reader's model and data; the pages in ELSEWHERE have tests of their own. Commands that stand in indented lines name
long runs, installations, other machines and users' files: their programs, files, targets, extras and options exist.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import hf_sparse
from hf_sparse import SparseDistillConfig
from hf_sparse.cli import app
from tests.hub.conftest import save_tokenizer
from tests.hub.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.test_cli import Done

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
RUN = ("README.md", "docs/quickstart.md", "docs/block_shape.md", "docs/sparsity.md", "docs/faq.md")
# {page: the test that runs its blocks}.
ELSEWHERE = {
    "docs/publish.md": "tests/cli/test_docs_publish.py",
    "docs/exits.md": "tests/test_docs_exits.py",
    "docs/neighbours.md": "tests/test_docs_neighbours.py",
    "docs/format.md": "tests/golden/test_golden.py",
}
# Blocks that are not code: pictures in letters, the examples of api.md, which run as doctests where they come from.
NOT_CODE = ("text", "json", "pycon", "bibtex")
PROGRAMS = ("hf-sparse", "python", "pip", "make", "accelerate", "torchrun", "python3.11")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of `bash` blocks, indented lines, and code in table cells."""
    text = page.read_text(encoding="utf-8")
    for language, block in blocks(page):
        if language == "bash":
            yield from block.replace("\\\n", " ").splitlines()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    candidates = re.findall(r"^ {4,}(\S.*)$", outside, re.MULTILINE) + re.findall(r"`([^`\n]+)`", outside)
    for line in candidates:
        line = re.sub(r"^(\w+=\S+ )+", "", line.split("  #")[0].strip())
        for part in line.split(" && "):
            # A word alone, as in "`make` is needed", is no command.
            if part.split(" ")[0] in PROGRAMS and " " in part:
                yield part


def test_every_page_with_code_is_run_by_some_test() -> None:
    for page in PAGES:
        languages = {language for language, _ in blocks(page)} - set(NOT_CODE)
        assert languages <= {"python", "bash"}, f"{page.name}: a block of an unknown language: {languages}"
        if languages:
            assert name_of(page) in {*RUN, *ELSEWHERE}, f"{page.name} has code that no test runs"
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\((\w+\.md)\)", index)
    )
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?:", link):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_api_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "tools" / "api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert module.write() == text, "run `make api`"
    for name in hf_sparse.__all__:
        assert f"\n### {name}\n" in text


# --- pages that run


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, dense: Path) -> dict[str, Any]:
    """A folder with what the pages take as given, and the names that they take as given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    (tmp_path / "out").mkdir()
    model_folder.rename("out/model")
    dense.rename("out/dense")
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                        vocab_size=40, num_labels=3, max_position_embeddings=32)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained("my-fine-tuned-model")
    save_tokenizer(Path("my-fine-tuned-model"))
    rows = [{"input_ids": [2, 3, 4, 2 + i % 30], "labels": i % 3} for i in range(16)]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return {"train": rows, "dev": rows[:6]}


@pytest.mark.parametrize("page", RUN)
def test_the_page_runs(
    page: str,
    reader: dict[str, Any],
    cli: Callable[..., Done],
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("you/pruned", "tester/pruned")
    ran = 0
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, page, "exec"), reader)
            ran += 1
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                execute(line, cli)
                ran += 1
    assert ran > 1
    assert hub.unhandled == []
    if page == "docs/quickstart.md":
        check_quickstart(reader, hub)


def execute(line: str, cli: Callable[..., Done]) -> None:
    program, *arguments = shlex.split(line)
    # Longer runs stand in indented lines, and in the tests of the examples.
    assert program == "hf-sparse", f"nothing here runs {line!r}"
    done = cli(*arguments)
    assert done.code == 0, f"{line}: {done.err}"
    assert done.out


def check_quickstart(names: dict[str, Any], hub: LoopbackHub) -> None:
    """The page has left what it promises."""
    assert names["found"].sparsity == pytest.approx(0.8, abs=0.02)
    assert {"README.md", "masks.png", "tradeoff.png", "model.safetensors"} <= set(hub.repos["tester/pruned"].files)
    assert hub.repos["tester/pruned"].private
    assert "| accuracy |" in Path("pruned/README.md").read_text()
    assert Path("report.html").stat().st_size > 10_000
    assert AutoModelForSequenceClassification.from_pretrained("dense").config.num_labels == 3
    assert AutoTokenizer.from_pretrained("pruned")("w3 w4")["input_ids"]


# --- commands that are named


def test_named_commands_exist() -> None:
    seen: list[str] = []
    for page in PAGES:
        for line in commands(page):
            check_command(line, page.name)
            seen.append(line.split()[0])
    assert {"hf-sparse", "python", "pip", "make", "accelerate", "torchrun"} <= set(seen)


def check_command(line: str, page: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= targets, f"{page}: {line}"
    elif words[0] == "hf-sparse":
        check_options_of_cli(words[1:], f"{page}: {line}")
    elif words[0] == "pip" or words[1:3] == ["-m", "pip"]:
        check_extras(words, f"{page}: {line}")
    elif words[0] in ("accelerate", "torchrun"):
        for word in words[1:]:
            if word.startswith("examples/"):
                assert (ROOT / word).is_file(), f"{page}: {line}"
    elif words[0].startswith("python"):
        check_script(words[1:], f"{page}: {line}")


def check_options_of_cli(words: list[str], where: str) -> None:
    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {name for option in group.params for name in option.opts} | {
            "--help",
            "--install-completion",
        }
        return
    assert words[0] in group.commands, where
    known = {name for option in group.commands[words[0]].params for name in option.opts} | {"--help"}
    assert {word.split("=")[0] for word in words[1:] if word.startswith("--")} <= known, where


def check_extras(words: list[str], where: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        if found := re.fullmatch(r"(?:\.|hf-sparse)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(setup["options.extras_require"]), where


def check_script(words: list[str], where: str) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None or words[1] in ("venv", "pytest"), where
        return
    script = ROOT / words[0]
    assert script.is_file(), where
    # Options are written in the script or in a module beside it, or are fields of the config that they fill.
    sources = "".join(file.read_text(encoding="utf-8") for file in script.parent.glob("*.py"))
    known = {"help", *(spec.name for spec in fields(SparseDistillConfig))}
    for word in words[1:]:
        if word.startswith("--") and len(word) > 2:
            option = word.removeprefix("--").split("=")[0]
            written = (f'"--{option}"', f"{option}:", f'"{option}"')
            assert option in known or any(text in sources for text in written), where


def test_a_command_that_does_not_exist_is_found() -> None:
    for line in ("hf-sparse fly", "hf-sparse report x --wings", "make wings", "python examples/fly.py",
                 "python examples/run_glue.py --wings", "pip install '.[wings]'",
                 "accelerate launch --config_file examples/accelerate/wings.yaml x.py"):  # fmt: skip
        with pytest.raises(AssertionError):
            check_command(line, "page")


# --- numbers that are told


def test_the_ranges_of_speed_are_those_that_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/cpu_encoder.json").read_text())["rows"]
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["dtype"] == "float32" and row["threads"] == 1:
            cells.setdefault((row["model"], row["scope"], row["batch"], row["length"]), []).append(row)
    text = (ROOT / "docs/sparsity.md").read_text(encoding="utf-8")
    for density, sparsity in ((0.5, "50 %"), (0.2, "80 %"), (0.1, "90 %"), (0.05, "95 %")):
        gains = []
        for cell in cells.values():
            best = min(row["ms"] for row in cell if not row["engine"].startswith("hf_sparse"))
            gains += [best / row["ms"] for row in cell if row["engine"] == "hf_sparse" and row["density"] == density]
        told = re.search(rf"^\| {sparsity} \| .*?([\d.]+) to ([\d.]+) times as fast", text, re.MULTILINE)
        assert told is not None
        assert (float(told[1]), float(told[2])) == (round(min(gains), 1), round(max(gains), 1)), sparsity


def test_the_speeds_of_block_shapes_are_those_of_the_table() -> None:
    table = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (fp32|bf16) \| 20% \| (\w+) \| 1 \|(.*)\|$", table, re.MULTILINE)
    # Tokens 1, 8, 32, 128, 512, then the worst of all cells.
    gain = {(dtype, block): float(cells.split("|")[3].strip(" x")) for dtype, block, cells in rows}
    text = " ".join((ROOT / "docs/block_shape.md").read_text(encoding="utf-8").split())
    single = [gain["fp32", block] for block in ("8x1", "32x1", "32x32")]
    assert f"32 x 32 are {min(single):.1f} to {max(single):.1f} times as fast" in text
    half = [f"{gain['bf16', block]:.1f}" for block in ("8x1", "8x2", "32x32")]
    assert f"8 x 1 being {half[0]} times as fast, 8 x 2 {half[1]} times and 32 x 32 {half[2]} times" in text


def test_what_the_readme_tells_of_the_gpu_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/gpu_models.json").read_text())["rows"]

    def row(engine: str, model: str, length: int) -> dict[str, Any]:
        found = [
            r for r in rows if (r["engine"], r["mode"], r["model"], r["length"]) == (engine, "compile", model, length)
        ]
        return next(r for r in found if engine == "dense" or r["block_shape"] == [64, 64])

    def gain(model: str, length: int) -> str:
        return f"{row('dense', model, length)['ms'] / row('hf_sparse', model, length)['ms']:.2f}"

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    loaded = [f"{row(engine, 'decode', 1024)['loaded_mb'] / 1000:.1f} GB" for engine in ("hf_sparse", "dense")]
    assert (
        f"decodes {gain('decode', 1024)} times as fast, its prefill is {gain('prefill', 4096)} times as fast, "
        f"BERT-large {gain('bert-large', 128)} times; the decoder takes {loaded[0]} where the dense one takes "
        f"{loaded[1]}"
    ) in text


def test_the_share_of_the_bitmap_is_what_it_is() -> None:
    text = (ROOT / "docs/block_shape.md").read_text(encoding="utf-8")
    for height, width in ((1, 1), (8, 1), (32, 32)):
        told = re.search(rf"^\| {height} x {width} \| [\d/]+ \| ([\d.]+) % \|$", text, re.MULTILINE)
        assert told is not None
        share = 100 / (32 * height * width)
        assert float(told[1]) == float(f"{share:.{len(told[1].partition('.')[2])}f}")
