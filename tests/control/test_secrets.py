"""Secrets of the environment of a process are in nothing that a run writes."""

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display

TEXT = """
tasks: bandit
algorithm: {type: ppo, num_steps: 8}
workers: {num: 0}
rollout: {shards: 1, num_envs: 2}
stages: {train: {type: pretrain, env_steps: 16, validation_tasks: 1}}
"""
NAMES = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD")


def test_a_run_writes_no_secret_of_its_environment(tmp_path, monkeypatch, caplog, capsys):
    for name in NAMES:
        monkeypatch.setenv(name, f"canary-{name}")
    caplog.set_level("DEBUG")
    folder = controller.run(parse_config(TEXT, "run.yaml"), tmp_path / "run", display=Display())
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert not [data for data in files if b"canary-" in data]
    assert "canary-" not in caplog.text + "".join(capsys.readouterr())
