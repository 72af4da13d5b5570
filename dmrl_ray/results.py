"""Reading results: one tidy table over runs, also while they are going, and its statistics."""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.commits import committed_parts
from dmrl_ray.data_files import Recorded
from dmrl_ray.data_sources import DataSettings
from dmrl_ray.held_out import line_of
from dmrl_ray.tables import HISTORY, IN_HISTORY, fits, schema_of
from dmrl_ray.yaml_text import parse

_HASH = re.compile(r"_?part-\d{8}-\d{4}-([0-9a-f]{16})\.parquet")
_READERS = 4
_TRIES = 5


def load(path: str | Path | Iterable[str | Path], table: str = "episodes") -> pd.DataFrame:
    """All committed rows of a table, over one run or many; transitions history by history.

    Args:
        path: a run folder, a folder of runs, a pattern such as ``runs/*``, or a list of these.
        table: episodes, metrics, events, tasks or transitions.

    Raises:
        ValueError: no run is there, the table is unknown, a file is damaged, or the transitions of
            runs differ in the kind of their observations or actions.
    """
    schema = schema_of(table)
    runs = find_runs(path)
    for _ in range(_TRIES):
        try:
            tables = _read_parts([p for run in runs for p in committed_parts(run, table)], table)
            break
        except FileNotFoundError as error:  # Renamed since it was listed, or lost.
            missing = error.filename
    else:
        raise ValueError(f"{missing}: is missing, though a commit names it")
    kinds = {field.name: field.type for part in tables[:1] for field in part.schema}
    first = pa.schema([f.with_type(kinds.get(f.name, f.type)) for f in schema]).empty_table()
    try:
        merged = pa.concat_tables([first, *tables], promote_options="default")
    except pa.ArrowException as error:
        raise ValueError(f"these runs cannot stand in one table: {error}") from error
    if table == "transitions":
        merged = merged.sort_by([(name, "ascending") for name in HISTORY + IN_HISTORY])
    return merged.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get, ignore_metadata=True)


def find_runs(path: str | Path | Iterable[str | Path]) -> list[Path]:
    """Run folders by path, folder of runs, pattern, or a list of these; each once, in order."""
    given = [path] if isinstance(path, str | Path) else list(path)
    runs: dict[Path, None] = {}
    for item in map(Path, given):
        item = item.expanduser()
        found = [Path(p) for p in sorted(glob.glob(str(item)))] or [item]
        if len(found) == 1 and not _is_run(found[0]) and found[0].is_dir():
            found = sorted(found[0].iterdir())
        here = [p for p in found if _is_run(p)]
        if not here:
            raise ValueError(f"{item}: no run found there{_suggestion(item)}")
        runs.update(dict.fromkeys(here))
    if not runs:
        raise ValueError("no run was named")
    return list(runs)


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _suggestion(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*") if _is_run(p)]
    close = difflib.get_close_matches(path.name, names, 1, 0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _read_parts(paths: list[Path], table: str) -> list[pa.Table]:
    if len(paths) < 4 * _READERS:
        return [_read_part(path, table) for path in paths]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: _read_part(path, table), paths))


def _read_part(path: Path, table: str) -> pa.Table:
    data = path.read_bytes()
    match = _HASH.fullmatch(path.name)
    if match and not hashlib.sha256(data).hexdigest().startswith(match[1]):
        raise ValueError(f"{path}: is damaged (its checksum is not the one in its name)")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        # Before any data is touched: reading an extension type may run code.
        _check(path, file.schema_arrow, table)
        return file.read(use_threads=False).replace_schema_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def _check(path: Path, found: pa.Schema, table: str) -> None:
    schema = schema_of(table)
    for field in found:
        named = field.metadata and b"ARROW:extension:name" in field.metadata
        if named or not fits(table, field.name, field.type):
            known = field.name in schema.names
            wanted = schema.field(field.name).type if known else "a plain type"
            raise ValueError(f"{path}: column {field.name!r} is {field.type} instead of {wanted}")


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: of the middle half, a quarter cut off (rounded down) at each end.

    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice", 2021, section 4.2 (arXiv:2108.13264).
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, float), axis, -1), axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


Statistic = Callable[..., np.ndarray]
"""A function of (values, axis=...)."""


