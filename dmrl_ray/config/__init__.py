"""Configs: the schema of a run, components named by import path, YAML with error locations."""

from dmrl_ray.config.components import Component, Count, Number, Settings, Size, Sizes
from dmrl_ray.config.schema import RunConfig

__all__ = ["Component", "Count", "Number", "RunConfig", "Settings", "Size", "Sizes"]
