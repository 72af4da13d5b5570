"""Tables of the report: performance by experience on a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import MARKDOWN
from rich.console import RenderableType
from rich.table import Table

from dmrl_ray.results import reading as results
from dmrl_ray.results.display import short
from dmrl_ray.results.intervals import FEW_SEEDS

MAX_POINTS = 6
UNKNOWN = "[?]"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Returns a Markdown table."""
    grid = Table(box=MARKDOWN)
    for title in titles:
        grid.add_column(title, no_wrap=True)
    for row in rows:
        grid.add_row(*map(str, row))
    return grid


def adaptation(episodes: pd.DataFrame) -> list[RenderableType]:
    """Returns a table with a row per method and point of experience, and a legend."""
    by = ("stage", "split")
    frame = results.over_experience(episodes, by=by)
    measures = [measure for measure in results.MEASURES if (frame["measure"] == measure).any()]
    rows: list[tuple[str, ...]] = []
    most = 0
    keys = [name for name in (*by, "algorithm", "greedy", "job", "change") if name in frame]
    for _, group in frame.groupby(keys, sort=False, observed=True, dropna=False):
        points = [point for _, point in group.groupby("experience_episodes", dropna=False)]
        most = max(most, len(points))
        lines = [_point(points[i], measures, group) for i in _evenly_spaced(range(len(points)))]
        labels = _labels(group)
        lines += [("",) * (2 + len(measures))] * (len(labels) - len(lines))
        labels += [""] * (len(lines) - len(labels))
        rows += [(label, *line) for label, line in zip(labels, lines, strict=True)]
    titles = ("stage", "episodes", "steps", *(f"{m} [95 %]" for m in measures))
    return [table(titles, rows), _legend(frame, rows, most)]


def _legend(frame: pd.DataFrame, rows: Sequence[Sequence[str]], most: int) -> str:
    over = "training seeds" if (frame["seeds"] > 1).any() else "tasks"
    if over == "tasks" and (frame["starts"] > frame["tasks"]).any():
        over = "starts if a task was sampled more than once, else over tasks"
    text = f"Intervals are over {over}."
    if any(UNKNOWN in cell for row in rows for cell in row):
        text += f" {UNKNOWN}: too few episodes for an interval."
    if (frame["measure"] == "score").any():
        text += " Score: 0 is the random policy, 1 the oracle."
    if most > MAX_POINTS:
        text += f" Shown are {MAX_POINTS} of {most} points; results.over_experience returns all."
    return text


def _labels(group: pd.DataFrame) -> list[str]:
    """Returns the stage, algorithm, and numbers of tasks and seeds of a group of rows."""
    first = group.iloc[0]
    actions = "" if pd.isna(first["greedy"]) else ", greedy" if first["greedy"] else ", sampled"
    seeds = int(group["seeds"].max())
    labels = [str(first["stage"]), f"{first['algorithm']}{actions}"]
    if "job" in group and pd.notna(first["job"]):
        labels.append(f"{first['job']}, change {first['change']:.0f}")
    most = max(group.to_dict("records"), key=lambda row: row["starts"])
    labels.append(_counts(most, f"{first['split']} "))
    return labels + [f"({seeds} seeds)" if seeds < FEW_SEEDS else f"{seeds} seeds"] * (seeds > 1)


def _counts(row: Mapping[Any, Any], split: str = "") -> str:
    """Returns the number of tasks of a mean, and of starts if there are more."""
    tasks = f"{row['tasks']} {split}task{'' if row['tasks'] == 1 else 's'}"
    return tasks if row["starts"] == row["tasks"] else f"{row['starts']} starts of {tasks}"


def _point(point: pd.DataFrame, measures: Sequence[str], group: pd.DataFrame) -> tuple[str, ...]:
    """Returns the cells of experience and measures; with the number of tasks if not all."""
    rows = {row["measure"]: row for row in point.to_dict("records")}
    first = next(iter(rows.values()))
    least, greatest, steps = (first[k] for k in ("experience_episodes", "to", "experience_steps"))
    episodes = f"{least:.0f}" if least == greatest else f"{least:.0f}-{greatest:.0f}"
    before = ("?", "?") if np.isnan(least) else (episodes, short(steps))
    cells = (
        _cell(rows[name], name, group["starts"].max()) if name in rows else "" for name in measures
    )
    return (*before, *cells)


def _cell(row: Mapping[Any, Any], measure: str, starts: int) -> str:
    """Returns mean and interval, over training seeds if there are several, else over starts."""
    several = row["seeds"] > 1
    low, high = (row[name if several else f"policy_{name}"] for name in ("low", "high"))
    digits = "#.4g" if measure == "return" else ".2f"
    interval = UNKNOWN if np.isnan(low) else f"[{low:{digits}}, {high:{digits}}]"
    fewer = "" if row["starts"] == starts else f" ({_counts(row)})"
    return f"{row['mean']:{digits}} {interval}{fewer}"


def _evenly_spaced(values: Sequence[int]) -> list[int]:
    """Returns at most `MAX_POINTS` of the values, including the first and the last."""
    if len(values) <= MAX_POINTS:
        return list(values)
    index = np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)
    return [values[i] for i in index]
