"""Small charts as SVG and masks as images, to be put into an HTML page: no file beside it, colours from its style.

Lines and texts have classes and no colours, so that the page decides on them, in light and in dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape
from torch import Tensor

# A chart is as wide as a phone, so that its text keeps its size there.
WIDTH, HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 8, 36
HUES = 6


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Markup:
    """Draw curves over training steps.

    Args:
        lines: {name: [(step, value)]}, at least one with at least one point; finite numbers.
        label: what the chart shows, for who cannot see it.

    Returns:
        An `<svg>` with one `<polyline class="line hue-N">` per curve.

    Example:
        >>> "<polyline" in line_chart({"loss": [(1, 2.0), (2, 1.0)]}, "Losses")
        True
    """
    points = [point for line in lines.values() for point in line]
    (low, high), last = _padded([y for _, y in points]), max(x for x, _ in points)
    frame = _Frame((0.0, last or 1.0), (low, high))
    parts = [frame.axes("step")]
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
        title = Markup("<title>{}: {} at step {}</title>").format(name, _short(line[-1][1]), _short(line[-1][0]))
        parts.append(Markup('<polyline class="line hue-{}" points="{}">{}</polyline>').format(i % HUES, path, title))
        if len(line) < 12:
            parts += [frame.dot(x, y, f"dot hue-{i % HUES}") for x, y in line]
    return _svg(parts, label)


def move_chart(moves: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], axis: str, label: str) -> Markup:
    """Draw where a change took something: an arrow from each old point (a ring) to the new one (a dot).

    Args:
        moves: (name, old point, new point), at least one; x >= 0, finite numbers.
        axis: what x is.
        label: what the chart shows, for who cannot see it.

    Example:
        >>> move_chart([("size", (2.0, 0.9), (1.0, 0.8))], "MB", "Accuracy against size").count("<circle")
        2
    """
    values = [y for _, old, new in moves for _, y in (old, new)]
    middle, difference = (max(values) + min(values)) / 2, max(values) - min(values)
    # A range that does not blow up a small difference.
    reach = max(1.5 * difference, 0.1 * abs(middle)) or 1.0
    furthest = max(x for _, old, new in moves for x, _ in (old, new))
    frame = _Frame((0.0, 1.1 * furthest or 1.0), (middle - reach, middle + reach))
    parts = [frame.axes(axis)]
    for i, (name, old, new) in enumerate(moves):
        ends = [frame.x(old[0]), frame.y(old[1]), frame.x(new[0]), frame.y(new[1])]
        title = Markup("<title>{}: from {} to {}</title>").format(name, _short(old[0]), _short(new[0]))
        line = '<line class="line hue-{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}">{}</line>'
        parts.append(Markup(line).format(i % HUES, *ends, title))
        parts += [frame.dot(*old, f"ring hue-{i % HUES}"), frame.dot(*new, f"dot hue-{i % HUES}")]
    return _svg(parts, label)


def mask_image(cells: Tensor, highest: float) -> str:
    """Write a map as a PNG whose opacity is the density: it takes the page's own background.

    Args:
        cells: [r, c], densities in [0, 1].
        highest: density that is fully opaque, above 0.

    Returns:
        A "data:" address.
    """
    rows, cols = cells.shape
    levels = (cells / highest).clamp(0.0, 1.0).mul(255).round().int().tolist()
    lines = b"".join(b"\0" + bytes(line) for line in levels)
    # A palette of one colour in 256 opacities takes a byte per cell.
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", cols, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes((47, 129, 247)) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
              for kind, body in chunks)  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(packed)).decode()


class _Frame:
    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, name: str) -> Markup:
        parts = []
        for value in _ticks(*self.y_range):
            place = f"{self.y(value):.1f}"
            parts.append(
                Markup('<line class="rule" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
                    _LEFT, place, WIDTH - _RIGHT, place
                )
            )
            parts.append(
                Markup('<text class="tick y" x="{}" y="{}">{}</text>').format(_LEFT - 5, place, _short(value))
            )
        for value in _ticks(*self.x_range):
            text = '<text class="tick x" x="{:.1f}" y="{}">{}</text>'
            parts.append(Markup(text).format(self.x(value), HEIGHT - _BOTTOM + 14, _short(value)))
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(Markup('<text class="tick x" x="{:.1f}" y="{}">{}</text>').format(middle, HEIGHT - 4, name))
        return Markup("").join(parts)

    def dot(self, x: float, y: float, kind: str) -> Markup:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, self.x(x), self.y(y))


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, escape(label))
    return opening + Markup("").join(parts) + Markup("</svg>")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    # From zero where zero is near, which is true of losses and shares.
    low = 0.0 if 0.0 <= low < 0.5 * high else low
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0.0 else low - pad), high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside a range, about five of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """Write a number in a few characters.

    Example:
        >>> _short(0.30000000000000004), _short(1200.0), _short(12345.0), _short(0.0)
        ('0.3', '1200', '12,345', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
