"""A run as pictures, each narrow enough for a phone, on light paper or on dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..measure.limits import Limits
from ..measure.stats import Comparison
from .report import Report
from .series import Scaling, contestants, points, ratios, scalings

# Inches and dots: a phone shows the width in full, with letters of 10 pixels.
WIDTH, DPI = 4.2, 190

MARKERS = "osD^vP*Xh<>d"


@dataclass(frozen=True)
class Theme:
    """The colours of a page: paper, ink, soft ink, lines, and of ours faster and slower."""

    paper: str
    ink: str
    soft: str
    line: str
    faster: str
    slower: str
    palette: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1a1c20", "#5c6068", "#e0e0da", "#2f7fbd", "#c9661a",
    ("#1a1c20", "#c9661a", "#2f7fbd", "#1a8f6a", "#b0468e", "#8a7a1c", "#6b55c8", "#b03a3a"),
)  # fmt: skip
DARK = Theme(
    "#1b1e24", "#e9e7e2", "#a3a7b0", "#3a3f48", "#5aa7de", "#f0984a",
    ("#e9e7e2", "#f0984a", "#5aa7de", "#4cc79a", "#e083c0", "#d3c04a", "#a794f5", "#ec7b7b"),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A plot.

    Args:
        name: of its file, without the ending.
        kind: ``ratios``, ``roofline`` or ``scaling``.
        title: what it shows.
        png: the picture.
    """

    name: str
    kind: str
    title: str
    png: bytes


def pictures(report: Report, theme: Theme = LIGHT) -> list[Picture]:
    """Return every plot that the report has figures for."""
    found = [
        _picture("ratios", f"Ours over {name}", _ratio_bars(by_case, theme))
        for name, by_case in ratios(report).items()
    ]
    limits = report.limits
    for dtype in () if limits is None else limits.flops:
        if limits is not None and points(report, dtype):
            figure = _roofline(report, limits, dtype, theme)
            found.append(_picture("roofline", f"Roofline, {dtype}", figure))
    for one in scalings(report):
        found.append(_picture("scaling", one.name, _scaling(one, contestants(report), theme)))
    return found


def _picture(kind: str, title: str, figure: Figure) -> Picture:
    out = io.BytesIO()
    # No name and version of the program in the file, so that equal reports give equal files.
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Picture(
        words if words.startswith(kind) else f"{kind}-{words}", kind, title, out.getvalue()
    )


