"""The online stage: what it plays, and what stands beside it."""

import numpy as np
import pytest

import dmrl_ray
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control.controller import check, run
from dmrl_ray.errors import ConfigError
from dmrl_ray.results.display import Display

FAMILIES = {
    "fixed": "{type: grid_nav, episodes: 3}",
    "one task": "{type: cartpole}",
    "varying": "{type: gym, id: CartPole-v1, episodes: 3, max_episode_steps: 30,"
    " vary: {gravity: [5, 15]}}",
}
METHODS = {
    "rl2": ("rl2", "{type: gru, hidden_size: 8}"),
    "maml": (
        "{type: maml, episodes_per_task: 2, evaluation_steps: 2}",
        "{type: mlp, hidden_sizes: [8]}",
    ),
    "ppo": ("{type: ppo, num_steps: 8}", "{type: mlp, hidden_sizes: [8]}"),
}


def played(folder, family, method, stages):
    """Episodes of a run of these stages after a short pretraining."""
    algorithm, encoder = METHODS[method]
    text = f"""
tasks: {FAMILIES[family]}
algorithm: {algorithm}
network: {{type: actor_critic, encoder: {encoder}}}
rollout: {{shards: 1, num_envs: 4}}
workers: {{num: 0}}
stages:
  meta: {{type: pretrain, env_steps: 1, validation_tasks: 1}}
"""
    text += "".join(f"  {name}: {{{stage}, init_from: meta}}\n" for name, stage in stages.items())
    run(parse_config(text, "run.yaml"), folder / "run", display=Display(quiet=True))
    return dmrl_ray.load(folder / "run"), dmrl_ray.load(folder / "run", table="metrics")


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("fixed", "rl2"),
        ("fixed", "maml"),
        ("varying", "rl2"),
        ("varying", "maml"),
        ("one task", "maml"),  # Its trials are of one episode.
    ],
)
def test_told_of_changes_is_an_evaluation_of_the_same_tasks(tmp_path, family, method):
    stages = {
        "told": "type: adapt, change: told, streams: 3, tasks_per_stream: 2, episodes_per_task: 3",
        "held_out": "type: evaluate, tasks: 6",
    }
    episodes, _ = played(tmp_path, family, method, stages)
    told, held_out = (
        episodes[(episodes["stage"] == s) & (episodes["job"] == s)] for s in ("told", "held_out")
    )
    columns = ["task_id", "episode", "adaptation_step", "return", "length", "experience_steps"]
    if method == "maml":  # Whose episodes count on, within a trial, in both.
        assert len(told) == 6 * 3 * 2
    for name in columns:
        np.testing.assert_array_equal(told[name], held_out[name], name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_agent_of_a_stream_plays_its_episodes_on_every_task(tmp_path, family, method):
    stage = "type: adapt, streams: 3, tasks_per_stream: 2, episodes_per_task: 3"
    if method == "ppo":
        stage += ", by: {type: continued, episodes: 2}"
    episodes, metrics = played(tmp_path, family, method, {"online": stage})
    online = episodes[episodes["stage"] == "online"]
    copies = 1 if method == "rl2" else 2
    for job in ("online", "online.restarted", "online.unadapted"):
        rows = online[online["job"] == job]
        groups = rows.groupby(["trial", "change", "episode"]).size()
        assert len(groups) == 3 * 2 * 3
        assert set(groups) == {copies}
        first = rows[rows["episode"] == 0]
        if family != "one task":  # There the next task is the same one, and known.
            assert (first["experience_steps"] == 0).all()
        later = rows[(rows["episode"] == 2) & (rows["change"] == 0)]
        earlier = rows[(rows["episode"] < 2) & (rows["change"] == 0)].groupby("trial")["length"]
        assert (
            later["experience_steps"].to_numpy() == earlier.sum()[later["trial"]].to_numpy()
        ).all()
    assert (online.loc[online["job"] == "online.unadapted", "adaptation_step"] == 0).all()
    assert set(metrics.loc[metrics["stage"] == "online", "policy_version"]) == {1}
    first, since = (metrics["name"] == f"reward_{x}" for x in ("first", "since_change"))
    assert first.any()
    assert since.any()


def test_what_cannot_adapt_is_refused(tmp_path):
    text = """
tasks: {type: grid_nav}
algorithm: {type: autoencoder, data: {stage: played}}
workers: {num: 0}
stages:
  played: {type: pretrain, algorithm: ppo, env_steps: 100, record: true}
  learned: {type: pretrain, env_steps: 100}
  online: {type: adapt, init_from: learned}
"""
    with pytest.raises(ConfigError, match=r"online: by: autoencoder has no adapt"):
        check(parse_config(text, "run.yaml"))
