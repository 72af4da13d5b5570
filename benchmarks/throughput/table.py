"""Summarises the figures of several runs, as lines and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TypeAlias

COLUMNS = ("work", "variant", "runs", "steps/s", "CPU µs a step", "to the target", "more")
_SHOWN = ("sps", "cpu_us_per_step", "to_target_s")


Figure: TypeAlias = dict[str, float | int | None]
"""Median, spread, and the number of runs with the figure, ``known``."""


def summary(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Figure]:
    """Returns median and spread (range divided by the median) of every figure.

    A missing figure (None, as for a target that was not reached) counts as infinite, so there is no
    median if half of the runs have none.
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
    """Returns a Markdown table with a row for each line of figures."""
    cells = [list(COLUMNS), ["---"] * len(COLUMNS)] + [_cells(line) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cost_of(lines: Sequence[Mapping[str, object]], base: str) -> dict[str, float]:
    """Returns the fraction of throughput that variants lose to `base`, by CPU time per step."""
    cpu = {
        str(line["variant"]): line["figures"]["cpu_us_per_step"]["median"]  # type: ignore[index]
        for line in lines
    }
    return {name: 1 - cpu[base] / value for name, value in cpu.items() if name != base}


def _cells(line: Mapping[str, object]) -> list[str]:
    figures: dict[str, Figure] = line["figures"]  # type: ignore[assignment]
    runs: int = line["runs"]  # type: ignore[assignment]
    own = [shown(figures.get(name), runs) for name in _SHOWN]
    rest = [f"{k} {shown(figure, runs)}" for k, figure in figures.items() if k not in _SHOWN]
    return [*(str(line[key]) for key in ("title", "variant", "runs")), *own, ", ".join(rest)]


def shown(figure: Figure | None, runs: int) -> str:
    """Formats as ``152 k (spread 4%)``, with the number of runs with the figure if not all."""
    if figure is None:
        return "-"
    middle, known = figure["median"], int(figure["known"] or 0)
    if middle is None:
        return f"not in {runs - known} of {runs} runs"
    text = number(middle)
    if runs > 1:
        text += f" (spread {figure['spread']:.0%})"
    return text if known == runs else f"{text}, {known} of {runs} runs"


def number(value: float) -> str:
    """Formats with three significant digits, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k" if abs(value) < 1_000_000 else f"{value / 1e6:.3g} M"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
