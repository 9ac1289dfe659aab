"""`hf-sparse report`: of a folder and of a repository, as a table, as JSON, and as a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.hub.facts import FACTS_FILE
from hf_sparse.hub.html import render_report
from hf_sparse.hub.push import push_folder
from tests.hub.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.hub.test_facts import FULL
from tests.test_cli import Done, assert_refused

REPO = "tester/pruned"
Cli = Callable[..., Done]


def test_the_page_is_written_beside_the_table(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cli("report", model_folder, "--html", page)
    assert (done.code, done.out) == (0, f"{hf_sparse.report(model_folder)}\n")
    assert re.fullmatch(rf"{re.escape(str(page))}: [\d,]+ bytes, opens in any browser\.\n", done.err)
    assert page.read_text(encoding="utf-8") == render_report(model_folder)
    (model_folder / FACTS_FILE).write_text(FULL.to_json())
    told = json.loads(cli("report", model_folder, "--html", page, "--json").out)
    assert told == json.loads(json.dumps(hf_sparse.report(model_folder).to_dict()))
    assert "tiny-80" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [("page.txt", "must end in .html"), ("model.safetensors", "must end"), ("no/page.html", "no is no folder"),
     ("folder.html", "folder.html is a folder: name a file")],
)  # fmt: skip
def test_pages_are_not_written_just_anywhere(
    cli: Cli, model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(model_folder)
    Path("folder.html").mkdir()
    before = (model_folder / "model.safetensors").read_bytes()
    assert_refused(cli("report", model_folder, "--html", name), message)
    assert (model_folder / "model.safetensors").read_bytes() == before


def test_an_earlier_page_outlives_a_damaged_model(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("earlier")
    (model_folder / FACTS_FILE).write_text('{"name": 3}')
    assert_refused(cli("report", model_folder, "--html", page), f"{FACTS_FILE}: ")
    assert page.read_text() == "earlier"


# --- from the Hub


def test_push_and_report_by_repo_id(cli: Cli, hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    (model_folder / FACTS_FILE).write_text(FULL.to_json())
    (model_folder / "vocab.txt").write_text("a b c")
    told = json.loads(cli("push", model_folder, REPO, "--token", WRITE_TOKEN, "--json").out)
    assert told == {"url": f"{hub.url}/{REPO}"}
    page = tmp_path / "page.html"
    done = cli("report", REPO, "--json", "--html", page)
    assert json.loads(done.out) == json.loads(json.dumps(hf_sparse.report(model_folder).to_dict()))
    assert page.read_text(encoding="utf-8") == render_report(model_folder, name=REPO)
    # What a report does not look at is not fetched.
    assert not [line for line in hub.requests if "vocab.txt" in line]
    assert hub.unhandled == []


def test_report_of_a_revision(cli: Cli, hub: LoopbackHub, model_folder: Path, dense: Path) -> None:
    push_folder(model_folder, REPO, token=WRITE_TOKEN)
    push_folder(dense, REPO, revision="v2", token=WRITE_TOKEN)
    new, old = (json.loads(cli("report", REPO, "--json", *more).out) for more in ((), ("--revision", "v2")))
    assert new == json.loads(json.dumps(hf_sparse.report(model_folder).to_dict()))
    assert old == json.loads(json.dumps(hf_sparse.report(dense).to_dict()))
    assert_refused(cli("report", REPO, "--revision", "v3"), "tester/pruned has no revision 'v3'")
    assert_refused(cli("report", dense, "--revision", "v2"), "is a folder, which has no revisions")


def test_report_of_a_private_repository(cli: Cli, hub: LoopbackHub, model_folder: Path) -> None:
    push_folder(model_folder, REPO, private=True, token=WRITE_TOKEN)
    assert_refused(cli("report", REPO), "has no such repository, or it is a private one: then run `hf auth login`")
    assert cli("report", REPO, "--token", READ_TOKEN).code == 0


def test_report_of_what_is_not_there(cli: Cli, hub: LoopbackHub, tmp_path: Path) -> None:
    assert_refused(
        cli("report", "tester/nothing"), "tester/nothing is no folder here, and http.* has no such repository"
    )
    asked = len(hub.requests)
    for path in (tmp_path / "nowhere", "./nowhere", "../x/y", "a/b/c", "bare", "~/x", ".hidden/x"):
        assert_refused(cli("report", path), "does not exist: expected the folder of a saved model")
    assert len(hub.requests) == asked


def test_report_of_a_repository_without_a_model(cli: Cli, hub: LoopbackHub, model_folder: Path) -> None:
    push_folder(model_folder, REPO, token=WRITE_TOKEN)
    files = hub.repos[REPO].branches["main"][-1].files
    del files["model.safetensors"]
    assert_refused(cli("report", REPO), "holds no model.safetensors and no")
    del files["config.json"]
    assert_refused(cli("report", REPO), r"holds no config\.json|no such repository|could not be fetched")


def test_report_when_the_hub_has_trouble(
    cli: Cli, hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push_folder(model_folder, REPO, token=WRITE_TOKEN)
    hub.fail("GET /api/models/", 500, times=99)
    assert_refused(cli("report", REPO), "tester/pruned is no folder here, and could not be fetched from http")


def test_a_damaged_model_of_the_hub_is_refused(cli: Cli, hub: LoopbackHub, model_folder: Path) -> None:
    push_folder(model_folder, REPO, token=WRITE_TOKEN)
    files = hub.repos[REPO].branches["main"][-1].files
    files["model.safetensors"] = files["model.safetensors"][:-5]
    done = cli("report", REPO)
    assert_refused(done, r"model\.safetensors is not a whole safetensors file")
    # However long it took: no bars where stderr is no terminal.
    assert "Fetching" not in done.err and "%" not in done.err
