"""Distributed deep reinforcement learning and meta-reinforcement learning on Ray."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# `envs/` and `configs/` lie at the top of the repository but are imported as `dmrl_ray.envs`
# (in a wheel they are packaged inside). This line makes the bare checkout work too, which is
# what `ray job submit --working-dir .` runs.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "envs" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    """Import `load` on first use: pandas takes longer to import than the command line may."""
    if name == "load":
        from dmrl_ray.results.reading import load

        return load
    raise AttributeError(f"module 'dmrl_ray' has no attribute {name!r}")
