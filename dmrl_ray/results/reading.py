"""Reading results: one tidy table over runs, also while they are going, and what it shows."""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.data.lineage import Lineage
from dmrl_ray.data.lineage import run_config as run_config
from dmrl_ray.results.statistics import (
    DIFFERENCE_OF_SHARES,
    SHARE,
    Interval,
    method_interval,
    policy_interval,
)
from dmrl_ray.store.commits import read_committed
from dmrl_ray.store.tables import HISTORY, IN_HISTORY, check_columns, schema_of

MEASURES = ("return", "score", "success")
EXPERIENCE = ("experience_episodes", "experience_steps")
_OF_POLICY = ("mean", "low", "high", "policy_low", "policy_high")
SUMMARY = (*_OF_POLICY, "by_seed", "seeds", "tasks", "starts")
"""Columns of a mean: low and high over training seeds (NaN for one seed; with fewer than five, as
wide as it must be), policy_low and policy_high of one policy over starts (the mean over seeds of
its ends), by_seed the mean of each seed, the number of seeds, and of a seed's tasks and starts."""

_STARTS_OF = ("run_id", "seed", "stage", "split", "algorithm", "greedy")
_IN_A_START = ("trial", "episode", "adaptation_step")

_HASH = re.compile(r"_?part-\d{8}-\d{4}-([0-9a-f]{16})\.parquet")
_READERS = 4


def load(path: str | Path | Iterable[str | Path], table: str = "episodes") -> pd.DataFrame:
    """All committed rows of a table, over one run or many; transitions history by history.

    Args:
        path: a run folder, a folder of runs, a pattern such as ``runs/*``, or a list of these; what
            exists is no pattern.
        table: episodes, metrics, events, tasks or transitions.

    Raises:
        ValueError: no run is there, the table is unknown, a file is damaged, or the transitions of
            runs differ in the kind of their observations or actions.
    """
    schema = schema_of(table)
    runs = find_runs(path)
    tables = read_committed(runs, table, lambda paths: _read_parts(paths, table))
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
    runs: dict[Path, Path] = {}
    for item in map(Path, given):
        item = item.expanduser()
        matches = [] if item.exists() else sorted(glob.glob(str(item)))
        found = [Path(p) for p in matches] or [item]
        if len(found) == 1 and not _is_run(found[0]) and found[0].is_dir():
            found = sorted(found[0].iterdir())
        here = [p for p in found if _is_run(p)]
        if not here:
            raise ValueError(f"{item}: no run found there{_suggestion(item)}")
        for run in here:
            runs.setdefault(run.resolve(), run)
    if not runs:
        raise ValueError("no run was named")
    return list(runs.values())


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
        check_columns(path, file.schema_arrow, table)
        return file.read(use_threads=False).replace_schema_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def adaptation(frame: pd.DataFrame, by: Sequence[str] = ("stage",)) -> pd.DataFrame:
    """What each application of `adapt` brings: one row per group, step and measure.

    Episodes of a start are averaged first, so that a task counts as often as it was drawn, then
    starts of a seed: a seed is one value of its method, whatever its number of tasks.

    Args:
        frame: rows of the table of episodes; those without a seed are of one policy.
        by: columns that make groups, beside those that are always told apart: the split, the
            algorithm and, of streams, the job (an agent of the stage) and the change.

    Returns:
        Columns of groups, adaptation_step, measure (return, score, success; where known) and those
        of `SUMMARY`.
    """
    frame, keys = _told_apart(frame, by)
    return _summaries(frame, [*keys, "adaptation_step"])


def over_experience(
    frame: pd.DataFrame,
    x: str = "experience_episodes",
    by: Sequence[str] = ("stage",),
    *,
    points: int = 12,
) -> pd.DataFrame:
    """Measures against the experience on a task before the episode, all methods on one axis.

    Each amount of experience is a point; where there are more than `points` of them, no experience
    is one and the others are joined, in intervals that grow by a factor and are the same for all
    groups. A method that plays several copies of a task side by side has points far apart; episodes
    whose experience is not known are one point, NaN.

    Args:
        frame: rows of the table of episodes.
        x: experience_episodes, or experience_steps in environment steps.
        by: columns that make groups, beside those of `adaptation` and greedy (or sampled) actions.
        points: at most so many, at least 2: none, and what is more.

    Returns:
        Columns of groups, greedy, `x` and to (least and greatest experience of the point in the
        whole frame), the mean of the other measure of experience, measure and `SUMMARY`.
    """
    if x not in EXPERIENCE:
        raise ValueError(f"x: {x!r} is not one of {', '.join(EXPERIENCE)}")
    if points < 2:
        raise ValueError(f"points: {points} is not 2 or more, of which no experience is the first")
    frame, groups = _told_apart(frame, by)
    point = _points(frame[x].to_numpy(float, na_value=np.nan), points)
    ends = frame.groupby(point)[x].agg(["min", "max"]).loc[point]
    joined = frame.assign(**{x: ends["min"].to_numpy(), "to": ends["max"].to_numpy()})
    keys = list(dict.fromkeys([*groups, "greedy", x, "to"]))
    (other,) = (name for name in EXPERIENCE if name != x)
    means = joined.groupby(keys, observed=True, dropna=False)[other].mean().reset_index()
    return means.merge(_summaries(joined, keys), on=keys)


