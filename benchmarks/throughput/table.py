"""The figures of several runs as one line each, and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TypeAlias

COLUMNS = ("work", "variant", "runs", "steps/s", "CPU µs a step", "to the target", "more")
_SHOWN = ("sps", "cpu_us_per_step", "to_target_s")


Figure: TypeAlias = dict[str, float | int | None]
"""Median, spread, and the number of runs that have it, under ``known``."""


def summary(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Figure]:
    """Median and spread (largest minus smallest, as a share of the median) of every figure.

    A run without a figure (None, as for a target that was not reached) is later than all others,
    so that there is no median where half of the runs have none.
    """
    figures: dict[str, Figure] = {}
    for name in runs[0]:
        found = (run[name] for run in runs)
        values = sorted(math.inf if value is None else value for value in found)
        known = [value for value in values if value < math.inf]
        middle = median(values)
        spread = (known[-1] - known[0]) / abs(middle) if known and 0 < abs(middle) < math.inf else 0
        figures[name] = {
            "median": middle if middle < math.inf else None,
            "spread": round(spread, 3),
            "known": len(known),
        }
    return figures


def table(lines: Sequence[Mapping[str, object]]) -> str:
    """Markdown, one row for each line of figures."""
    cells = [list(COLUMNS), ["---"] * len(COLUMNS)] + [_cells(line) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cost_of(lines: Sequence[Mapping[str, object]], base: str) -> dict[str, float]:
    """Share of throughput that each variant loses to `base`, by CPU time a step."""
    cpu = {
        str(line["variant"]): line["figures"]["cpu_us_per_step"]["median"]  # type: ignore[index]
        for line in lines
    }
    return {name: 1 - cpu[base] / value for name, value in cpu.items() if name != base}


def _cells(line: Mapping[str, object]) -> list[str]:
    figures: dict[str, dict[str, float]] = line["figures"]  # type: ignore[assignment]
    shown = [_shown(figures.get(name), line["runs"]) for name in _SHOWN]  # type: ignore[arg-type]
    rest = [
        f"{name} {_shown(value, line['runs'])}"  # type: ignore[arg-type]
        for name, value in figures.items()
        if name not in _SHOWN
    ]
    return [*(str(line[key]) for key in ("title", "variant", "runs")), *shown, ", ".join(rest)]


def _shown(figure: Mapping[str, float] | None, runs: int) -> str:
    """As ``152.3 k ± 4 %``; with the number of runs that have it, where not all do."""
    if figure is None:
        return "-"
    if figure["median"] is None:
        return f"not in {runs - figure['known']} of {runs} runs"
    text = number(figure["median"])
    if runs > 1:
        text += f" (spread {figure['spread']:.0%})"
    return text if figure["known"] == runs else f"{text}, {figure['known']} of {runs} runs"


def number(value: float) -> str:
    """Three digits that count, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k" if abs(value) < 1_000_000 else f"{value / 1e6:.3g} M"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