def bootstrap_interval(
    values: np.ndarray, statistic: Statistic = np.mean, reps: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic over independent values; NaNs are dropped.

    Fewer than two values have no interval: (nan, nan).
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(values))  # 32 MB at a time
    sizes = [min(step, reps - start) for start in range(0, reps, step)]
    draws = [
        statistic(values[rng.integers(len(values), size=(size, len(values)))], axis=-1)
        for size in sizes
    ]
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def adaptation(
    frame: pd.DataFrame,
    by: Sequence[str] = ("stage",),
    *,
    statistic: Statistic = np.mean,
    reps: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much better each further shot is: one row per group, algorithm and shot.

    Rows of a task are averaged first, so every task counts once, whatever its number of episodes.

    Returns:
        Columns `by`, algorithm, shot, score, low, high (95 % interval of the score over tasks),
        tasks (their number) and return.
    """
    keys = [*by, *(key for key in ("algorithm", "shot") if key not in by)]
    per_task = (
        frame.groupby([*keys, "task_id"], sort=True, observed=True)[["score", "return"]]
        .mean()
        .reset_index()
    )
    rows = []
    for key, group in per_task.groupby(keys, sort=True, observed=True):
        scores = group["score"].to_numpy(float)
        known = scores[~np.isnan(scores)]
        low, high = bootstrap_interval(known, statistic, reps, seed)
        score = float(statistic(known, axis=-1)) if len(known) else float("nan")
        total = float(statistic(group["return"].to_numpy(float), axis=-1))
        rows.append((*key, score, low, high, len(group), total))
    return pd.DataFrame(rows, columns=[*keys, "score", "low", "high", "tasks", "return"])


def seen_in_training(path: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """How many of the tasks that stages report on were trained on.

    A policy has seen the tasks of the training episodes of all stages that it goes back to, and
    those in the recordings that they learned from.

    Args:
        path: as of `load`.

    Returns:
        A row for each run and stage that reports on held-out tasks. Columns run_id, stage, split,
        tasks (how many), starts (how often one of them was drawn), seen (how many of them),
        complete (False where data of others were learned from, so that more may have been seen),
        allowed_by (the stage that says ``allow_seen``, if one does).
    """
    rows = []
    for run in find_runs(path):
        config, episodes = run_config(run), load(run)
        for name, stage in config.get("stages", {}).items():
            split = stage.get("split", "test")
            here = episodes[(episodes["stage"] == name) & (episodes["split"] == split)]
            if stage.get("type") == "pretrain" or split == "train" or not len(here):
                continue
            tasks = set(here["task_id"])
            drawn = stage.get("streams", 1) * stage.get("tasks_per_stream", 1)
            starts = stage.get("tasks", drawn)
            seen, complete, allowed_by = _trained_on(run, config, episodes, name)
            found = (split, len(tasks), max(starts, len(tasks)), len(tasks & seen))
            rows.append((here["run_id"].iloc[0], name, *found, complete, allowed_by))
    names = ("run_id", "stage", "split", "tasks", "starts", "seen", "complete", "allowed_by")
    return pd.DataFrame(rows, columns=names)


def run_config(run: Path) -> dict[str, Any]:
    """The settings of a run as they are written; empty if there are none."""
    path = run / "config.yaml"
    data = parse(str(path), path.read_text()).data if path.is_file() else None
    return data if isinstance(data, dict) else {}


def _trained_on(
    run: Path, config: dict[str, Any], episodes: pd.DataFrame, name: str
) -> tuple[set[str], bool, str]:
    """Ids of tasks, whether these are all, and which stage allowed it, for a stage's policy."""
    stages: dict[str, dict[str, Any]] = config["stages"]
    seen: set[str] = set()
    complete, allowed_by = True, ""
    for source in line_of({key: stage.get("init_from") for key, stage in stages.items()}, name):
        stage = stages[source]
        allowed_by = source if stage.get("allow_seen") else allowed_by
        complete = complete and (stage.get("init_from") or source) in stages
        if stage.get("type") == "pretrain":
            mine = (episodes["stage"] == source) & (episodes["split"] == "train")
            seen |= set(episodes.loc[mine, "task_id"])
        if stage.get("type") not in ("pretrain", "finetune"):
            continue
        algorithm = stage.get("algorithm") or config.get("algorithm")
        for data in algorithm.values() if isinstance(algorithm, dict) else ():
            if data and isinstance(data, dict) and data.keys() <= DataSettings.model_fields.keys():
                recorded = _recorded(run, data)
                seen |= recorded or set()
                complete = complete and recorded is not None
    return seen, complete, allowed_by


def _recorded(run: Path, data: dict[str, Any]) -> set[str] | None:
    """Ids of the tasks in recordings; None if they are not there or are of others."""
    if not (data.get("stage") or data.get("runs")):
        return None
    try:
        source = Recorded(data.get("runs") or (glob.escape(str(run)),), data.get("stage"))
        return {task_id for task_id, _ in source.drawn()}
    except ValueError:
        return None
