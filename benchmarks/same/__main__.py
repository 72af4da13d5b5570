"""Checks whether two checkouts give bitwise identical runs on this machine.

    python -m benchmarks.same OLD NEW                  # folders or revisions; two minutes
    python -m benchmarks.same OLD NEW --only maml rl2
    python -m benchmarks.same OLD NEW --all            # also Ray, resuming and gymnasium

One small config for each algorithm has all stages that the algorithm supports. Both checkouts run
them in parallel, each in its own process, and every array of every checkpoint (weights, optimisers,
replays, random states) and every column of every table is compared, except times and names of runs.
Differences are listed with their size. `side.py` maps settings, columns and weights that were
renamed. Results are not stored, as the last bits differ between processors. Exits with 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.same.cases import CASES, GYM_CASES, RAY_CASES
from benchmarks.same.differences import Found, compare

SIDE = Path(__file__).with_name("side.py").resolve()
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Plan = dict[str, dict[str, Any]]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", help="folder of a checkout, or a revision of this repository")
    parser.add_argument("new", help="folder or revision to compare with")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="patterns of cases, such as 'rl2*'"
    )
    parser.add_argument("--all", action="store_true", help="also Ray, resuming and gymnasium")
    options = parser.parse_args()
    cases = plan(options.all or bool(options.only))
    for name in options.only or ():
        if not fnmatch.filter(cases, name):
            parser.error(f"--only: no case {name!r}; there are: {', '.join(cases)}")
    if options.only:
        cases = {n: c for n, c in cases.items() if any(fnmatch.fnmatch(n, o) for o in options.only)}
    start = time.monotonic()
    with ExitStack() as stack:
        roots = [stack.enter_context(checkout(side)) for side in (options.old, options.new)]
        found = same(*roots, cases)
    print(found.report())
    print(f"{len(cases)} cases in {time.monotonic() - start:.0f} s")
    return 1 if found.lines else 0


def plan(everything: bool) -> Plan:
    """Returns the cases by name, with the way in which each is run."""
    cases: Plan = {name: {"config": c, "stops": False} for name, c in CASES.items()}
    if everything:
        cases |= {name: {"config": c, "stops": False} for name, c in GYM_CASES.items()}
        cases |= {f"{n}_resumed": {"config": c, "stops": True} for n, c in CASES.items()}
        for name in RAY_CASES:
            on_ray = {**CASES[name], "workers": {"num": 1}}
            cases[f"{name}_on_ray"] = {"config": on_ray, "stops": False}
    return cases


def same(old: Path, new: Path, cases: Plan) -> Found:
    """Returns the differences between two checkouts over some cases."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        folders = [Path(temporary) / side for side in ("old", "new")]
        run_both([old, new], folders, cases)
        for name in cases:
            facts = [json.loads((folder / f"{name}.json").read_text()) for folder in folders]
            if lines := list(failures(*facts)):
                found.lines[name] = lines
            if not any(fact["error"] for fact in facts):
                sides = [dict(np.load(folder / f"{name}.npz")) for folder in folders]
                compare(name, *sides, found)
    return found


def run_both(roots: list[Path], folders: list[Path], cases: Plan) -> None:
    """Runs the cases with both checkouts, in parallel."""
    plan_file = folders[0].with_name("plan.json")
    plan_file.write_text(json.dumps(cases))
    running = []
    try:
        for root, folder in zip(roots, folders, strict=True):
            folder.mkdir()
            running.append(begin(root, plan_file, folder))
        for root, process in zip(roots, running, strict=True):
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(f"{root}: the runs ended with {process.returncode}\n{errors}")
    finally:
        for process in running:
            process.kill()
            process.wait()


def begin(root: Path, plan_file: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts the runs of one side, in a new session so that Ctrl+C does not interrupt a run."""
    return subprocess.Popen(
        [sys.executable, SIDE, plan_file, folder],
        cwd=root,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def failures(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yields the stages that a side refuses, and errors."""
    sides = {"OLD": old, "NEW": new}
    for stage in dict.fromkeys([*old["refused"], *new["refused"]]):
        reasons = {
            s: facts["refused"][stage] for s, facts in sides.items() if stage in facts["refused"]
        }
        yield f"stage {stage}: refused by {' and '.join(reasons)}: {[*reasons.values()][-1]}"
    for side, facts in sides.items():
        if facts["error"]:
            yield f"{side} failed: {facts['error'].strip()}"


@contextmanager
def checkout(given: str) -> Iterator[Path]:
    """Yields the folder of a checkout; a revision is written into a temporary folder."""
    if (Path(given) / "dmrl_ray").is_dir():
        yield Path(given).resolve()
        return
    git = ["git", "-C", str(SIDE.parents[2]), "archive", "--format=tar", given]
    archive = subprocess.run(git, capture_output=True)
    if archive.returncode:
        why = archive.stderr.decode().strip()
        raise SystemExit(f"{given}: is neither a folder of a checkout nor a revision: {why}")
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder).resolve()


if __name__ == "__main__":
    sys.exit(main())
