"""The pictures of a model card, as PNG: where the weights survived, how training went, what was gained for what.

Drawn with matplotlib (`pip install hf-sparse[plots]`), which is imported here and only when something is drawn.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_sparse.hub.facts import CardFacts
from hf_sparse.hub.history import curves
from hf_sparse.hub.masks import MaskGrid, lay_out, read_mask_maps
from hf_sparse.hub.parts import PictureFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MASKS_FILE, TRAINING_FILE, TRADEOFF_FILE = "masks.png", "training.png", "tradeoff.png"

# Dark ink on white, and hues that differ in lightness, so that they stay apart in grey.
INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
HUES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#6e7781")
_DPI = 110
# Pixels of a panel, which most numbers of cells divide, and of the gap above and beside it; what both take on paper.
_PANEL, _GAP = 192, 24
_STEP, _PANEL_INCHES = _PANEL + _GAP, 1.25


def draw_pictures(
    model: str | os.PathLike[str], facts: CardFacts, into: str | os.PathLike[str]
) -> tuple[PictureFacts, ...]:
    """Draw what can be drawn of a model: nothing that was not recorded, and nothing at all without matplotlib.

    Args:
        model: the model folder; without weights in it there is no picture of masks.
        facts: what was recorded.
        into: folder to write the PNG files to; it exists.

    Returns:
        The pictures, in the order in which a card shows them. Without matplotlib the recorded ones that the model
        folder holds, save for the one that a new measurement would change.

    Raises:
        FormatError: if the model folder is damaged.
    """
    model, there = Path(model), {x.file: x for x in facts.pictures if (Path(model) / x.file).is_file()}
    grid = lay_out(read_mask_maps(model)) if (model / "config.json").is_file() else None
    drawn: dict[str, Any] = {
        MASKS_FILE: (draw_masks, grid if grid and grid.maps else None),
        TRAINING_FILE: (draw_training, facts.history if curves(facts.history) else None),
        TRADEOFF_FILE: (draw_tradeoff, facts if compared(facts) else None),
    }
    # A folder of a card alone, without its model, cannot have its maps drawn again.
    pictures = {MASKS_FILE: there[MASKS_FILE]} if grid is None and MASKS_FILE in there else {}
    if any(given for _, given in drawn.values()):
        try:
            require_matplotlib()
        except ImportError as error:
            logger.warning("no new pictures for %s: %s", model, error)
            return tuple(x for name, x in there.items() if name != TRADEOFF_FILE)
    for name, (draw, given) in drawn.items():
        if given:
            figure, alt = draw(given)
            save(figure, Path(into) / name)
            pictures[name] = PictureFacts(file=name, alt=alt)
    return tuple(pictures[name] for name in drawn if name in pictures)


def require_matplotlib() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pictures are drawn with matplotlib ({error}): pip install 'hf-sparse[plots]'.") from error


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, or as SVG where the name ends so; the same bytes for the same figure."""
    # Without it a file tells when, and by which version, it was drawn.
    metadata = {"Software": None} if file.suffix == ".png" else {"Date": None, "Creator": None}
    figure.savefig(file, dpi=_DPI, metadata=metadata, facecolor="white")


