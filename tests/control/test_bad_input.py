"""Mistakes, from the command line to the exit: one sentence, no traceback, nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dmrl_ray
from dmrl_ray import __main__ as cli
from dmrl_ray.store.commit_records import seal

ROOT = Path(__file__).resolve().parents[2]

FAMILY = """
import gymnasium as gym
import numpy as np
from dmrl_ray.envs.point_goal import PointGoal, PointGoalVectorEnv


class BrokenEnv(PointGoalVectorEnv):
    fault, steps = "", 0

    def begin(self, columns):
        if self.fault == "reset" or (self.fault == "late reset" and self.steps > 25):
            raise KeyError("no goal")
        super().begin(columns)

    def observe(self):
        obs = super().observe()
        if self.fault == "shape" or (self.fault == "late shape" and self.steps > 25):
            return obs[:, :1]
        if self.fault == "type":
            return obs.astype(np.float64)
        if self.fault == "nan" and self.steps == 30:
            obs[3, 1] = np.nan
        return obs

    def step(self, actions):
        self.steps += 1
        if self.fault == "exit" and self.steps == 30:
            raise SystemExit(3)
        if self.steps == {"step": 30, "last step": 70}.get(self.fault):
            raise ZeroDivisionError("no mass")
        if self.fault == "never ends":
            self.t[:] = 0
        obs, reward, terminated, truncated, infos = super().step(actions)
        if self.fault == "inf" and self.steps == 30:
            reward[2] = np.inf
        if self.fault == "final" and truncated.any():
            infos = {}
        if self.fault == "four":
            return obs, reward, truncated, infos
        return obs, reward, terminated, truncated, infos

    def get_state(self):
        if self.fault == "state":
            raise AttributeError("velocity")
        return super().get_state()


class Broken(PointGoal):
    family = "broken"

    class Config(PointGoal.Config):
        fault: str = ""

    def __init__(self, config):
        if config.fault == "init":
            raise TypeError("no map")
        super().__init__(config)
        if config.fault == "dict":
            self.observation_space = gym.spaces.Dict({"x": self.observation_space})
        if config.fault == "wide":
            self.action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
        if config.fault == "endless":
            del self.max_episode_steps

    def make_vec(self, num_envs):
        env = BrokenEnv(num_envs, self.config.horizon)
        env.fault = self.config.fault
        return env

    def sample(self, rng, n, split):
        if self.config.fault == "sample":
            raise IndexError("no more goals")
        return super().sample(rng, n, split)[: 1 if self.config.fault == "few" else None]

    def reference(self, task):
        if self.config.fault == "reference":
            raise FileNotFoundError("table.npz")
        return super().reference(task)
"""

GYM = """
import os
import sys

import gymnasium as gym
import numpy as np


class Line(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fault=""):
        self.fault, self.t = fault, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.fault == "late" and self.t == 15:
            raise OSError("the simulator is gone")
        if self.fault == "exit" and self.t == 15:
            sys.exit(3)
        if self.fault == "_exit" and self.t == 15:
            if child := os.fork():
                os.waitpid(child, 0)
            os._exit(0)
        if self.fault == "interrupt" and self.t == 15:
            raise KeyboardInterrupt
        x = 5.0 if self.fault == "outside" else 0.0
        return np.array([x], np.float32), 1.0, False, False, {}


if "Line-v0" not in gym.registry:
    gym.register("Line-v0", entry_point="lines:Line")
"""

CONFIG = """\
tasks: {type: family:Broken, horizon: 20}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 20, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 8}
workers: {num: 0}
commit: {every_updates: 1}
stages:
  train: {type: pretrain, env_steps: 640, validation_tasks: 4, validate_every: 100}
  held_out: {type: evaluate, init_from: train, tasks: 4}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with a config and the modules it names."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    Path("family.py").write_text(FAMILY)
    Path("lines.py").write_text(GYM)
    Path("run.yaml").write_text(CONFIG)
    yield tmp_path
    for name in ("family", "lines"):
        sys.modules.pop(name, None)


