"""Steps per second of complete training: rollouts, updates and writing of results.

    python -m benchmarks.throughput                    # every row, five runs each: hours
    python -m benchmarks.throughput --rows cartpole tables --runs 3 --limit 60

Prints a JSON line for each variant of a row when its runs are done, and a table at the end. Every
run is a separate process, and the runs of a row's variants alternate. Figures: ``sps`` environment
steps per second; ``cpu_us_per_step`` CPU microseconds per step of all processes of the run, which
depends less on other load; ``cores`` busy cores on average, ``external`` cores that other programs
kept busy; ``to_target_s`` seconds of training until the mean return of the newest training episodes
reached the target, for which a run is extended up to its limit; ``compile_s`` seconds of
compilation, which ``to_target_s`` excludes; ``final_return`` that mean at the end;
``learner_waits`` fraction of time that the learner waited for rollouts; ``of_ideal`` fraction of
the rate if workers did nothing but step environments. The first fifth of the time is warm-up and
counts only for ``to_target_s``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.machine import machine
from benchmarks.throughput.measures import Figures
from benchmarks.throughput.rows import ROWS
from benchmarks.throughput.table import cost_of, summary, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, help="duration of each run; the row's own by default"
    )
    parser.add_argument("--limit", type=float, help="maximum seconds until the target is reached")
    parser.add_argument("--only", default="", help="only variants whose names contain this")
    parser.add_argument(
        "--updates", type=int, nargs="+", help="updates at which memory is measured"
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        default=[],
        help="overrides of settings, such as learners.threads=1",
    )
    options = parser.parse_args()
    given = {"seconds": options.seconds, "limit": options.limit, "memory_at": options.updates}
    changes = {name: value for name, value in given.items() if value is not None}
    lines = []
    for row in options.rows:
        variants = [name for name in ROWS[row].variants if options.only in name]
        for line in measured(row, variants, options.runs, changes, options.settings):
            lines.append(line)
            print(json.dumps(line), flush=True)
    print(f"\n{machine()}\n\n{table(lines)}")
    written = [line for line in lines if line["row"] == "tables"]
    if any(line["variant"] == "no rows" for line in written):
        costs = cost_of(written, "no rows")
        shares = ", ".join(f"{name} {share:.1%}" for name, share in costs.items())
        print(f"\nFraction of throughput lost to writing, by CPU time: {shares}")


def measured(
    name: str, variants: list[str], runs: int, changes: dict[str, object], settings: list[str]
) -> Iterator[dict[str, object]]:
    """Yields a line of figures for each variant of a row."""
    row, before = ROWS[name], machine()
    found: dict[str, list[Figures]] = {variant: [] for variant in variants}
    for _ in range(runs):
        for variant, figures in found.items():
            figures.append(one(name, variant, changes, settings))
    for variant, figures in found.items():
        yield {
            "row": name,
            "title": row.title,
            "variant": variant,
            "runs": runs,
            "figures": summary(figures),
            "each": figures,
            "machine": before,
        }


def one(row: str, variant: str, changes: dict[str, object], settings: list[str]) -> Figures:
    """Runs a variant once, in a separate process."""
    module = ["-m", "benchmarks.throughput.one"]
    answer = subprocess.run(
        [sys.executable, *module, row, variant, json.dumps(changes), *settings],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: Figures = json.loads(answer.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
