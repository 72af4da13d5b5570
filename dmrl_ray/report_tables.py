"""Tables of the report: how a policy does by the experience it has had on a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import MARKDOWN
from rich.console import RenderableType
from rich.table import Table

from dmrl_ray import results
from dmrl_ray.display import short
from dmrl_ray.statistics import FEW_SEEDS

MAX_COLUMNS = 6


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Rows under titles, as Markdown."""
    grid = Table(box=MARKDOWN)
    for title in titles:
        grid.add_column(title, no_wrap=True)
    for row in rows:
        grid.add_row(*map(str, row))
    return grid


def adaptation(episodes: pd.DataFrame) -> list[RenderableType]:
    """The table and, for what is in it, how to read it."""
    seeds = episodes["seed"].nunique() if "seed" in episodes else 1
    text = f"Intervals are over {'training seeds' if seeds > 1 else 'tasks'}."
    if episodes["score"].notna().any():
        text += " Score: 0 is random play, 1 the oracle."
    return [_adaptation_table(episodes), text]


def _adaptation_table(episodes: pd.DataFrame) -> Table:
    """A row for each point of experience of each method, all on one axis."""
    by = ("stage", "split")
    frame = results.over_experience(episodes, by=by)
    measures = [measure for measure in results.MEASURES if (frame["measure"] == measure).any()]
    rows: list[tuple[str, ...]] = []
    keys = [*by, "algorithm", "greedy"]
    for _, group in frame.groupby(keys, sort=False, observed=True, dropna=False):
        points = [point for _, point in group.groupby("experience_episodes", dropna=False)]
        lines = [_point(points[i], measures) for i in _spread(range(len(points)))]
        labels = _labels(group)
        lines += [("",) * (2 + len(measures))] * (len(labels) - len(lines))
        labels += [""] * (len(lines) - len(labels))
        rows += [(label, *line) for label, line in zip(labels, lines, strict=True)]
    titles = ("stage", "episodes", "steps", *(f"{m} [95 %]" for m in measures))
    return table(titles, rows)


def _labels(group: pd.DataFrame) -> list[str]:
    """Whose figures these are, and over how many tasks and training seeds."""
    first = group.iloc[0]
    played = "" if pd.isna(first["greedy"]) else ", greedy" if first["greedy"] else ", sampled"
    seeds = int(group["seeds"].max())
    labels = [str(first["stage"]), f"{first['algorithm']}{played}"]
    labels.append(f"{group['tasks'].max()} {first['split']} tasks")
    return labels + [f"({seeds} seeds)" if seeds < FEW_SEEDS else f"{seeds} seeds"] * (seeds > 1)


def _point(point: pd.DataFrame, measures: Sequence[str]) -> tuple[str, ...]:
    """Experience, then each measure where it is known."""
    rows = {row["measure"]: row for row in point.to_dict("records")}
    first = next(iter(rows.values()))
    least, greatest, steps = (first[k] for k in ("experience_episodes", "to", "experience_steps"))
    episodes = f"{least:.0f}" if least == greatest else f"{least:.0f}-{greatest:.0f}"
    before = ("?", "?") if np.isnan(least) else (episodes, short(steps))
    cells = (_cell(rows[name], name) if name in rows else "" for name in measures)
    return (*before, *cells)


def _cell(row: Mapping[Any, Any], measure: str) -> str:
    """Mean and interval: over training seeds where there are several, else over tasks."""
    several = row["seeds"] > 1
    low, high = (row[name if several else f"policy_{name}"] for name in ("low", "high"))
    digits = "#.4g" if measure == "return" else ".2f"
    interval = "" if np.isnan(low) else f" [{low:{digits}}, {high:{digits}}]"
    return f"{row['mean']:{digits}}{interval}"


def _spread(values: Sequence[int]) -> list[int]:
    """At most `MAX_COLUMNS` of the values, the first and the last among them."""
    if len(values) <= MAX_COLUMNS:
        return list(values)
    index = np.linspace(0, len(values) - 1, MAX_COLUMNS).round().astype(int)
    return [values[i] for i in index]