def call(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def run(*overrides, out="out"):
    return call("run", "run.yaml", *overrides, "--out", out)


OTHER_LINES = ("stage=", "play it again with: python -m dmrl_ray reproduce ")


def refused(answer, code, *parts, lines=1):
    """The answer is one sentence with these parts, in order, and this exit code."""
    error = "\n".join(x for x in answer.stderr.splitlines() if not x.startswith(OTHER_LINES))
    assert answer.exit_code == code, answer.output
    assert "Traceback" not in answer.output
    assert error.startswith("error: ")
    assert lines is None or len(error.splitlines()) == lines, error
    assert re.search(".*".join(map(re.escape, parts)), error, re.S), error


def begun():
    return Path("out").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("sed: 1", ["run.yaml:10:1: sed: unknown setting; did you mean 'seed'?"]),
        ("seed: one", ["run.yaml:10:1: seed: must be a whole number, found 'one'"]),
        ("seed: -1", ["run.yaml:10:1: seed: must be at least 0, found -1"]),
        ("learners: 2", ["run.yaml:10:1: learners: must be a section of settings, found 2"]),
    ],
)
def test_a_setting_that_cannot_be_is_told_with_its_place(line, parts):
    Path("run.yaml").write_text(CONFIG + line + "\n")
    refused(run(), 2, "the config cannot be used", *parts, lines=4)
    assert not begun()


def test_all_mistakes_of_a_config_are_told_at_once():
    text = CONFIG.replace("env_steps", "env_stesp").replace("num: 0", "num: zero")
    Path("run.yaml").write_text(text.replace("type: mlp", "type: mpl"))
    answer = run("tasks.horizon=0")
    places = ["network.encoder.type", "workers.num", "stages.train.env_stesp"]
    places += ["stages.train.env_steps: this setting is required"]
    refused(answer, 2, *places[:2], lines=1 + 4 * 3 + 2)
    for place in places:
        assert re.search(rf"^run\.yaml:\d+:\d+: {re.escape(place)}", answer.stderr, re.M)
    assert "command line: tasks.horizon: must be at least 1, found 0" in answer.stderr


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("tasks.type=point_gaol", ["unknown type 'point_gaol'; did you mean 'point_goal'?"]),
        ("algorithm={type: mmal}", ["unknown type 'mmal'; did you mean 'maml'?"]),
        ("network.encoder={type: lsmt}", ["unknown type 'lsmt'; did you mean 'lstm'?"]),
        ("algorithm={type: cnn}", ["'cnn' is a choice for 'encoder', not here"]),
        ("tasks=famly:Broken", ["there is no module 'famly'", "working directory"]),
        ("tasks=family:Brokn", ["has no class 'Brokn'; did you mean 'Broken'?"]),
    ],
)
def test_a_name_that_is_unknown_is_told_with_a_known_one(change, parts):
    refused(run(change), 2, "command line: ", *parts, lines=3)
    assert not begun()


