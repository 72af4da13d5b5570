"""Results of runs: tables, statistics, reports and the live display."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmrl_ray.results.reading import (
        adaptation,
        load,
        over_experience,
        paired,
        run_config,
        seen_in_training,
    )

__all__ = ["adaptation", "load", "over_experience", "paired", "run_config", "seen_in_training"]


def __getattr__(name: str) -> object:
    """Imports on first use: importing pandas would slow down the start of a run."""
    if name in __all__:
        from dmrl_ray.results import reading

        return getattr(reading, name)
    raise AttributeError(f"module 'dmrl_ray.results' has no attribute {name!r}")