def draw_masks(grid: MaskGrid) -> tuple[Figure, str]:
    """Draw where the weights survived: a panel per weight, a row per transformer layer.

    Args:
        grid: with at least one map.

    Returns:
        The figure, and what it shows in words.
    """
    from matplotlib.figure import Figure

    across, down = _PANEL_INCHES * len(grid.columns), _PANEL_INCHES * len(grid.rows)
    left, right, top, bottom = 1.0, 0.9, 0.95, 0.15
    # The title needs some width, however few the columns.
    width, height = max(left + across + right, 5.8), top + down + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
    image = axes.imshow(
        _canvas(grid), cmap="Blues", vmin=0.0, vmax=grid.highest, interpolation="nearest", aspect="auto"
    )
    axes.set_axis_off()
    _label_panels(axes, grid)
    length = min(down, 2 * _PANEL_INCHES)
    place = ((left + across + 0.15) / width, 1 - (top + length) / height, 0.12 / width, length / height)
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.ax.tick_params(labelsize=6.5, colors=MUTED)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.ax.spines["outline"].set_edgecolor(GRID)
    more = f"; {grid.left_out} more layers are not shown" if grid.left_out else ""
    title = f"Share of weights kept, cell by cell (output rows down, input columns across{more})"
    figure.text(0.12 / width, 1 - 0.18 / height, title, ha="left", va="top", fontsize=9, color=INK)
    low, high = (f"{f(found.density for found in grid.maps.values()):.1%}" for f in (min, max))
    kept = low if low == high else f"between {low} and {high}"
    return figure, f"Where the weights of {len(grid.maps)} layers survived: {kept} of each is kept"


