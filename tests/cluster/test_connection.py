"""Ray on this machine is for this machine alone, and what it needs is checked before it starts."""

import os

import pytest

from dmrl_ray.cluster.connection import connect
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.errors import ConfigError

ray = pytest.importorskip("ray")
CONFIG = RunConfig.model_validate(
    {"tasks": "bandit", "stages": {"meta": {"type": "pretrain", "env_steps": 1}}}
)


def test_all_of_ray_listens_on_the_loopback_alone(ray_instance):
    import psutil  # Comes with Ray, and is found once Ray is imported.

    ray.get(ray.remote(lambda: os.getpid()).remote())
    this = psutil.Process()
    ports = [
        connection.laddr
        for process in (this, *this.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(ports) > 4
    assert {ip.removeprefix("::ffff:") for ip, _ in ports} == {"127.0.0.1"}


def test_too_long_a_temporary_folder_is_found_before_ray_starts(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match=r"characters too long .*; set RAY_TMPDIR=/tmp"):
        connect("local", CONFIG)
