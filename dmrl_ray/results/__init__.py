"""What runs achieved: tables, statistics, reports, and the screen."""

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
    """Import on first use: pandas takes longer to import than a run may to start."""
    if name in __all__:
        from dmrl_ray.results import reading

        return getattr(reading, name)
    raise AttributeError(f"module 'dmrl_ray.results' has no attribute {name!r}")
