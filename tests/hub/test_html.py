"""The page of `report --html`: whole, well-formed, self-contained, and honest about what was not recorded."""

import base64
import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import FormatError
from hf_sparse.hub.facts import FACTS_FILE, CardFacts, LatencyFacts
from hf_sparse.hub.html import render_report
from hf_sparse.hub.masks import lay_out, read_mask_maps
from hf_sparse.hub.svg import line_chart, mask_image, move_chart
from tests.hub.test_facts import FULL

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Elements and their text; an element that is closed in the wrong place fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.cells[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def page_text(model_folder: Path) -> str:
    (model_folder / FACTS_FILE).write_text(FULL.to_json())
    return render_report(model_folder)


def test_the_page_fetches_and_runs_nothing(page_text: str) -> None:
    page = Page(page_text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "audio", "video"}
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("href", "srcset", "xlink:href")]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.of("img"))
    style = re.search(r"<style>(.*)</style>", page_text, re.DOTALL)
    assert style is not None
    assert not re.search(r"@import|url\(|https?:", style[1])
    assert "prefers-color-scheme: dark" in style[1]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")


def test_the_page_tells_layers_and_facts(page_text: str, model_folder: Path) -> None:
    page, found = Page(page_text), hf_sparse.report(model_folder)
    for layer in found.layers:
        row = next(row for row in page.cells if row[:1] == [layer.name])
        assert row[2:] == [
            " x ".join(map(str, layer.shape)), " x ".join(map(str, layer.block_shape)), f"{layer.kept_blocks:,}",
            f"{layer.total_blocks:,}", f"{100 * layer.sparsity:.2f}".rstrip("0").rstrip(".") + " %",
            f"{layer.bytes:,}", f"{layer.dense_bytes:,}",
        ]  # fmt: skip
    assert ["accuracy", "0.9125", "0.9200", "-0.0075"] in page.cells
    assert ["F1 (macro)", "0.5000", "not measured", "not measured"] in page.cells
    assert ["1 x 128", "3.22", "12", "3.73x", "cpu", "float32", "2", "a box"] in page.cells
    assert ["training", "1,234 steps, 100 seconds on a box"] in page.cells
    assert "English only." in page.text
    assert "Never shown a <script>." in page.text


def test_the_page_tells_how_much_data_there_was(page_text: str) -> None:
    assert "Toy Set, 4,000 rows to train, 500 rows to evaluate" in page_text
    assert "Made up | for tests." in page_text


def test_a_folder_without_facts_has_a_page_of_its_weights(model_folder: Path) -> None:
    page = Page(render_report(model_folder))
    assert "Where the weights survived" in page.text
    assert "Curves" not in page.text
    assert "Results" not in page.text
    assert "How it was made" not in page.text
    assert not re.search(r"\bNone\b|Undefined|nan", page.text)


@pytest.mark.parametrize("absent", [name for name in FULL.to_dict() if name not in ("name", "save_format")])
def test_each_fact_may_be_absent(model_folder: Path, absent: str) -> None:
    facts = {name: value for name, value in FULL.to_dict().items() if name != absent}
    (model_folder / FACTS_FILE).write_text(CardFacts.from_dict(facts).to_json())
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", Page(render_report(model_folder)).text)


def test_maps_are_images_of_the_masks(page_text: str, model_folder: Path) -> None:
    grid = lay_out(read_mask_maps(model_folder))
    images = Page(page_text).of("img")
    assert len(images) == len(grid.maps) == 12
    expected = {mask_image(found.cells, grid.highest) for found in grid.maps.values()}
    assert {image["src"] for image in images} == expected


def test_a_map_is_a_png_with_the_density_as_opacity(tmp_path: Path) -> None:
    from matplotlib.image import imread

    cells = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.1, 0.4]])
    address = mask_image(cells, highest=0.5)
    file = tmp_path / "x.png"
    file.write_bytes(base64.b64decode(address.removeprefix("data:image/png;base64,")))
    opacity = torch.from_numpy(imread(file))[..., 3]
    assert opacity.shape == (3, 2)
    assert torch.allclose(opacity, (cells / 0.5).clamp(max=1.0), atol=1 / 255)


