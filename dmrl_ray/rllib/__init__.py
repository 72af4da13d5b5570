"""The RLlib edge: baselines, environments, policies and data across; imported on demand.

RLlib calls most of what is built on here alpha, so that its versions are checked.
"""

import ray

OLDEST, TOO_NEW = (2, 60), (3, 0)
"""Versions of Ray that this package was written for; the tests run on the oldest."""

if not OLDEST <= tuple(map(int, ray.__version__.split(".")[:2])) < TOO_NEW:
    raise ImportError(
        f"dmrl_ray.rllib needs Ray {'.'.join(map(str, OLDEST))} or newer, below "
        f"{'.'.join(map(str, TOO_NEW))}; this is Ray {ray.__version__}, try: "
        f"pip install 'ray[rllib]>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, TOO_NEW))}'"
    )

from dmrl_ray.rllib.environments import register  # noqa: E402 (the version first)

__all__ = ["register"]
