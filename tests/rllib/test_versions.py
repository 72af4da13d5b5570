"""RLlib's alpha APIs change: an unsupported Ray is refused in one sentence before any import."""

import importlib
import sys

import pytest
import ray

from dmrl_ray.config.components import import_class


@pytest.mark.parametrize("version", ["2.9.3", "2.59.0", "3.0.0"])
def test_another_ray_is_refused_in_one_sentence(version, monkeypatch):
    monkeypatch.setattr(ray, "__version__", version)
    kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n.startswith("dmrl_ray.rllib")}
    try:
        message = rf"needs Ray 2\.60 or newer, below 3\.0; this is Ray {version}"
        with pytest.raises(ImportError, match=message) as raised:
            importlib.import_module("dmrl_ray.rllib")
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=message):
            import_class("dmrl_ray.rllib.baselines:PPO")
    finally:
        for name in [n for n in sys.modules if n.startswith("dmrl_ray.rllib")]:
            del sys.modules[name]
        sys.modules.update(kept)
