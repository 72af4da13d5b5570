"""Interoperability with RLlib: baselines, environments, policies and data; imported on demand.

It depends on RLlib APIs that are marked as alpha, so the version is checked.
"""

import ray

OLDEST, TOO_NEW = (2, 60), (3, 0)
"""Supported versions of Ray; the tests run on the oldest."""

if not OLDEST <= tuple(map(int, ray.__version__.split(".")[:2])) < TOO_NEW:
    raise ImportError(
        f"dmrl_ray.rllib needs Ray {'.'.join(map(str, OLDEST))} or newer, below "
        f"{'.'.join(map(str, TOO_NEW))}; this is Ray {ray.__version__}, try: "
        f"pip install 'ray[rllib]>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, TOO_NEW))}'"
    )

from dmrl_ray.rllib.environments import register  # noqa: E402 (after the version check)

__all__ = ["register"]
