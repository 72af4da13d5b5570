"""Loads the tables of finished and running runs as data frames, and summarises them."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from dmrl_ray.data.lineage import Lineage
from dmrl_ray.data.lineage import run_config as run_config
from dmrl_ray.errors import ConfigError
from dmrl_ray.results.intervals import (
    DIFFERENCE_OF_PROPORTIONS,
    PROPORTION,
    Interval,
    method_interval,
    policy_interval,
)
from dmrl_ray.store.commit_records import read_committed
from dmrl_ray.store.tables import HISTORY, IN_HISTORY, read_part, schema_of

MEASURES = ("return", "score", "success")
EXPERIENCE = ("experience_episodes", "experience_steps")
_OF_POLICY = ("mean", "low", "high", "policy_low", "policy_high")
SUMMARY = (*_OF_POLICY, "by_seed", "seeds", "tasks", "starts")
"""Columns of a mean: its interval over training seeds, low and high (NaN for one seed); that of one
policy over starts, policy_low and policy_high (averaged over seeds); by_seed, the means of seeds;
the number of seeds; and the numbers of tasks and starts per seed."""

_STARTS_OF = ("run_id", "seed", "stage", "split", "algorithm", "greedy")
_IN_A_START = ("trial", "episode", "adaptation_step")

_READERS = 4


def load(path: str | Path | Iterable[str | Path], table: str = "episodes") -> pd.DataFrame:
    """Returns all committed rows of a table of one or more runs; transitions are sorted by history.

    Args:
        path: a run folder, a folder of runs, a pattern such as ``runs/*``, or a list of these; an
            existing path is not taken as a pattern.
        table: episodes, metrics, events, tasks or transitions.

    Raises:
        ValueError: there is no run, the table is unknown, a file is damaged, or the runs differ in
            the types of observations or actions of their transitions.
    """
    schema = schema_of(table)
    runs = find_runs(path)
    tables = read_committed(runs, table, lambda paths: _read_parts(paths, table))
    kinds = {field.name: field.type for part in tables[:1] for field in part.schema}
    first = pa.schema([f.with_type(kinds.get(f.name, f.type)) for f in schema]).empty_table()
    try:
        merged = pa.concat_tables([first, *tables], promote_options="default")
    except pa.ArrowException as error:
        raise ConfigError(f"these runs cannot be joined in one table: {error}") from error
    if table == "transitions":
        merged = merged.sort_by([(name, "ascending") for name in HISTORY + IN_HISTORY])
    return merged.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get, ignore_metadata=True)


def find_runs(path: str | Path | Iterable[str | Path]) -> list[Path]:
    """Returns the run folders of a path, folder of runs, pattern or list of these, each once."""
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
            raise ConfigError(f"{item}: no run found{_suggestion(item)}")
        for run in here:
            runs.setdefault(run.resolve(), run)
    if not runs:
        raise ConfigError("no run was given")
    return list(runs.values())


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _suggestion(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*") if _is_run(p)]
    close = difflib.get_close_matches(path.name, names, 1, 0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _read_parts(paths: list[Path], table: str) -> list[pa.Table]:
    if len(paths) < 4 * _READERS:
        return [read_part(path, table) for path in paths]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: read_part(path, table), paths))


def adaptation(frame: pd.DataFrame, by: Sequence[str] = ("stage",)) -> pd.DataFrame:
    """Returns the mean of each measure by adaptation step: one row per group, step and measure.

    Means are over the episodes of a start, then the starts of a seed (so a task counts as often
    as it was sampled), then over seeds, which have equal weights.

    Args:
        frame: rows of the table of episodes; without a seed they count as one policy.
        by: columns to group by, in addition to the split, the algorithm and, for streams, the job
            (an agent of the stage) and the change.

    Returns:
        The grouping columns, adaptation_step, measure (return, score, success; where known) and
        `SUMMARY`.
    """
    frame, keys = _with_groups(frame, by)
    return _summaries(frame, [*keys, "adaptation_step"])


def over_experience(
    frame: pd.DataFrame,
    x: str = "experience_episodes",
    by: Sequence[str] = ("stage",),
    *,
    points: int = 12,
) -> pd.DataFrame:
    """Returns the mean of each measure by experience on the task before the episode.

    Each amount of experience is a point. More than `points` amounts are binned: zero experience is
    the first bin, the others grow geometrically and are the same for all groups. Points are sparse
    for methods that adapt on several copies of a task in parallel. Episodes with unknown experience
    are one point, NaN.

    Args:
        frame: rows of the table of episodes.
        x: experience_episodes, or experience_steps in environment steps.
        by: columns to group by, in addition to those of `adaptation` and greedy.
        points: maximum number of points, at least 2.

    Returns:
        The grouping columns, greedy, `x` and to (least and greatest experience of the point over
        the whole frame), the mean of the other unit of experience, measure and `SUMMARY`.
    """
    if x not in EXPERIENCE:
        raise ValueError(f"x: {x!r} is not one of {', '.join(EXPERIENCE)}")
    if points < 2:
        raise ValueError(
            f"points: must be at least 2 (the first is zero experience), found {points}"
        )
    frame, groups = _with_groups(frame, by)
    point = _points(frame[x].to_numpy(float, na_value=np.nan), points)
    ends = frame.groupby(point)[x].agg(["min", "max"]).loc[point]
    joined = frame.assign(**{x: ends["min"].to_numpy(), "to": ends["max"].to_numpy()})
    keys = list(dict.fromkeys([*groups, "greedy", x, "to"]))
    (other,) = (name for name in EXPERIENCE if name != x)
    means = joined.groupby(keys, observed=True, dropna=False)[other].mean().reset_index()
    return means.merge(_summaries(joined, keys), on=keys)


def paired(frame: pd.DataFrame, a: object, b: object, by: str = "algorithm") -> pd.DataFrame:
    """Returns mean paired differences, `a` minus `b`, on shared tasks: one row per measure.

    Differences are taken per seed and start, which removes the variance between tasks. All rows of
    the frame are used: select the stage and the experience beforehand.

    Args:
        frame: rows of the table of episodes.
        a: value of the column `by`.
        b: value of the column `by`.
        by: column that distinguishes the two, such as algorithm, stage or run_id.

    Returns:
        Columns measure and `SUMMARY`, of the differences.

    Raises:
        ValueError: one of the two has no rows, or they share no task within a seed.
    """
    sides = [frame[(frame[by] == name).fillna(False).astype(bool)] for name in (a, b)]
    for name, side in zip((a, b), sides, strict=True):
        if not len(side):
            known = ", ".join(sorted(map(repr, frame[by].dropna().unique().tolist())))
            raise ValueError(f"{by}: no episode of {name!r}; there are {known or 'none'}")
    for column in ("seed", "task_id"):
        if not set(sides[0][column]) & set(sides[1][column]):
            raise ValueError(f"{a!r} and {b!r} share no {column}, so there are no pairs")
    rows = []
    for measure in MEASURES:
        first, second = (_seeds_by_starts(side, measure) for side in sides)
        difference = (first - second).dropna(how="all").dropna(axis=1, how="all")
        if difference.size:
            bounds = DIFFERENCE_OF_PROPORTIONS if measure == "success" else None
            rows.append((measure, *_summary(difference, bounds)))
    if not rows:
        raise ValueError(f"{a!r} and {b!r} share no task within a seed, so there are no pairs")
    return pd.DataFrame(rows, columns=["measure", *SUMMARY])


def starts(frame: pd.DataFrame) -> np.ndarray:
    """Returns the sample of its task that each episode belongs to: 0, 1, ... if sampled repeatedly.

    A family of few tasks may sample the same task several times, and each sample (start) counts in
    a mean. The number of parallel copies of a start is the same for all starts, so it is estimated
    as the greatest common divisor of the numbers of matching episodes. Tasks that were all sampled
    equally often are therefore counted as copies of one start, unless the agents' experience shows
    that there are no copies. In the streams of an online stage, each visit of a task is a start.

    Args:
        frame: rows of the table of episodes.

    Returns:
        (N,) integers.
    """
    policy = [name for name in _STARTS_OF if name in frame]
    matching = [*policy, "task_id", *(name for name in _IN_A_START if name in frame)]
    rows = frame.assign(number=0, start=0).reset_index(drop=True)
    if {"split", "policy_version"} <= set(frame):  # Each validation has the same starts.
        matching.append("validated")
        rows["validated"] = rows["policy_version"].where(rows["split"] == "validation")
    streams = _is_stream(rows)
    episodes = rows[~streams]
    same = episodes.groupby(matching, dropna=False, observed=True)["number"]
    episodes = episodes.assign(number=same.transform("size"), start=same.cumcount())
    for _, of_policy in episodes.groupby(policy, dropna=False, observed=True):
        numbers = of_policy["number"].to_numpy()
        copies = 1 if _has_no_copies(of_policy) else np.gcd.reduce(numbers)
        rows.loc[of_policy.index, "start"] = of_policy["start"] // copies
    if streams.any():
        visits = rows[streams].sort_values(["change", "trial"])
        order = visits.groupby(["change", "trial"]).ngroup()
        task = visits.assign(order=order).groupby([*policy, "task_id"], dropna=False, observed=True)
        rows.loc[visits.index, "start"] = task["order"].rank("dense").astype(int) - 1
    return rows["start"].to_numpy()


def _has_no_copies(rows: pd.DataFrame) -> bool:
    """Returns whether a policy has no parallel copies, so that its experience is its own episodes.

    First episodes do not show copies, which does not matter if there is a single task.
    """
    if not {"episode", "experience_episodes"} <= set(rows):
        return False
    own = (rows["episode"] == rows["experience_episodes"]).fillna(False).all()
    return bool(own and ((rows["episode"] > 0).any() or rows["task_id"].nunique() == 1))


def _is_stream(frame: pd.DataFrame) -> np.ndarray:
    if "change" not in frame:
        return np.zeros(len(frame), np.bool_)
    return frame["change"].notna().to_numpy(bool)


def _with_groups(frame: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the rows with their starts, and the grouping columns; streams also group by job."""
    frame = frame.assign(start=starts(frame))
    keys = [*by, *(["split"] if "split" in frame else []), "algorithm"]
    streams = _is_stream(frame)
    if streams.any():
        frame = frame.assign(job=frame["job"].where(streams))
        keys += ["job", "change"]
    return frame, list(dict.fromkeys(keys))


def _points(x: np.ndarray, points: int) -> np.ndarray:
    """Returns the number of the point of each amount of experience; NaN has the last."""
    unknown = np.isnan(x)
    known = np.unique(x[~unknown])
    if len(known) > points:
        least, greatest = known[known > 0][[0, -1]]
        known = np.append(0, np.geomspace(least, greatest + 1, points)[:-1])
        known[1] = least  # Exact, without the rounding of the logarithm.
    return np.where(unknown, len(known), np.searchsorted(known, x, side="right") - 1)


def _summaries(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    keys = list(dict.fromkeys(keys))
    rows = []
    for key, group in frame.groupby(keys, sort=True, observed=True, dropna=False):
        for measure in MEASURES:
            table = _seeds_by_starts(group, measure)
            if table.size:
                bounds = PROPORTION if measure == "success" else None
                rows.append((*key, measure, *_summary(table, bounds)))
    return pd.DataFrame(rows, columns=[*keys, "measure", *SUMMARY])


def _seeds_by_starts(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns means of a measure, a row per seed, a column per task and start; empty if unknown."""
    seed = frame["seed"].to_numpy() if "seed" in frame else 0
    start = frame["start"].to_numpy() if "start" in frame else starts(frame)
    value = frame[measure].to_numpy(float, na_value=np.nan)
    cells = pd.DataFrame({"seed": seed, "task_id": frame["task_id"], "start": start})
    known = cells.assign(value=value).dropna()
    means = known.groupby(["seed", "task_id", "start"], observed=True)["value"].mean()
    return means.unstack(["task_id", "start"])


def _summary(table: pd.DataFrame, bounds: Interval | None) -> tuple[object, ...]:
    """Returns the values of `SUMMARY`."""
    seeds = table.mean(axis=1)
    values = table.to_numpy(float)
    policy = np.mean([policy_interval(row, bounds) for row in values], axis=0)
    known = table.notna()
    num_starts = int(known.sum(axis=1).min())
    num_tasks = min(
        len(set(table.columns[row].get_level_values("task_id"))) for row in known.to_numpy()
    )
    means = (seeds.mean(), *method_interval(values, bounds), *policy)
    return (*means, seeds.tolist(), len(seeds), num_tasks, num_starts)


def seen_in_training(path: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Returns how many of the reported tasks the policies were trained on.

    A policy has seen the training tasks of all stages in its lineage: those of their own training,
    those in the recordings that they learned from, and those that the recorded policies were
    trained on.

    Args:
        path: runs, as in `load`.

    Returns:
        A row for each run and stage that reports on held-out tasks. Columns run_id, stage, split,
        tasks (number of distinct tasks), starts (number of samples of tasks), seen (number of tasks
        seen), complete (False if external data were learned from, so that more may have been seen),
        allowed_by (a stage with ``allow_seen``, if any).
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
            visits = stage.get("streams", 1) * stage.get("tasks_per_stream", 1)
            starts = stage.get("tasks", visits)
            if stage.get("type") == "finetune":  # Some jobs may be unfinished.
                starts = here["job"].nunique()
            trained = lineage.of(name)
            seen = {task_id for task_id, _ in trained.tasks}
            found = (split, len(tasks), max(starts, len(tasks)), len(tasks & seen))
            rows.append((lineage.run_id, name, *found, trained.complete, trained.allowed_by))
    names = ("run_id", "stage", "split", "tasks", "starts", "seen", "complete", "allowed_by")
    return pd.DataFrame(rows, columns=names)
