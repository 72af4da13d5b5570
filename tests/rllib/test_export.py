"""The command that exports to RLlib."""

import json

import pytest
from cases import play
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli

MORE = """
  special: {type: finetune, init_from: meta, tasks: 2, updates: 1}
  played: {type: evaluate, init_from: meta, tasks: 2, record: true}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    algorithm = "{type: ppo, num_steps: 100}"
    return play(folder, "point_goal", "{type: mlp, hidden_sizes: [8]}", algorithm, MORE)


def export(run, *arguments, code=0):
    answer = CliRunner().invoke(cli.app, ["export", str(run), *map(str, arguments)])
    assert answer.exit_code == code, answer.output
    return answer.stdout if code == 0 else answer.stderr


def policy_in(folder):
    return json.loads((folder / "dmrl_ray.json").read_text())["policy"]


def test_the_last_trained_policy_is_exported_in_one_line(run, tmp_path):
    out = tmp_path / "policy"
    assert export(run, "--to", "rllib", out) == (
        f"{out}: policy meta.best, for dmrl_ray.rllib.policies.exported('{out}')\n"
    )
    assert policy_in(out) == "meta.best"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    export(run, "--to", "rllib", tmp_path / "last", "--checkpoint", "last", "--stage", "meta")
    assert policy_in(tmp_path / "last") == "meta.last"


def test_a_policy_that_was_tuned_to_a_task_is_exported_by_its_name(run, tmp_path):
    answer = export(run, "--to", "rllib", tmp_path / "one", "--stage", "special", code=2)
    job = answer.split("there are: ")[1].split(", ")[1]
    assert job == "special.0000"
    export(run, "--to", "rllib", tmp_path / "one", "--stage", job)
    assert policy_in(tmp_path / "one") == job


def test_recorded_steps_are_exported_in_one_line(run, tmp_path):
    out = tmp_path / "steps"
    answer = export(run, "--to", "rllib-data", out)
    assert answer == f"{out}: 200 steps, for offline_data(input_=['{out}'])\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "rlib", "x"], "--to: found 'rlib'; did you mean 'rllib'?"),
        (["--to", "rllib", "x", "--stage", "mata"], "stage 'mata'; did you mean 'meta'?"),
        (["--to", "rllib-data", "x", "--stage", "meta"], "'meta' was not recorded"),
        (["--to", "rllib", "."], "exists already; choose another folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = export(run, *arguments, code=2)
    assert sentence in answer
    assert answer.startswith("error: ")
    assert answer.count("\n") == 1
    assert not list(tmp_path.iterdir())
