"""What a config leaves open is settled by the machine, told, and never overrules the config."""

import json
import os
import time

import pytest
import torch

from dmrl_ray.cluster import placement
from dmrl_ray.cluster.placement import WORTH_S, WORTH_US, place, step_us
from dmrl_ray.config.loading import load_config, parse_config
from dmrl_ray.config.paths import JOB_VARIABLE
from dmrl_ray.config.schema import resolve_auto
from dmrl_ray.control import controller
from dmrl_ray.envs.cartpole import CartPole, CartPoleVectorEnv
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import job_spec
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load


class SlowVectorEnv(CartPoleVectorEnv):
    def step(self, actions):
        time.sleep(0.02)
        return super().step(actions)


class Slow(CartPole):
    def make_vec(self, num_envs):
        return SlowVectorEnv(num_envs)


CARTPOLE = """
name: placed
tasks: {type: cartpole}
algorithm: {type: ppo, num_steps: 8}
rollout: {shards: 3, num_envs: 4}
stages: {train: {type: pretrain, env_steps: 100M, validation_tasks: 2}}
"""


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def costing(monkeypatch, us):
    monkeypatch.setattr(placement, "step_us", lambda spec: us)


def placed(*settings, address=None):
    return place(parse_config(CARTPOLE, "test", list(settings)), address)


def test_what_the_config_says_stands_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(placement, "step_us", None)
    config, why = placed("workers.num=7", "learners.threads=3")
    assert (config.workers.num, config.learners.threads, why) == (7, 3, "")


@pytest.mark.parametrize(
    ("us", "workers"), [(WORTH_US * 0.9, 0), (WORTH_US * 1.1, 3), (100 * WORTH_US, 3)]
)
def test_workers_are_for_steps_that_cost_more_than_handing_them_over(monkeypatch, us, workers):
    costing(monkeypatch, us)
    config, why = placed()
    assert config.workers.num == workers
    assert f"{us:.3g} us" in why


def test_workers_are_not_started_for_less_than_their_start(monkeypatch):
    costing(monkeypatch, 2 * WORTH_US)
    steps = WORTH_S / (2 * WORTH_US * 1e-6)
    assert placed(f"stages.train.env_steps={int(0.9 * steps)}")[0].workers.num == 0
    assert placed(f"stages.train.env_steps={int(1.1 * steps)}")[0].workers.num == 3


@pytest.mark.parametrize(
    ("settings", "cores", "workers", "threads"),
    [
        (["rollout.shards=1"], 8, 0, 2),
        (["rollout.shards=16"], 8, 7, 2),
        ([], 2, 0, 1),
        ([], 3, 2, 1),
        (["rollout.device=cpu"], 8, 0, 2),
    ],
)
def test_workers_are_bounded_by_shards_and_cores(monkeypatch, settings, cores, workers, threads):
    costing(monkeypatch, 1000.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    config, _ = placed(*settings)
    assert (config.workers.num, config.learners.threads) == (workers, threads)


def test_on_a_cluster_every_shard_has_a_worker(monkeypatch):
    monkeypatch.setattr(placement, "step_us", None)
    assert placed("rollout.shards=9", address="head:6379")[0].workers.num == 9
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert placed("rollout.shards=9")[0].workers.num == 9
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv(JOB_VARIABLE, "{}")  # a job of a cluster's
    assert placed("rollout.shards=9")[0].workers.num == 9


def test_an_address_that_says_local_is_no_cluster(monkeypatch):
    costing(monkeypatch, 1000.0)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert placed("rollout.shards=9")[0].workers.num == 3


def test_a_gpu_that_is_not_there_is_told_whoever_chose_the_workers(tmp_path, monkeypatch):
    costing(monkeypatch, 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse_config(CARTPOLE, "test", ["learners.device=cuda"])
    with pytest.raises(ConfigError, match=r"learners\.device: cuda was asked for"):
        controller.run(config, tmp_path / "run", display=Display(quiet=True))


def test_a_step_that_waits_is_measured_by_what_it_waits():
    text = CARTPOLE.replace("type: cartpole", "type: test_placement:Slow")
    cost = step_us(job_spec(parse_config(text, "test", []), "train"))
    assert 0.02e6 / 4 <= cost < 3 * 0.02e6 / 4  # one wait for four columns


def test_the_choice_is_told_kept_and_not_made_again(tmp_path):
    messages = []
    display = Display(quiet=True)
    display.message = messages.append
    settings = ["stages.train.env_steps=96"]
    folder = controller.run(
        parse_config(CARTPOLE, "test", settings), tmp_path / "run", display=display
    )
    kept = load_config(folder / "config.yaml")
    assert (kept.workers.num, kept.learners.threads) == (0, 2)
    assert messages[0].startswith("workers.num: 0, as a step of an environment costs ")
    events = load(folder, table="events")
    (detail,) = events[events["event"] == "placed"]["detail"]
    assert json.loads(detail)["message"] == messages[0]
    assert place(kept, None) == (kept, "")


def test_before_a_run_an_open_number_counts_as_one():
    assert (resolve_auto("auto"), resolve_auto(0), resolve_auto(5)) == (1, 0, 5)
