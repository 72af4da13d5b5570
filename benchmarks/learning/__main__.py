"""Results of a config on held-out tasks, over several seeds.

    python -m benchmarks.learning configs/bandit_n10_rl2.yaml --seeds 0 1 2 --out results

Trains each seed into ``OUT/NAME-seedN`` (an existing run is resumed if it is not done) and prints
one JSON line, which ``--save`` stores for the table of all results, with the return of every
episode as Parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.learning.figures import figures, write_episodes
from benchmarks.learning.table import RESULTS, write_table


def train(config: str, seed: int, folder: Path, settings: Sequence[str], threads: int) -> None:
    """Runs one seed to the end, in a separate process."""
    command = [sys.executable, "-m", "dmrl_ray", "run", config, f"seed={seed}", *settings]
    environment = dict(os.environ)
    if threads:
        command += ["workers.num=0", f"learners.threads={threads}"]
        environment["OMP_NUM_THREADS"] = str(threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        subprocess.run(
            [*command, "--resume", "--out", str(folder)],
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", help="overrides of settings, such as workers.num=0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument(
        "--parallel", type=int, default=1, help="number of seeds trained in parallel"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="train each seed in one process with this many, no Ray",
    )
    parser.add_argument(
        "--save", action="store_true", help="store the line in benchmarks/results, update the table"
    )
    options = parser.parse_intermixed_args()
    name = Path(options.config).stem
    folders = [options.out / f"{name}-seed{seed}" for seed in options.seeds]

    def run(seed: int, folder: Path) -> None:
        train(options.config, seed, folder, options.settings, options.threads)

    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(run, options.seeds, folders))
    line = json.dumps({"config": name, "seeds": options.seeds} | figures(folders))
    print(line)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(line + "\n")
        write_episodes(folders, RESULTS / f"{name}.parquet")
        write_table()


if __name__ == "__main__":
    main()
