"""Stay probabilities of a policy in the two-step task, which show model-based choice.

    python -m benchmarks.two_step runs/wang_two_step-seed0 runs/wang_two_step-seed1

Prints how often a choice is repeated after common and rare transitions, rewarded and unrewarded,
from the recorded steps of an evaluation. A model-based agent repeats a choice that was rewarded
after a common transition and switches if it was after a rare one; a model-free agent depends on the
reward alone (Daw et al. 2011; Wang et al. 2016, arXiv:1611.05763, fig. 5).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dmrl_ray.envs.two_step import stay_probabilities
from dmrl_ray.results.reading import load


def profile(rows: pd.DataFrame) -> np.ndarray:
    """Returns (2, 2) stay probabilities: common and rare transitions, unrewarded and rewarded.

    Args:
        rows: transitions of whole trials, all with the same number of rounds.
    """
    rows = rows.sort_values(["run_id", "environment", "trial", "t"], kind="stable")
    trials = rows.groupby(["run_id", "environment", "trial"]).ngroups

    def by_round(values: np.ndarray) -> np.ndarray:
        return values.reshape(trials, -1).T

    first, second = rows[rows["t"] % 2 == 0], rows[rows["t"] % 2 == 1]
    state = np.stack(list(second["obs"])).argmax(axis=1) - 1
    return stay_probabilities(
        by_round(first["action"].to_numpy()),
        by_round(state),
        by_round(second["reward"].to_numpy()),
    )


def effects(stays: np.ndarray) -> tuple[float, float]:
    """Returns the main effect of reward on staying, and its interaction with the transition.

    The former indicates model-free, the latter model-based behaviour.
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
        reward, interaction = effects(stays)
        print(run.name)
        for name, (unrewarded, rewarded) in zip(("common", "rare"), stays, strict=True):
            print(f"  {name:6}  stays {unrewarded:.3f} unrewarded, {rewarded:.3f} rewarded")
        print(f"  reward {reward:+.3f}, reward x transition {interaction:+.3f}")


if __name__ == "__main__":
    main()
