"""Steps per second of real training, rollouts, updates and writing results, end to end.

    python -m benchmarks.throughput                    # every row, five runs each: hours
    python -m benchmarks.throughput --rows cartpole tables --runs 3 --limit 60

Prints a JSON line for each variant of a row when its runs are done, and a table at the end. Every
run is a process of its own, and the runs of a row's variants take turns. Figures: ``sps``
environment steps per second; ``cpu_us_per_step`` CPU microseconds per step over the whole process
tree, which neighbours on the machine move far less; ``cores`` of them busy on average, ``external``
cores that other programs kept busy meanwhile; ``to_target_s`` seconds of training until the mean
of the newest training episodes reached the target return, for which a run goes on longer than its
seconds, up to its limit; ``compile_s`` seconds of compiling, which are not in it; ``final_return``
that mean in the end; ``learner_waits`` share of time that the learner waited for rollouts;
``of_ideal`` share of the rate at which every worker would do nothing but step environments. The
first fifth of the time is warm-up and counts for ``to_target_s`` only.
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
    parser.add_argument("--seconds", type=float, help="of each run, instead of each row's own")
    parser.add_argument("--limit", type=float, help="seconds to wait for a target, likewise")
    parser.add_argument("--only", default="", help="of the variants, those whose names hold this")
    parser.add_argument("--updates", type=int, nargs="+", help="when memory is looked at, likewise")
    parser.add_argument(
        "--settings", nargs="*", default=[], help="to change, such as learners.threads=1"
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
        print(f"\nShare of throughput that writing costs, by CPU time: {shares}")


def measured(
    name: str, variants: list[str], runs: int, changes: dict[str, object], settings: list[str]
) -> Iterator[dict[str, object]]:
    """A line of figures for each variant of a row."""
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
    """One run, in a process of its own."""
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