def draw_training(history: Sequence[dict[str, float]]) -> tuple[Figure, str]:
    """Draw the recorded curves of a training run: a chart each for sparsity and grafting, losses, penalty, evaluation.

    Args:
        history: `CardFacts.history` with at least one curve.

    Returns:
        The figure, and what it shows in words.
    """
    charts = curves(history)
    figure, panels = _side_by_side(len(charts))
    for axes, (title, lines) in zip(panels, charts.items(), strict=True):
        for (name, curve), hue in zip(lines.items(), HUES * len(lines), strict=False):
            few = len(curve) < 12
            axes.plot(*zip(*curve, strict=True), color=hue, lw=1.4, label=name,
                      marker="o" if few else "", ms=3)  # fmt: skip
        style(axes, title)
        axes.set_xlabel("step", fontsize=7.5, color=MUTED)
        axes.set_xlim(left=0.0)
        if title == "sparsity and grafting":
            axes.set_ylim(-0.02, 1.04)
        elif title in ("losses", "penalty"):
            # Room for the names, which curves that stay high would run through.
            axes.set_ylim(0.0, axes.get_ylim()[1] * (1.05 + 0.07 * -(-len(lines) // 2)))
        _legend(axes, "upper right" if title in ("losses", "penalty") else "lower right")
    last = int(history[-1]["step"])
    return figure, f"Training over {last:,} steps: {', '.join(charts)}"


def draw_tradeoff(facts: CardFacts) -> tuple[Figure, str]:
    """Draw the score of the pruned and of the dense model against their size and their latency.

    Args:
        facts: with a metric and a size, or a latency, of both models.

    Returns:
        The figure, and what it shows in words.
    """
    metric, panels = facts.metrics[0], compared(facts)
    name, dense_score = metric.name or metric.type, metric.dense_value
    if dense_score is None:
        raise ValueError(f"the dense model's {name} was not measured.")
    figure, all_axes = _side_by_side(len(panels))
    # A range that does not blow up a small difference.
    middle, reach = (
        (metric.value + dense_score) / 2,
        max(abs(metric.value - dense_score) * 1.5, 0.1 * abs(dense_score)),
    )
    for axes, (label, pairs) in zip(all_axes, panels.items(), strict=True):
        for (note, dense, pruned), hue in zip(pairs, HUES * len(pairs), strict=False):
            arrow = {"arrowstyle": "->", "color": hue, "lw": 1.2, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", (pruned, metric.value), (dense, dense_score), arrowprops=arrow)
            axes.plot(dense, dense_score, "o", mfc="white", mec=hue, ms=7, label=f"dense{note}")
            axes.plot(pruned, metric.value, "o", color=hue, ms=7, label=f"this model{note}")
        style(axes, f"{name} against {label.split(' (')[0]}")
        axes.set_xlabel(label, fontsize=7.5, color=MUTED)
        axes.set_xlim(0.0, 1.12 * max(max(dense, pruned) for _, dense, pruned in pairs))
        axes.set_ylim(middle - reach, middle + reach)
        _legend(axes, "lower right")
    against = " and ".join(label.split(" (")[0] for label in panels)
    return figure, f"The pruned and the dense model: {name} against {against}"


def compared(facts: CardFacts) -> dict[str, list[tuple[str, float, float]]]:
    """Give what a score can be shown against: {axis (unit): [(note, dense, pruned)]}, as far as both were measured.

    Empty where the score of one of the two models was not.
    """
    panels: dict[str, list[tuple[str, float, float]]] = {}
    if not facts.metrics or facts.metrics[0].dense_value is None:
        return panels
    if facts.file_bytes and facts.dense_file_bytes:
        panels["size of the weights file (MB)"] = [("", facts.dense_file_bytes / 1e6, facts.file_bytes / 1e6)]
    times = [(f", {x.batch} x {x.length}", x.dense_ms, x.ms) for x in facts.latency if x.dense_ms]
    if times:
        panels["latency (ms, batch x tokens)"] = times[:4]
    return panels


def _side_by_side(count: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    # Fixed margins: matplotlib takes longer to find its own than to draw all the rest.
    width, height = 0.2 + 3.6 * count, 3.0
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.5 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    return figure, figure.subplots(1, count, squeeze=False, gridspec_kw={**margins, "wspace": 0.22})[0]


def style(axes: Axes, title: str, label_size: float = 7.0, grid_width: float = 0.6) -> None:
    """Make axes look like those of all pictures: a title, quiet labels, lines across, no frame."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=label_size, colors=MUTED, length=0)
    axes.grid(axis="y", color=GRID, lw=grid_width)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _legend(axes: Axes, corner: Literal["upper right", "lower right"]) -> None:
    axes.legend(fontsize=6.5, frameon=False, labelcolor=INK, loc=corner, ncols=2)


def _canvas(grid: MaskGrid) -> Any:
    """Put the panels of all maps into one image: far quicker to draw than axes for each."""
    canvas = torch.full((len(grid.rows) * _STEP, len(grid.columns) * _STEP), float("nan"))
    for (row, column), found in grid.maps.items():
        top, left = grid.rows.index(row) * _STEP + _GAP, grid.columns.index(column) * _STEP
        box = torch.nn.functional.interpolate(found.cells[None, None], size=(_PANEL, _PANEL), mode="nearest")
        canvas[top : top + _PANEL, left : left + _PANEL] = box[0, 0]
    return canvas.numpy()


def _label_panels(axes: Axes, grid: MaskGrid) -> None:
    from matplotlib.patches import Rectangle

    for j, column in enumerate(grid.columns):
        shapes = sorted({found.shape for (_, name), found in grid.maps.items() if name == column})
        label = f"{_broken(column)}\n{', '.join(f'{o} x {i}' for o, i in shapes[:2])}"
        axes.text(j * _STEP + _PANEL / 2, -4, label, ha="center", va="bottom", fontsize=7, color=INK)
    for i, row in enumerate(grid.rows):
        axes.text(
            -12,
            i * _STEP + _GAP + _PANEL / 2,
            _broken(grid.label(row)),
            ha="right",
            va="center",
            fontsize=7,
            color=INK,
        )
    for (row, column), found in grid.maps.items():
        left, top = grid.columns.index(column) * _STEP, grid.rows.index(row) * _STEP + _GAP
        axes.text(left, top - 4, f"{found.density:.1%} kept", va="bottom", fontsize=5.5, color=MUTED)
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), _PANEL, _PANEL, fill=False, edgecolor=GRID, lw=0.6))


def _broken(name: str) -> str:
    """Break a dotted name where the line would get too long for a column."""
    lines = [""]
    for part in name.split("."):
        if lines[-1] and len(lines[-1]) + len(part) > 16:
            lines.append("")
        lines[-1] += part + "."
    return "\n".join(lines).removesuffix(".")