MANY_PULLS = "tasks={type: bandit, pulls: 100000}"
FINE_TUNED = "stages.fine={{type: finetune, init_from: train, {}}}"
ADAPTED = "stages.met={{type: adapt, init_from: train, by: {{type: continued, {}}}}}"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            ["algorithm={type: maml, episodes_per_task: 3}"],
            ["run.yaml:4:22: rollout.num_envs: 8 environments", "use a multiple of 3"],
        ),
        (
            ["algorithm={type: cavia, episodes_per_task: 4}"],
            ["run.yaml:2:1: network.context: ", "found one of width 0"],
        ),
        (
            ["algorithm={type: dagger}", "network.encoder=gru"],
            [
                "command line: algorithm.type: dagger learns",
                "expert_action",
                "'broken' leaves out",
            ],
        ),
        (
            ["algorithm={type: dpt}", "network.encoder=gru", "tasks=two_step"],
            ["algorithm.type: dpt learns", "best_action", "'two_step' leaves out; use another"],
        ),
        (
            ["algorithm={type: dagger}", "network.encoder=gru", MANY_PULLS],
            ["algorithm.type: ", "expert_action", "leaves out (Gittins indices are limited to"],
        ),
        (
            ["tasks={type: observe, of: {type: gym, id: CartPole-v1}}"],
            ["tasks.show: tasks of family 'gym:CartPole-v1' have no parameters", "vary"],
        ),
        (
            ["network.encoder={type: cnn}"],
            ["command line: network.encoder: a cnn needs image", "shape (2,); use an mlp"],
        ),
        (
            ["algorithm={type: rl2}", FINE_TUNED.format("algorithm: ppo")],
            ["command line: stages.fine.init_from: a policy of rl2", "use algorithm: rl2 here"],
        ),
        (
            [FINE_TUNED.format("network: {type: actor_critic}")],
            [
                "command line: stages.fine.init_from: the policy of stage 'train' does not fit",
                "(64, 2)",
            ],
        ),
        (
            [FINE_TUNED.format("trainable: [haed]")],
            [
                "command line: stages.fine.trainable: no parameter's name starts with 'haed'",
                "policy_head",
            ],
        ),
        (
            [ADAPTED.format("trainable: [haed]")],
            [
                "command line: stages.met.by.trainable: no parameter's name starts with 'haed'",
                "policy_head",
            ],
        ),
        (
            ["algorithm={type: rl2}", "network.encoder=transformer", ADAPTED.format("lr: 1")],
            ["network.encoder: gradient steps cannot adapt a transformer", "lstm"],
        ),
        (
            [
                "tasks={type: gym, id: 'lines:Line-v0', max_episode_steps: 9,"
                " kwargs: {fault: outside}}"
            ],
            ["command line: tasks.id: lines:Line-v0: at step 1", "outside its space", "widen"],
        ),
        (
            ["tasks={type: gym, id: 'lines:Line-v0'}"],
            [
                "command line: tasks.max_episode_steps: lines:Line-v0 is registered without",
                "a limit; give one",
            ],
        ),
        (["tasks.fault=dict"], ["tasks: task family 'broken': observations are Dict(", "a Box of"]),
        (
            ["tasks.fault=wide"],
            ["tasks: task family 'broken': actions are Box(-2.0, 2.0", "-1 to 1"],
        ),
        (["tasks.fault=endless"], ["tasks: Broken lacks the attribute 'max_episode_steps'"]),
        (
            ["tasks=dmrl_ray.networks.mlp:MLP"],
            [
                "tasks.type: dmrl_ray.networks.mlp:MLP is no "
                "dmrl_ray.tasks.distribution.TaskDistribution"
            ],
        ),
        (
            ["algorithm=dmrl_ray.networks.mlp:MLP"],
            ["algorithm.type: dmrl_ray.networks.mlp:MLP is no dmrl_ray.algorithms.base.Algorithm"],
        ),
        (
            ["tasks={type: gym, id: CartPole-v1, vary: {gravity: [5, 15], lenght: [0.3, 0.9]}}"],
            ["command line: tasks.vary.lenght: CartPole-v1 has no such attribute", "'length'?"],
        ),
        (["tasks={type: gym, id: CartPole-v7}"], ["command line: tasks.id: ", "v7", "v1"]),
        (
            ["tasks={type: gym, id: 'no_such_package:CartPole-v1'}"],
            ["tasks.id: no_such_package:CartPole-v1 needs a module", "install it"],
        ),
    ],
    ids=lambda value: value[-1][:70] if isinstance(value, list) else None,
)
def test_parts_that_do_not_fit_together_are_found_before_the_run_begins(changes, parts):
    answer = run(*changes)
    refused(answer, 2, *parts, lines=None)
    assert not begun()
    assert call("config", "run.yaml", *changes).stderr == answer.stderr


def test_all_that_does_not_fit_is_told_at_once_in_the_order_of_the_file():
    more = """\
  vague: {type: pretrain, env_steps: 640, algorithm: cavia}
  uneven: {type: pretrain, env_steps: 640, algorithm: {type: maml, episodes_per_task: 3}}
  fine: {type: finetune, init_from: train, trainable: [haed]}
"""
    Path("run.yaml").write_text(CONFIG.replace("family:Broken", "point_goal") + more)
    places = re.findall(r"run.yaml:(\S+) ([\w.]+):", call("config", "run.yaml").stderr)
    expected = [("2:1:", "network.context"), ("4:22:", "rollout.num_envs")]
    assert places == [*expected, ("12:44:", "stages.fine.trainable")]


def test_a_missing_extra_is_named(monkeypatch):
    import gymnasium as gym

    def make(*_, **__):
        raise gym.error.DependencyNotInstalled('Box2D: pip install "gymnasium[box2d]"')

    monkeypatch.setattr(gym, "make", make)
    answer = run("tasks={type: gym, id: LunarLander-v3}")
    parts = ["LunarLander-v3 needs an optional package", 'pip install "gymnasium[box2d]"']
    refused(answer, 2, "command line: tasks.id: ", *parts, lines=3)


