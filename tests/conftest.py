"""What tests share: one Ray instance, started by the first test that asks for it."""

import pytest


@pytest.fixture(scope="session")
def ray_instance():
    """Ray on this machine, connected to as a run does it, with room for five processes."""
    import ray

    from dmrl_ray.cluster.connection import connect
    from dmrl_ray.config.schema import RunConfig

    stage = {"type": "pretrain", "env_steps": 1}
    settings = {"workers": {"num": 4}, "learners": {"num": 2, "threads": 1}}
    config = RunConfig.model_validate({"tasks": "bandit", "stages": {"meta": stage}, **settings})
    yield connect("local", config)
    ray.shutdown()
