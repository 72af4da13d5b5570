"""How a policy chooses in the two-step task: by the way that led to a reward, or by the reward.

    python -m benchmarks.two_step runs/wang_two_step-seed0 runs/wang_two_step-seed1

Prints how often a choice is repeated, after common and rare ways and with and without a reward,
from the recorded steps of an evaluation. A model-based agent repeats what was paid after a common
way and leaves it after a rare one, a model-free one looks at the reward alone (Daw et al. 2011;
Wang et al. 2016, arXiv:1611.05763, fig. 5).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dmrl_ray.envs.two_step import stay_probabilities
from dmrl_ray.results.reading import load


def profile(rows: pd.DataFrame) -> np.ndarray:
    """(2, 2) stay probabilities after common and rare ways (rows), unpaid and paid.

    Args:
        rows: transitions of whole trials, of as many rounds each.
    """
    rows = rows.sort_values(["run_id", "environment", "trial", "t"], kind="stable")
    trials = rows.groupby(["run_id", "environment", "trial"]).ngroups

    def by_round(values: np.ndarray) -> np.ndarray:
        return values.reshape(trials, -1).T

    chose, paid = rows[rows["t"] % 2 == 0], rows[rows["t"] % 2 == 1]
    place = np.stack(list(paid["obs"])).argmax(axis=1) - 1
    return stay_probabilities(
        by_round(chose["action"].to_numpy()),
        by_round(place),
        by_round(paid["reward"].to_numpy()),
    )


def use_of(stays: np.ndarray) -> tuple[float, float]:
    """What a reward adds to staying, and how much more of it after a common way than a rare one.

    The first is what a model-free agent shows, the second what a model-based one shows.
    """
    effect = stays[:, 1] - stays[:, 0]
    return float(effect.sum() / 2), float((effect[0] - effect[1]) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--stage", default="held_out", help="an evaluation with record: true")
    options = parser.parse_args()
    for run in options.runs:
        rows = load(run, table="transitions")
        stays = profile(rows[rows["stage"] == options.stage])
        reward, way = use_of(stays)
        print(run.name)
        for name, (unpaid, paid) in zip(("common", "rare"), stays, strict=True):
            print(f"  {name:6}  stays {unpaid:.3f} unpaid, {paid:.3f} paid")
        print(f"  reward alone {reward:+.3f}, reward by way {way:+.3f}")


if __name__ == "__main__":
    main()