def test_a_gpu_that_is_not_there_is_found_before_the_run_begins(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = run("learners.device=cuda")
    refused(answer, 2, "command line: learners.device: ", "use auto or cpu", lines=3)
    assert not begun()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("init", ["__init__ raised TypeError: no map (", "family.py, line "]),
        ("reset", ["reset raised KeyError: 'no goal' (", "family.py, line 12)"]),
        ("shape", ["reset returned observations of shape (3, 1)", "requires (3, 2)"]),
        ("type", ["reset returned observations of", "type float64", "float32"]),
        ("four", ["the return value of step is invalid", "expected 5, got 4"]),
        ("sample", ["sample raised IndexError: no more goals (", "family.py, line "]),
        ("state", ["get_state raised AttributeError: velocity (", "family.py, line "]),
    ],
)
def test_a_family_that_is_broken_from_the_start_is_found_before_the_run_begins(fault, parts):
    refused(run(f"tasks.fault={fault}"), 5, "task family 'broken': ", *parts)
    assert not begun()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("nan", ["obs of environment 3 at step ", " is nan, on task "]),
        ("inf", ["reward of environment 2 at step ", " is inf, on task "]),
        ("step", ["step raised ZeroDivisionError: no mass (", "family.py, line 30)"]),
        ("exit", ["step raised SystemExit: 3 (", "family.py, line 28)"]),
        ("late reset", ["step raised KeyError: 'no goal' (", "family.py, line 12)"]),
        ("late shape", ["the return value of step is invalid", "(8, 1) instead of (8, 2)"]),
    ],
)
def test_a_family_that_breaks_later_ends_the_run_and_loses_no_commit(fault, parts):
    refused(run(f"tasks.fault={fault}"), 5, "task family 'broken': ", *parts)
    # The fault is in the second update: the first is committed, and the fault is on record.
    assert (dmrl_ray.load("out")["policy_version"] == 0).all()
    assert len(dmrl_ray.load("out")) == 8
    events = dmrl_ray.load("out", table="events")
    (failed,) = events.loc[events["event"] == "run_failed", "detail"]
    assert "task family 'broken'" in failed
    assert call("verify", "out").exit_code == 0


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("final", ["the return value of step is invalid (KeyError: 'final_obs')"]),
        ("few", ["sample must return ", "make_tasks"]),
        ("reference", ["reference raised FileNotFoundError: table.npz (", "family.py, line "]),
        ("never ends", ["has not ended after 20 steps", "max_episode_steps, which is 20"]),
    ],
)
def test_other_breaches_of_the_contract_are_told(fault, parts):
    refused(run(f"tasks.fault={fault}"), 5, "task family 'broken': ", *parts)


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ("algorithm.lr=1e300", "update 1"),
        (FINE_TUNED.format("algorithm: {type: ppo, lr: 1e300, num_steps: 20}"), "update 1"),
        (ADAPTED.format("lr: 1e300"), "update 4 and adaptation step 1"),
    ],
    ids=["pretrain", "finetune", "adapt"],
)
def test_a_step_size_that_makes_the_policy_diverge_is_not_blamed_on_the_family(change, after):
    refused(run(change), 7, f"the policy diverged after {after}: ", "lower algorithm.lr")


def test_a_run_whose_family_was_repaired_goes_on():
    assert run("tasks.fault=step").exit_code == 5
    source = Path("family.py").read_text()
    Path("family.py").write_text(source.replace("raise ZeroDivisionError", "print"))
    sys.modules.pop("family")
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert call("resume", "out").exit_code == 0
    assert set(dmrl_ray.load("out")["stage"]) == {"train", "held_out"}


LINE = "tasks={{type: gym, id: 'lines:Line-v0', max_episode_steps: 20, kwargs: {{fault: '{}'}}}}"


def test_a_gymnasium_environment_that_never_ends_is_truncated():
    assert run(LINE.format("")).exit_code == 0
    assert set(dmrl_ray.load("out")["length"]) == {20}


def test_a_gymnasium_environment_that_raises_is_named_with_its_episode():
    parts = ["Line-v0: ", "step 15: step raised OSError: the simulator is gone"]
    refused(run(LINE.format("late")), 5, *parts)


