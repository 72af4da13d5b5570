"""Exports recorded transitions in the format of RLlib's offline data.

The transitions table has other column names, and stores successors only where they differ from the
next row, so RLlib cannot read it directly. The exported files need no schema::

    BCConfig().offline_data(input_=[folder], dataset_num_iters_per_learner=1)
"""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.data.files import Block, Recorded
from dmrl_ray.errors import ConfigError
from dmrl_ray.store.commit_records import load_run_config, run_facts
from dmrl_ray.store.files import atomic_folder


def export_steps(run: Path, folder: Path, *, stage: str | None = None) -> int:
    """Writes the recorded steps of a run as Parquet files, and returns their number.

    Args:
        run: the run folder.
        folder: the output folder; it must not exist.
        stage: the recorded stage; None if only one was recorded.

    Raises:
        ConfigError: nothing was recorded, RLlib cannot read it, or the folder exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; choose another folder")
    run_facts(run)
    stages = load_run_config(run).stages
    recorded = [name for name, s in stages.items() if getattr(s, "record", False)]
    if stage not in recorded and (stage is not None or len(recorded) != 1):
        known = ", ".join(recorded) or "none; give a stage record: true"
        asked = f"stage {stage!r} was not recorded" if stage else "choose a stage"
        raise ConfigError(f"{run}: {asked}; recorded stages: {known}")
    try:
        source = Recorded([glob.escape(str(run))], stage or recorded[0])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with atomic_folder(folder) as temporary:
        return _write(source, temporary)


def _write(source: Recorded, folder: Path) -> int:
    """Writes a file for each block that holds steps of the stage."""
    episodes: Counter[int] = Counter()  # started, by history
    steps = 0
    following = source.read(0)
    for number in range(source.num_blocks):
        block = following
        if block.obs.dtype == np.uint8:
            raise ConfigError("images were recorded, but RLlib's reader supports vectors only")
        more = number + 1 < source.num_blocks
        following = source.read(number + 1) if more else block
        rows, names = [], []
        for history, _, _, t, _, row, length in source.pieces(number).tolist():
            episodes[history] += t == 0
            rows.append(np.arange(row, row + length))
            names += [f"{history}-{episodes[history]}"] * length
        if rows:
            table = _table(block, following.obs[0], np.concatenate(rows), names)
            pq.write_table(table, folder / f"{number:08d}.parquet", compression="zstd")
            steps += len(names)
    return steps


def _table(block: Block, next_obs: np.ndarray, rows: np.ndarray, episodes: list[str]) -> pa.Table:
    """Returns rows of a block; `next_obs` is the first observation after the block."""
    new_obs = np.concatenate([block.obs[1:], next_obs[None]])
    known = block.next_row >= 0
    new_obs[known] = block.next_obs[block.next_row[known]]
    action = block.action
    if action.ndim > 1:  # As applied by the environment.
        action = action.clip(-1.0, 1.0)
    return pa.table(
        {
            "eps_id": pa.array(episodes, pa.string()),
            "agent_id": pa.nulls(len(rows)),
            "module_id": pa.nulls(len(rows)),
            "obs": _column(block.obs[rows]),
            "actions": _column(action[rows]),
            "rewards": _column(block.reward[rows]),
            "new_obs": _column(new_obs[rows]),
            "terminateds": _column(block.terminated[rows]),
            "truncateds": _column(block.truncated[rows]),
        }
    )


def _column(x: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(x).reshape(-1))
    return flat if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
