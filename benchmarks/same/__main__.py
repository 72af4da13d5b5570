"""Whether two checkouts give the same runs, bit for bit, on this machine.

    python -m benchmarks.same OLD NEW                  # folders or revisions; two minutes
    python -m benchmarks.same OLD NEW --only maml rl2
    python -m benchmarks.same OLD NEW --all            # also Ray, resuming and gymnasium

One small config for each algorithm holds all the stages that it allows. Both checkouts run them,
side by side, each in a process of its own, and every array of every checkpoint (weights,
optimisers, replays, random states) and every column of every table is compared; times and names of
runs are left out. What differs is listed with the size of the difference. Where the newer checkout
has other names for settings, columns or weights, `side.py` holds the older ones. Nothing is kept:
the last bits differ between processors. Exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
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
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", help="folder of a checkout, or a revision of this repository")
    parser.add_argument("new", help="likewise")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the cases, these")
    parser.add_argument("--all", action="store_true", help="also Ray, resuming and gymnasium")
    options = parser.parse_args()
    cases = plan(options.all or bool(options.only))
    if unknown := set(options.only or ()) - cases.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(cases)}")
    if options.only:
        cases = {name: cases[name] for name in options.only}
    start = time.monotonic()
    with ExitStack() as stack:
        roots = [stack.enter_context(checkout(side)) for side in (options.old, options.new)]
        found = same(*roots, cases)
    print(found.report())
    print(f"{len(cases)} cases in {time.monotonic() - start:.0f} s")
    return 1 if found.lines else 0


def plan(everything: bool) -> Plan:
    """The cases by name, each with how it is run."""
    cases: Plan = {name: {"config": c, "stops": False} for name, c in CASES.items()}
    if everything:
        cases |= {name: {"config": c, "stops": False} for name, c in GYM_CASES.items()}
        cases |= {f"{n}_resumed": {"config": c, "stops": True} for n, c in CASES.items()}
        for name in RAY_CASES:
            on_ray = {**CASES[name], "workers": {"num": 1}}
            cases[f"{name}_on_ray"] = {"config": on_ray, "stops": False}
    return cases


def same(old: Path, new: Path, cases: Plan) -> Found:
    """What differs between two checkouts over some cases."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        folders = [Path(temporary) / side for side in ("old", "new")]
        file = Path(temporary) / "plan.json"
        file.write_text(json.dumps(cases))
        running = [begin(root, file, f) for root, f in zip((old, new), folders, strict=True)]
        for root, process in zip((old, new), running, strict=True):
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(f"{root}: the runs ended with {process.returncode}\n{errors}")
        for name in cases:
            tell(name, *(json.loads((f / f"{name}.json").read_text()) for f in folders), found)
            with np.load(folders[0] / f"{name}.npz") as a, np.load(folders[1] / f"{name}.npz") as b:
                compare(name, dict(a), dict(b), found)
    return found


def begin(root: Path, plan_file: Path, folder: Path) -> subprocess.Popen[str]:
    """Start the runs of one side."""
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-P", SIDE, plan_file, folder],
        cwd=root,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def tell(name: str, old: dict[str, Any], new: dict[str, Any], found: Found) -> None:
    """Add stages that one side refuses, and failures."""
    lines = []
    for stage in dict.fromkeys([*old["refused"], *new["refused"]]):
        sides = [s for s, facts in (("OLD", old), ("NEW", new)) if stage in facts["refused"]]
        reason = (new if "NEW" in sides else old)["refused"][stage]
        lines.append(f"stage {stage}: refused by {' and '.join(sides)}: {reason}")
    for side, facts in (("OLD", old), ("NEW", new)):
        if facts["error"]:
            lines.append(f"{side} failed: {facts['error'].strip()}")
    if lines:
        found.lines[name] = lines


@contextmanager
def checkout(given: str) -> Iterator[Path]:
    """The folder of a checkout; a revision is checked out into a temporary one."""
    if (Path(given) / "dmrl_ray").is_dir():
        yield Path(given).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        folder = Path(temporary).resolve() / "checkout"
        git = ["git", "-C", str(SIDE.parent), "worktree"]
        add = [*git, "add", "--detach", "--quiet", str(folder), given]
        if (done := subprocess.run(add, capture_output=True, text=True)).returncode:
            raise SystemExit(f"{given}: is no checkout and no revision: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


if __name__ == "__main__":
    sys.exit(main())
