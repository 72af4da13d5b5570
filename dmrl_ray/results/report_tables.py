"""Tables of the report: how a policy does by the experience it has had on a task."""

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
from dmrl_ray.results.statistics import FEW_SEEDS

MAX_POINTS = 6
UNKNOWN = "[?]"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Rows under titles, as Markdown."""
    grid = Table(box=MARKDOWN)
    for title in titles:
        grid.add_column(title, no_wrap=True)
    for row in rows:
        grid.add_row(*map(str, row))
    return grid


def adaptation(episodes: pd.DataFrame) -> list[RenderableType]:
    """The table and, for what is in it, how to read it: a row a point of experience of a method."""
    by = ("stage", "split")
    frame = results.over_experience(episodes, by=by)
    measures = [measure for measure in results.MEASURES if (frame["measure"] == measure).any()]
    rows: list[tuple[str, ...]] = []
    most = 0
    keys = [name for name in (*by, "algorithm", "greedy", "job", "change") if name in frame]
    for _, group in frame.groupby(keys, sort=False, observed=True, dropna=False):
        points = [point for _, point in group.groupby("experience_episodes", dropna=False)]
        most = max(most, len(points))
        lines = [_point(points[i], measures, group) for i in _spread(range(len(points)))]
        labels = _labels(group)
        lines += [("",) * (2 + len(measures))] * (len(labels) - len(lines))
        labels += [""] * (len(lines) - len(labels))
        rows += [(label, *line) for label, line in zip(labels, lines, strict=True)]
    titles = ("stage", "episodes", "steps", *(f"{m} [95 %]" for m in measures))
    return [table(titles, rows), _how_to_read(frame, rows, most)]


def _how_to_read(frame: pd.DataFrame, rows: Sequence[Sequence[str]], most: int) -> str:
    over = "training seeds" if (frame["seeds"] > 1).any() else "tasks"
    if over == "tasks" and (frame["starts"] > frame["tasks"]).any():
        over = "starts, where a task was drawn more than once, else over tasks"
    text = f"Intervals are over {over}."
    if any(UNKNOWN in cell for row in rows for cell in row):
        text += f" {UNKNOWN}: too little was played to know one."
    if (frame["measure"] == "score").any():
        text += " Score: 0 is random play, 1 the oracle."
    if most > MAX_POINTS:
        text += f" Shown are {MAX_POINTS} of {most} points; results.over_experience has all."
    return text


def _labels(group: pd.DataFrame) -> list[str]:
    """Whose figures these are, and over how many tasks and training seeds."""
    first = group.iloc[0]
    played = "" if pd.isna(first["greedy"]) else ", greedy" if first["greedy"] else ", sampled"
    seeds = int(group["seeds"].max())
    labels = [str(first["stage"]), f"{first['algorithm']}{played}"]
    if "job" in group and pd.notna(first["job"]):
        labels.append(f"{first['job']}, change {first['change']:.0f}")
    most = max(group.to_dict("records"), key=lambda row: row["starts"])
    labels.append(_played(most, f"{first['split']} "))
    return labels + [f"({seeds} seeds)" if seeds < FEW_SEEDS else f"{seeds} seeds"] * (seeds > 1)


def _played(row: Mapping[Any, Any], split: str = "") -> str:
    """Over how many tasks a figure is, and starts where these are more."""
    tasks = f"{row['tasks']} {split}task{'' if row['tasks'] == 1 else 's'}"
    return tasks if row["starts"] == row["tasks"] else f"{row['starts']} starts of {tasks}"


def _point(point: pd.DataFrame, measures: Sequence[str], group: pd.DataFrame) -> tuple[str, ...]:
    """Experience, then each measure where it is known, and of how many tasks if not of all."""
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
    """Mean and interval: over training seeds where there are several, else over starts."""
    several = row["seeds"] > 1
    low, high = (row[name if several else f"policy_{name}"] for name in ("low", "high"))
    digits = "#.4g" if measure == "return" else ".2f"
    interval = UNKNOWN if np.isnan(low) else f"[{low:{digits}}, {high:{digits}}]"
    fewer = "" if row["starts"] == starts else f" ({_played(row)})"
    return f"{row['mean']:{digits}} {interval}{fewer}"


def _spread(values: Sequence[int]) -> list[int]:
    """At most `MAX_POINTS` of the values, the first and the last among them."""
    if len(values) <= MAX_POINTS:
        return list(values)
    index = np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)
    return [values[i] for i in index]
