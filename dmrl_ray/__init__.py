"""Distributed deep reinforcement learning and meta-reinforcement learning on Ray."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# `envs/` and `configs/` are at the top of the repository but imported as `dmrl_ray.envs` (a wheel
# has them inside the package). Extending `__path__` lets a checkout work without installation, as
# `ray job submit --working-dir .` needs.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "envs" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    """Imports `load` on first use: importing pandas would slow down the command line."""
    if name == "load":
        from dmrl_ray.results.reading import load

        return load
    raise AttributeError(f"module 'dmrl_ray' has no attribute {name!r}")
