"""The report of a run as text: adaptation, training cost, and notable events.

It is made from the run's tables, so for a running or killed run it covers what is committed.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table

from dmrl_ray.config.components import SHORT_NAMES, import_class
from dmrl_ray.errors import printable
from dmrl_ray.results import reading as results
from dmrl_ray.results.display import short
from dmrl_ray.results.intervals import policy_interval
from dmrl_ray.results.report_tables import UNKNOWN, adaptation, table
from dmrl_ray.store.commit_records import run_facts, settings_changed

ADAPTATION = "Adaptation on {} tasks, by episodes and steps of the task before"
STREAM_WINDOWS = 3
TRAINING = ("pretrain", "finetune")
NOTABLE = "lost|replace|skip|recover|retr|fail|error|drift|interrupt|exten"
"""Pattern of the names of events that may matter for results."""


def text_report(run_folder: Path | str) -> str:
    """Returns the report of a run.

    Raises:
        ValueError: the folder is not a run, or a table is damaged.
    """
    folder = Path(run_folder)
    tables = {name: results.load(folder, table=name) for name in ("episodes", "metrics", "events")}
    config = results.run_config(folder)
    stages: dict[str, dict[str, Any]] = config.get("stages", {})
    parts: list[RenderableType] = [_facts(folder, config, tables.values())]
    reported = _reported(tables["episodes"], stages)
    trained_on = reported["split"] == "train"
    for kind, rows in (("held-out", reported[~trained_on]), ("training", reported[trained_on])):
        if len(rows):
            parts += [ADAPTATION.format(kind), *adaptation(rows)]
    parts += _seen(folder)
    parts += _online(tables, stages)
    columns = [table["stage"] for table in (tables["episodes"], tables["metrics"])]
    started = {stage for column in columns for stage in column.unique()}
    trained = [n for n, s in stages.items() if n in started and s.get("type") in TRAINING]
    if trained:
        parts += ["Training", _training_table(trained, tables)]
    parts += _events(tables["events"])
    if len(parts) == 1:
        parts.append("Nothing is committed yet.")
    return _rendered(parts)


def evaluation_report(episodes: pd.DataFrame) -> str:
    """Returns the adaptation table of the episodes of an evaluation."""
    tasks = episodes["task_id"].nunique()
    heading = f"{len(episodes)} episodes on {tasks} tasks"
    return _rendered([heading, *adaptation(episodes)])


def families_report() -> str:
    """Returns a table of the built-in task families."""
    titles = ("name", "domain", "observation", "actions", "episodes x steps", "description")
    rows = [(name, *_family_cells(name)) for name in SHORT_NAMES["tasks"]]
    hint = "Others are named by import path, as in  tasks: {type: my_module:MyTasks}"
    return _rendered([table(titles, rows), hint])


def next_steps(run_folder: Path) -> str:
    """Returns suggested commands after a run."""
    rows = {
        f"python -m dmrl_ray report {run_folder}": "this report again",
        f"python -m dmrl_ray evaluate {run_folder}": "more held-out tasks",
        f"python -m dmrl_ray resume {run_folder}": "continue from the last commit",
        f"dmrl_ray.load('{run_folder}')": "in Python: every episode, as a pandas frame",
    }
    width = max(map(len, rows))
    return "\n".join(["Next:", *(f"  {code:<{width}}  # {why}" for code, why in rows.items())])


def _facts(folder: Path, config: dict[str, Any], tables: Iterable[pd.DataFrame]) -> Table:
    facts = run_facts(folder)["facts"]
    grid = Table.grid(padding=(0, 2))
    grid.add_row("run", folder.name)
    for key in ("tasks", "network", "algorithm"):
        grid.add_row(key, _types(config.get(key)))
    grid.add_row("seed", str(config.get("seed", "?")))
    grid.add_row("config", str(folder / "config.yaml"))
    if changed := settings_changed(folder):
        grid.add_row("changed since", ", ".join(changed))
    for key, value in facts.items() if isinstance(facts, dict) else ():
        if key not in ("seed", "name") and value not in (None, "", {}, []):
            grid.add_row(key.replace("_", " "), _flat(value))
    if wall_s := _duration_s(tables):
        grid.add_row("duration", _seconds(wall_s))
    return grid


def _types(component: object) -> str:
    """Returns the type of a component and of those in it, as ``actor_critic (gru)``."""
    if not isinstance(component, dict):
        return str(component or "")
    inner = [_types(x) for x in component.values() if isinstance(x, dict) and "type" in x]
    return str(component.get("type", "")) + (f" ({', '.join(inner)})" if inner else "")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration_s(tables: Iterable[pd.DataFrame]) -> float:
    times = pd.concat([table["time"] for table in tables])
    return float((times.max() - times.min()).total_seconds()) if len(times) else 0.0


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} h" if hours else f"{seconds / 60:.1f} min"


def _reported(episodes: pd.DataFrame, stages: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Returns episodes of fine-tuning and evaluation stages on their reported split."""
    wanted = {
        name: stage.get("split", "test")
        for name, stage in stages.items()
        if stage.get("type") in ("finetune", "evaluate")
    }
    rows = episodes[episodes["split"] == episodes["stage"].map(wanted)]
    order = pd.CategoricalDtype([name for name in stages if name in wanted], ordered=True)
    return rows.assign(stage=rows["stage"].astype(order))