def paired(frame: pd.DataFrame, a: object, b: object, by: str = "algorithm") -> pd.DataFrame:
    """Mean differences of `a` less `b` on the tasks that both met, one row per measure.

    Differences are taken start by start within each seed that both were trained with, which removes
    what makes a task hard for everyone. All rows of the frame count: choose the stage, and the
    experience, before.

    Args:
        frame: rows of the table of episodes.
        a: value of the column `by`.
        b: value of the column `by`.
        by: column that tells one from the other, such as algorithm, stage or run_id.

    Returns:
        Columns measure and those of `SUMMARY`, of the differences.

    Raises:
        ValueError: one of them has no rows, or no seed met a task with both.
    """
    sides = [frame[(frame[by] == name).fillna(False).astype(bool)] for name in (a, b)]
    for name, side in zip((a, b), sides, strict=True):
        if not len(side):
            known = ", ".join(sorted(map(repr, frame[by].dropna().unique().tolist())))
            raise ValueError(f"{by}: no episode of {name!r}; there are {known or 'none'}")
    for column in ("seed", "task_id"):
        if not set(sides[0][column]) & set(sides[1][column]):
            raise ValueError(f"{a!r} and {b!r} share no {column}, so nothing is paired")
    rows = []
    for measure in MEASURES:
        first, second = (_seeds_by_starts(side, measure) for side in sides)
        difference = (first - second).dropna(how="all").dropna(axis=1, how="all")
        if difference.size:
            ends = DIFFERENCE_OF_SHARES if measure == "success" else None
            rows.append((measure, *_summary(difference, ends)))
    if not rows:
        raise ValueError(f"no seed met a task with {a!r} and with {b!r}, so nothing is paired")
    return pd.DataFrame(rows, columns=["measure", *SUMMARY])


def starts(frame: pd.DataFrame) -> np.ndarray:
    """Which draw of its task each episode belongs to: 0, or more where a task was drawn again.

    Draws are what a mean counts: a family of few tasks draws some of them more often than others,
    by their probabilities. Copies that play one draw side by side are as many for each, so they are
    the greatest common divisor of the numbers of episodes that are alike. So tasks that were all
    drawn equally often are taken for copies of one start, unless the experience of the agent tells
    that it has none. The streams of an online stage draw a task each time that they meet it.

    Args:
        frame: rows of the table of episodes.

    Returns:
        (N,) integers.
    """
    policy = [name for name in _STARTS_OF if name in frame]
    alike = [*policy, "task_id", *(name for name in _IN_A_START if name in frame)]
    rows = frame.assign(number=0, draw=0).reset_index(drop=True)
    if {"split", "policy_version"} <= set(frame):  # Each validation starts on the same draws.
        alike.append("validated")
        rows["validated"] = rows["policy_version"].where(rows["split"] == "validation")
    streams = _of_streams(rows)
    episodes = rows[~streams]
    same = episodes.groupby(alike, dropna=False, observed=True)["number"]
    episodes = episodes.assign(number=same.transform("size"), draw=same.cumcount())
    for _, of_policy in episodes.groupby(policy, dropna=False, observed=True):
        numbers = of_policy["number"].to_numpy()
        copies = 1 if _plays_alone(of_policy) else np.gcd.reduce(numbers)
        rows.loc[of_policy.index, "draw"] = of_policy["draw"] // copies
    if streams.any():
        met = rows[streams].sort_values(["change", "trial"])
        order = met.groupby(["change", "trial"]).ngroup()
        task = met.assign(order=order).groupby([*policy, "task_id"], dropna=False, observed=True)
        rows.loc[met.index, "draw"] = task["order"].rank("dense").astype(int) - 1
    return rows["draw"].to_numpy()