def test_lines_lie_where_the_numbers_are() -> None:
    drawn = line_chart({"loss": [(0, 0.0), (50, 0.5), (100, 1.0)]}, "x")
    points = re.search(r'points="([^"]*)"', drawn)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in points[1].split())
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert x0 < x2 and y0 > y2
    ticks = re.findall(r'<text class="tick y"[^>]*>([^<]*)<', drawn)
    assert ticks == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.parametrize(
    "curve",
    [[(1, 0.0)], [(0, 0.0), (0, 0.0)], [(1, 5.0), (2, 5.0)], [(1, -2.0), (3, 7.0)], [(1, 1e-12), (2, 3e9)]],
)
def test_odd_curves_are_drawn_inside_the_chart(curve: list[tuple[float, float]]) -> None:
    drawn = line_chart({"a": curve}, "x")
    for x, y in re.findall(r'c?x="([-\d.]+)" c?y="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= 340 and 0 <= float(y) <= 230
    assert "nan" not in drawn and "inf" not in drawn


def test_a_move_of_nothing_is_drawn() -> None:
    assert move_chart([("a", (0.0, 0.0), (0.0, 0.0))], "MB", "x").count("<circle") == 2


def test_hostile_facts_stay_text(model_folder: Path) -> None:
    nasty = '</td><script>alert(1)</script><img src=x onerror="a()">{{ 7 * 7 }}'
    facts = replace(
        FULL, name=nasty, teacher=nasty, limits=(nasty,), eval_command=nasty, recipe={nasty: nasty}, base_model="a/b",
        latency=(LatencyFacts(batch=1, length=1, ms=1.0, dense_ms=1.0, engine=nasty, hardware=nasty, command=nasty),),
        metrics=(replace(FULL.metrics[0], name=nasty),), versions={nasty: nasty},
        history=({"step": 1, f"eval_{nasty}": 1.0}, {"step": 2, f"eval_{nasty}": 2.0}),
    )  # fmt: skip
    (model_folder / FACTS_FILE).write_text(facts.to_json())
    text = render_report(model_folder)
    page = Page(text)
    assert not page.of("script")
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]
    assert page.text.count("{{ 7 * 7 }}") > 8


def test_damaged_folders_are_refused(model_folder: Path) -> None:
    (model_folder / "hf_sparse_card.json").write_text("{")
    with pytest.raises(FormatError, match=r"hf_sparse_card\.json is not JSON"):
        render_report(model_folder)


# --- in a browser, where there is one

PROBE = """<!doctype html><iframe src="report.html" width="{width}" height="900"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  document.body.textContent = JSON.stringify({{
    wide: root.scrollWidth, view: root.clientWidth, background: getComputedStyle(page.body).backgroundColor,
    images: [...page.images].map(image => [image.naturalWidth, image.naturalHeight]),
    low: [...page.querySelectorAll("svg text")].filter(t => t.getBoundingClientRect().height < 9).length,
  }});
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
@pytest.mark.parametrize(("dark", "background"), [(False, "rgb(255, 255, 255)"), (True, "rgb(13, 17, 23)")])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_in_a_browser(
    page_text: str, model_folder: Path, tmp_path: Path, width: int, dark: bool, background: str
) -> None:
    (tmp_path / "report.html").write_text(page_text, encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-sync", "--disable-component-update", "--no-first-run", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<body>(\{.*\})</body>", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    told = json.loads(found[1])
    assert told["background"] == background
    # Nothing sticks out: what is wider than a phone scrolls inside the page.
    assert told["wide"] == told["view"] <= width
    sizes = [struct.unpack(">II", base64.b64decode(src.split(",")[1])[16:24])
             for src in re.findall(r'<img src="([^"]+)"', page_text)]  # fmt: skip
    assert sorted(map(tuple, told["images"])) == sorted(sizes)
    assert told["low"] == 0