def _seen(folder: Path) -> list[RenderableType]:
    lines = []
    for row in results.seen_in_training(folder).to_dict("records"):
        share = f"{row['seen']} of {row['tasks']} ({row['stage']}: {row['starts']} starts"
        share = share if row["complete"] else f"at least {share}, also learned from external data"
        allowed = f", allow_seen in {row['allowed_by']}" if row["allowed_by"] else ""
        lines.append(f"{row['split']} tasks seen in training: {share}{allowed})")
    return ["\n".join(lines)] if lines else []


def _online(
    tables: dict[str, pd.DataFrame], stages: dict[str, dict[str, Any]]
) -> list[RenderableType]:
    """Returns tables of streams: regret if the family has an oracle, else returns."""
    parts: list[RenderableType] = []
    metrics, episodes = tables["metrics"], tables["episodes"]
    regret = metrics[metrics["name"].str.startswith("regret_")]
    over = "since the start of the task [95 % interval over streams]"
    for stage in (n for n, s in stages.items() if s.get("type") == "adapt"):
        rows, played = (table[table["stage"] == stage] for table in (regret, episodes))
        if len(rows):
            parts += [f"Regret per step of {stage}, by steps {over}", _regret_table(rows)]
        elif len(played):
            parts += [f"Return of {stage}, by episodes {over}", _stream_returns_table(played)]
    return parts


def _windows(values: pd.Series) -> tuple[list[str], list[np.ndarray]]:
    """Splits integers into a few windows; returns titles and windows."""
    windows = np.array_split(np.sort(values.unique()), min(STREAM_WINDOWS, values.nunique()))
    return [f"{w[0]}-{w[-1]}" if len(w) > 1 else str(w[0]) for w in windows], windows


def _agent(stage: object, job: object) -> str:
    return str(job).removeprefix(str(stage)).removeprefix(".") or "continuing"


def _stream_returns_table(episodes: pd.DataFrame) -> Table:
    """Returns means over windows of episodes, for the first and for later tasks of streams."""
    titles, windows = _windows(episodes["episode"])
    rows = []
    for (stage, job), group in episodes.groupby(["stage", "job"], sort=False):
        for tasks, these in (("first", group["change"] == 0), ("later", group["change"] > 0)):
            here = group[these]
            cells = [
                _interval_cell(here[here["episode"].isin(w)].groupby("trial")["return"].mean())
                for w in windows
            ]
            if any(cells):
                rows.append((stage, _agent(stage, job), tasks, *cells))
    return table(("stage", "agent", "tasks", *titles), rows)


def _interval_cell(of_streams: pd.Series) -> str:
    if not len(of_streams):
        return ""
    low, high = policy_interval(of_streams.to_numpy())
    interval = UNKNOWN if np.isnan(low) else f"[{low:#.4g}, {high:#.4g}]"
    return f"{of_streams.mean():#.4g} {interval}"


def _regret_table(regret: pd.DataFrame) -> Table:
    """Returns means over windows of steps, for the first and for later tasks of streams.

    An interval is the mean of its steps' intervals; a step that is the same in all streams has
    width 0.
    """
    titles, windows = _windows(regret["env_steps"])
    rows = []
    for (stage, job), group in regret.groupby(["stage", "job"], sort=False):
        for name, tasks in (("regret_first", "first"), ("regret_since_change", "later")):
            cells = [_regret_cell(group[group["env_steps"].isin(w)], name) for w in windows]
            if any(cells):
                rows.append((stage, _agent(stage, job), tasks, *cells))
    return table(("stage", "agent", "tasks", *titles), rows)