@pytest.mark.parametrize(
    ("fault", "found"),
    [("exit", "SystemExit: 3"), ("_exit", "SystemExit: os._exit(0)"), ("interrupt", "Keyboard")],
)
def test_an_environment_that_ends_the_process_is_named_and_the_run_fails(fault, found):
    command = [sys.executable, "-m", "dmrl_ray", "run", "run.yaml", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, LINE.format(fault)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert answer.returncode == 5, answer.stderr
    parts = ["error: Line-v0: environment ", ", episode seed ", f"step 15: step raised {found}"]
    assert re.search(".*".join(map(re.escape, parts)), answer.stderr), answer.stderr
    assert "run_failed" in set(dmrl_ray.load("out", table="events")["event"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a family that is not broken."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.yaml").write_text(CONFIG.replace("family:Broken", "point_goal"))
    answer = call("run", str(folder / "run.yaml"), "--out", str(folder / "out"))
    assert answer.exit_code == 0, answer.output
    return folder / "out"


@pytest.fixture
def out(finished, here):
    return Path(shutil.copytree(finished, here / "out"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_run_is_not_overwritten(out):
    before = contents(out)
    refused(run(), 2, f"{out}: this run exists; continue it with `resume`", "--overwrite")
    assert contents(out) == before


@pytest.mark.parametrize("name", ["out", "outt"])
def test_what_is_no_run_cannot_be_resumed(name, here):
    Path("out").mkdir()
    why = "is not a run folder: it has no run.json" if name == "out" else "there is no such run"
    refused(call("resume", name), 2, f"{name}: {why}")
    assert list(Path("out").iterdir()) == []


def test_a_run_of_a_newer_version_is_left_alone(out):
    record = json.loads((out / "run.json").read_text())
    del record["sha256"]
    (out / "run.json").write_bytes(seal(record | {"format_version": 9}, indent=1))
    before = contents(out)
    answer = call("resume", "out")
    refused(answer, 2, "run.json: has format version 9", "install the version that wrote it")
    assert {p: b for p, b in contents(out).items() if p.name != "lock"} == {
        p: b for p, b in before.items() if p.name != "lock"
    }


def test_a_damaged_newest_checkpoint_is_told_and_the_run_goes_on_from_the_one_before():
    assert run("tasks.fault=last step").exit_code == 5  # in the middle of training
    before, *_, last = sorted(Path("out/commits").glob("*.json"))[-3:]
    old, new = (json.loads(path.read_text())["files"] for path in (before, last))
    fresh = {file["path"] for file in new.values()} - {file["path"] for file in old.values()}
    damaged = Path("out", min(fresh))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    Path("family.py").write_text(FAMILY.replace("raise ZeroDivisionError", "print"))
    sys.modules.pop("family")
    answer = call("resume", "out")
    assert answer.exit_code == 0, answer.output
    assert "Traceback" not in answer.output
    assert f"{damaged.name}: its sha256 is not the committed one" in answer.output
    assert re.search(r"continuing from commit \d+", answer.output)
    events = dmrl_ray.load("out", table="events")["event"].tolist()
    assert "recovered" in events
    assert events[-1] == "run_finished"
    episodes = dmrl_ray.load("out")
    assert (episodes["split"] == "train").sum() == 640 // 20  # none lost, none doubled


def test_a_run_of_which_every_commit_is_damaged_is_told_and_kept(out):
    for commit in (out / "commits").glob("*.json"):
        commit.write_bytes(b"{")
    before = contents(out / "checkpoints")
    answer = call("resume", "out")
    refused(answer, 4, str(out))
    assert contents(out / "checkpoints") == before


@pytest.mark.parametrize("folder", ["file/out", "/proc/none/out"])
def test_a_folder_that_cannot_be_written_is_told(folder):
    Path("file").touch()
    refused(run("tasks=point_goal", out=folder), 4, folder.split("/out")[0], "cannot write")


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("trian", ["--stage: 'trian' trains no policy; did you mean 'train'?"]),
        ("held_out", ["--stage: 'held_out' trains no policy; there are: train"]),
    ],
)
def test_a_stage_that_trained_no_policy_cannot_be_evaluated(out, stage, parts):
    refused(call("evaluate", "out", "--stage", stage), 2, *parts)


def test_a_policy_that_is_not_there_yet_cannot_be_evaluated():
    assert run("tasks.fault=step").exit_code == 5
    refused(call("evaluate", "out"), 2, "has no 'best' policy yet")


def test_a_run_that_another_process_writes_is_left_to_it(out):
    code = (
        "import sys; from dmrl_ray.store.run_folder import FolderLock; from pathlib import Path\n"
    )
    code += "lock = FolderLock(Path('out')); print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(out / "commits")
        answer = call("resume", "out")
        assert contents(out / "commits") == before
        other.stdin.close()
    refused(answer, 3, f"{out}: is being written by process {other.pid}", "stop it first")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("tasks.fault=reset", "reset raised KeyError: 'no goal' ("),
        ("workers={num: 1}", "step raised ZeroDivisionError: no mass ("),
    ],
    ids=["before the run", "in a worker on Ray"],
)
def test_a_mistake_in_a_real_process_is_one_sentence_too(change, sentence):
    command = [sys.executable, "-m", "dmrl_ray", "run", "run.yaml", "tasks.fault=step", change]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 5
    lines = [x for x in answer.stderr.splitlines() if not x.startswith(OTHER_LINES)]
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith(f"error: task family 'broken': {sentence}")