def _axes(height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.soft)
    axes.tick_params(which="both", colors=theme.soft, labelsize=9)
    axes.grid(color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _ratio_bars(by_case: Mapping[str, Comparison], theme: Theme) -> Figure:
    """Return a bar from 1 to each case's ratio, worst first, with the middle half as a line."""
    known = {name: one for name, one in by_case.items() if not one.noise}
    order = sorted(known, key=lambda name: -known[name].ratio.median)
    names = order + [name for name in by_case if name not in known]
    figure, axes = _axes(0.9 + 0.38 * len(names), theme)
    for place, name in enumerate(names):
        axes.text(0.005, place - 0.3, name, transform=axes.get_yaxis_transform(), color=theme.ink,
                  fontsize=8.5, va="center")  # fmt: skip
        if name not in known:
            axes.text(1.0, place + 0.14, " noisy", color=theme.soft, fontsize=8.5, va="center")
            continue
        _bar(axes, place + 0.14, known[name], theme)
    axes.axvline(1.0, color=theme.ink, linewidth=1.2)
    axes.set_xscale("log")
    edges = [edge for one in known.values() for edge in (one.ratio.lower, one.ratio.upper)]
    reach = 1.15 * max([1.25, *edges, *(1 / edge for edge in edges)])
    axes.set_xlim(1 / reach, reach)
    axes.set_ylim(len(names) - 0.4, -0.7)
    _plain_ticks(axes, reach)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ours ÷ theirs; left of 1, ours is faster", color=theme.soft, fontsize=9)
    return figure


def _bar(axes: Axes, place: float, one: Comparison, theme: Theme) -> None:
    word = one.verdict.partition(" ")[0]
    colour = {"faster": theme.faster, "slower": theme.slower}.get(word, theme.soft)
    middle = one.ratio.median
    axes.barh(place, middle - 1, left=1, height=0.34, color=colour)
    axes.plot([one.ratio.lower, one.ratio.upper], [place] * 2, color=theme.ink, linewidth=1.3)
    shift, side = (-4, "right") if middle < 1 else (4, "left")
    outer = one.ratio.lower if middle < 1 else one.ratio.upper
    axes.annotate(f"{middle:.2f}", (outer, place), (shift, 0), textcoords="offset points",
                  ha=side, va="center", fontsize=8, color=theme.ink)  # fmt: skip


def _plain_ticks(axes: Axes, reach: float) -> None:
    """Label a logarithmic axis around 1 with plain numbers, few enough not to touch."""
    steps = (1.1, 1.2) if reach < 1.5 else (1.25, 1.5) if reach < 2 else (1.5, 2, 3)
    steps = steps if reach < 4 else (2, 4, 8) if reach < 12 else (10, 100, 1000)
    chosen = [step for step in steps if step <= reach]
    ticks = [1 / step for step in reversed(chosen)] + [1.0, *chosen]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _roofline(report: Report, limits: Limits, dtype: str, theme: Theme) -> Figure:
    """Return FLOP/s over FLOP/byte, the measured peaks as a roof, and every contestant's point."""
    figure, axes = _axes(4.6, theme)
    found, names = points(report, dtype), contestants(report)
    peak = limits.flops[dtype]
    ridge = peak / limits.bandwidth
    xs = [point.intensity for point in found] + [ridge]
    low, high = min(xs) / 3, max(xs) * 3
    roof = [low, ridge, high]
    heights = [min(peak, x * limits.bandwidth) for x in roof]
    axes.plot(roof, heights, color=theme.ink, linewidth=1.6)
    axes.text(high, peak * 1.12, f"{peak / 1e9:,.0f} GFLOP/s, {limits.bandwidth / 1e9:,.0f} GB/s",
              color=theme.ink, fontsize=8.5, ha="right", va="bottom")  # fmt: skip
    for name in names:
        own = [point for point in found if point.contestant == name]
        if own:
            axes.plot([p.intensity for p in own], [p.rate for p in own], label=name,
                      **_style(names, name, theme), linestyle="")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min([*heights, *(p.rate for p in found)]) / 2, peak * 2.5)
    _one_two_five(axes.yaxis, lambda rate: f"{rate / 1e9:,g}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()
    axes.set_xlabel("FLOP/byte that the work needs", color=theme.soft, fontsize=9)
    axes.set_ylabel("GFLOP/s: what the work needs ÷ median", color=theme.soft, fontsize=9)
    _legend(figure, axes, theme)
    return figure


def _scaling(one: Scaling, names: Sequence[str], theme: Theme) -> Figure:
    """Return seconds over the size, both logarithmic, and each line's fitted exponent."""
    figure, axes = _axes(4.4, theme)
    for line in one.lines:
        grows = "" if line.exponent is None else f", power {line.exponent:.2f}"
        axes.plot(line.sizes, line.seconds, label=f"{line.contestant}{grows}",
                  **_style(names, line.contestant, theme), linewidth=1.5)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({size for line in one.lines for size in line.sizes})
    step = -(-len(sizes) // 8)
    axes.set_xticks(sizes[::step], [f"{size:,}" for size in sizes[::step]])
    axes.minorticks_off()
    _one_two_five(axes.yaxis, _short_clock)
    axes.set_xlabel(one.size, color=theme.soft, fontsize=9)
    axes.set_ylabel("median time", color=theme.soft, fontsize=9)
    _legend(figure, axes, theme)
    return figure


def _one_two_five(axis: Axis, said: Callable[[float], str]) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: said(value)))


def _short_clock(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size * 0.9999:
            return f"{seconds / size:g} {unit}"
    return f"{seconds * 1e6:g} µs"


def _style(names: Sequence[str], name: str, theme: Theme) -> dict[str, Any]:
    """Return the colour and the mark that a contestant has in every plot."""
    place = names.index(name)
    colour = theme.palette[place % len(theme.palette)]
    return {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 5.5,
            "markeredgecolor": theme.paper, "markeredgewidth": 0.5}  # fmt: skip


def _legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 27 else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False,
                  fontsize=8.5, labelcolor=theme.ink, handlelength=1.6)  # fmt: skip