def _regret_cell(rows: pd.DataFrame, name: str) -> str:
    steps = rows.pivot_table("value", "env_steps", "name", dropna=False)
    if name not in steps:
        return ""
    mean = steps[name].mean()
    ends = steps.reindex(columns=[f"{name}_low", f"{name}_high"])
    if ends.isna().all(axis=None):
        return f"{mean:.3g} {UNKNOWN}"
    low, high = mean + ends.sub(steps[name], axis=0).fillna(0).mean()
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _training_table(stages: list[str], tables: dict[str, pd.DataFrame]) -> Table:
    titles = ("stage", "env steps", "updates", "steps/s", "wall time", "best validation")
    rows = []
    for stage in stages:
        here = {name: table[table["stage"] == stage] for name, table in tables.items()}
        metrics, episodes = here["metrics"], here["episodes"]
        steps = int(
            metrics.groupby("job")["env_steps"].max().sum()
            or _finished(here["events"], "env_steps")
            or episodes["length"].sum()
        )
        versions = pd.concat([table[["job", "policy_version"]] for table in (metrics, episodes)])
        updates = int(versions.groupby("job")["policy_version"].max().sum())
        wall_s = _finished(here["events"], "seconds") or _duration_s(here.values())
        speed = short(steps / wall_s) if wall_s else ""
        cells = (short(steps), updates, speed, _seconds(wall_s), _best_validation(metrics))
        rows.append((stage, *cells))
    return table(titles, rows)


def _finished(events: pd.DataFrame, name: str) -> float:
    """Returns the sum of a value reported by finished jobs; their seconds exclude interruptions.

    Of a job that was trained further after its end, the last report is complete.
    """
    finished = events[events["event"] == "job_finished"].drop_duplicates("job", keep="last")
    found = [_object(detail).get(name, 0) for detail in finished["detail"]]
    return float(sum(x for x in found if isinstance(x, int | float)))


def _object(text: str) -> dict[str, Any]:
    """Returns a JSON object; empty if the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _best_validation(metrics: pd.DataFrame) -> str:
    for measure in ("score", "return"):
        name = metrics["name"].str
        found = metrics[name.startswith("validation") & name.endswith(measure)].dropna()
        if len(found):
            best = int(found["value"].to_numpy().argmax())
            steps = short(found["env_steps"].to_numpy()[best])
            return f"{measure} {found['value'].max():.4g} at {steps} steps"
    return ""


def _events(events: pd.DataFrame) -> list[RenderableType]:
    known = events["event"].str.lower().str.contains(NOTABLE, regex=True)
    notable = events[known.fillna(False).astype(bool)]
    if not len(notable):
        return []
    rows = [
        (name, len(group), str(group["stage"].iloc[-1]), _detail(str(group["detail"].iloc[-1])))
        for name, group in notable.groupby("event", sort=False)
    ]
    return ["Notable events", table(("event", "count", "last stage", "last detail"), rows)]


def _detail(text: str) -> str:
    """Returns the detail on one line, without tracebacks, which are in the table of events."""
    try:
        detail = json.loads(text)
        if isinstance(detail, dict):
            detail.pop("traceback", None)
        flat = " ".join(_flat(detail).split())
    except (ValueError, RecursionError):
        flat = text
    return flat if len(flat) <= 80 else flat[:77] + "..."


def _family_cells(name: str) -> tuple[str, ...]:
    try:
        kind = import_class(name, "tasks")
    except ValueError as error:  # Its package is not installed.
        return ("", "", "", "", str(error))
    text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""
    about = next(iter(text.strip().splitlines()), "")
    try:
        family = kind(kind.Config())
    except ValueError:  # It has required settings, on which its spaces depend.
        return (kind.domain, "as configured", "as configured", "as configured", about)
    length = f"{family.episodes_per_trial} x {family.max_episode_steps}"
    spaces = (_space(family.observation_space), _space(family.action_space))
    return (kind.domain, *spaces, length, about)


def _space(space: Any) -> str:
    if hasattr(space, "n"):
        return f"{space.n} choices"
    return f"{'x'.join(map(str, space.shape))} {space.dtype}"


def _rendered(parts: Sequence[RenderableType]) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=240, color_system=None, markup=False, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print()
        console.print(part)
    text = "\n".join(line.rstrip() for line in printable(stream.getvalue()).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).replace("\n\n|", "\n|").strip()