def _plays_alone(rows: pd.DataFrame) -> bool:
    """Whether a policy has no copies: its experience of a task is that of its own episodes.

    Before any experience copies share their task alone, which is no matter where there is one.
    """
    if not {"episode", "experience_episodes"} <= set(rows):
        return False
    own = (rows["episode"] == rows["experience_episodes"]).fillna(False).all()
    return bool(own and ((rows["episode"] > 0).any() or rows["task_id"].nunique() == 1))


def _of_streams(frame: pd.DataFrame) -> np.ndarray:
    if "change" not in frame:
        return np.zeros(len(frame), np.bool_)
    return frame["change"].notna().to_numpy(bool)


def _told_apart(frame: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows with their starts, and what makes groups; only of streams a job is an agent."""
    frame = frame.assign(start=starts(frame))
    keys = [*by, *(["split"] if "split" in frame else []), "algorithm"]
    streams = _of_streams(frame)
    if streams.any():
        frame = frame.assign(job=frame["job"].where(streams))
        keys += ["job", "change"]
    return frame, list(dict.fromkeys(keys))


def _points(x: np.ndarray, points: int) -> np.ndarray:
    """For each amount of experience, the number of its point; NaN has the last."""
    unknown = np.isnan(x)
    known = np.unique(x[~unknown])
    if len(known) > points:
        least, greatest = known[known > 0][[0, -1]]
        known = np.append(0, np.geomspace(least, greatest + 1, points)[:-1])
        known[1] = least  # As it is, not as rounded by the logarithm.
    return np.where(unknown, len(known), np.searchsorted(known, x, side="right") - 1)


def _summaries(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    keys = list(dict.fromkeys(keys))
    rows = []
    for key, group in frame.groupby(keys, sort=True, observed=True, dropna=False):
        for measure in MEASURES:
            table = _seeds_by_starts(group, measure)
            if table.size:
                ends = SHARE if measure == "success" else None
                rows.append((*key, measure, *_summary(table, ends)))
    return pd.DataFrame(rows, columns=[*keys, "measure", *SUMMARY])


def _seeds_by_starts(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Mean of a measure, a row per seed and a column per task and start; empty if not known."""
    seed = frame["seed"].to_numpy() if "seed" in frame else 0
    start = frame["start"].to_numpy() if "start" in frame else starts(frame)
    value = frame[measure].to_numpy(float, na_value=np.nan)
    cells = pd.DataFrame({"seed": seed, "task_id": frame["task_id"], "start": start})
    known = cells.assign(value=value).dropna()
    means = known.groupby(["seed", "task_id", "start"], observed=True)["value"].mean()
    return means.unstack(["task_id", "start"])


def _summary(table: pd.DataFrame, ends: Interval | None) -> tuple[object, ...]:
    """The cells of `SUMMARY`."""
    seeds = table.mean(axis=1)
    values = table.to_numpy(float)
    policy = np.mean([policy_interval(row, ends) for row in values], axis=0)
    known = table.notna()
    num_starts = int(known.sum(axis=1).min())
    num_tasks = min(
        len(set(table.columns[row].get_level_values("task_id"))) for row in known.to_numpy()
    )
    means = (seeds.mean(), *method_interval(values, ends), *policy)
    return (*means, seeds.tolist(), len(seeds), num_tasks, num_starts)


def seen_in_training(path: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """How many of the tasks that stages report on were trained on.

    A policy has seen the tasks that all stages that it goes back to were trained on: those played
    in training, those in the recordings that they learned from, and those that the recorded
    policies were trained on.

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
        config, episodes, lineage = run_config(run), load(run), Lineage(run)
        for name, stage in config.get("stages", {}).items():
            split = stage.get("split", "test")
            here = episodes[(episodes["stage"] == name) & (episodes["split"] == split)]
            if stage.get("type") == "pretrain" or split == "train" or not len(here):
                continue
            tasks = set(here["task_id"])
            drawn = stage.get("streams", 1) * stage.get("tasks_per_stream", 1)
            starts = stage.get("tasks", drawn)
            if stage.get("type") == "finetune":  # Of which some jobs may be open.
                starts = here["job"].nunique()
            trained = lineage.of(name)
            seen = {task_id for task_id, _ in trained.tasks}
            found = (split, len(tasks), max(starts, len(tasks)), len(tasks & seen))
            marks = (trained.complete, trained.allowed_by)
            rows.append((lineage.run_id, name, *found, *marks))
    names = ("run_id", "stage", "split", "tasks", "starts", "seen", "complete", "allowed_by")
    return pd.DataFrame(rows, columns=names)
