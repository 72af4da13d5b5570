"""The command line, in particular its errors."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.errors import (
    ClusterError,
    ConfigError,
    FolderInUse,
    Interrupted,
    NumericalError,
    StorageError,
)
from dmrl_ray.store.writer import RunWriter

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


class Tasks:
    class Config(Settings):
        goals: int = 3


class Network:
    class Config(Settings):
        encoder: Component = Component(type=f"{__name__}:Tasks")


CONFIG = f"""\
tasks: {__name__}:Tasks
network: {__name__}:Network
algorithm: {__name__}:Tasks
stages:
  meta: {{type: pretrain, env_steps: 10}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a config and a run."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    RunWriter.create(tmp_path / "runs" / "fine-1", CONFIG, {}).close()
    return tmp_path


@pytest.fixture
def controller(monkeypatch):
    """Stands in for the controller, whose answer each test sets."""
    stand_in = SimpleNamespace(calls=[])
    monkeypatch.setitem(sys.modules, "dmrl_ray.control.controller", stand_in)
    monkeypatch.setattr("dmrl_ray.control.controller", stand_in, raising=False)
    return stand_in


def call(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def raises(error: BaseException):
    def answer(*_, **__):
        raise error

    return answer


def modules_after(code: str) -> list[str]:
    """What a fresh Python prints, followed by every module it has imported."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    root = Path(cli.__file__).parent.parent
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return answer.stdout.split()


def test_building_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "ray", "pandas", "pyarrow", "gymnasium", "numpy", "pydantic"}
    assert heavy.isdisjoint(modules_after("import dmrl_ray.__main__"))


def test_a_missing_config_is_reported_before_heavy_imports():
    code = "from dmrl_ray.__main__ import app\ntry: app(['config', 'none.yaml'])\n"
    exit_code, *modules = modules_after(code + "except SystemExit as end: print(end.code)")
    assert exit_code == "2"
    assert {"torch", "ray", "pandas", "pyarrow", "gymnasium"}.isdisjoint(modules)


@pytest.mark.parametrize(
    "command", ["run", "resume", "evaluate", "report", "tasks", "config", "verify", "reproduce"]
)
def test_every_command_has_help(command):
    answer = call(command, "--help")
    assert answer.exit_code == 0
    assert "--verbose" in answer.stdout


def test_a_typo_in_a_command_is_understood():
    assert "Did you mean 'resume'" in call("resum", "x").stderr


def test_an_error_in_a_config_is_reported_with_its_location_and_exit_code_2(here):
    Path("run.yaml").write_text(CONFIG.replace("env_steps", "env_stesp"))
    answer = call("run", "run.yaml")
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: the config cannot be used\nrun.yaml:5:")
    assert "did you mean 'env_steps'?" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_verbose_adds_the_traceback(here):
    assert "Traceback" in call("config", "run.yaml", "sed=1", "--verbose").stderr


def test_overrides_are_applied(here):
    answer = call("config", "run.yaml", "seed=5", "tasks.goals=9", "--resolved")
    assert answer.exit_code == 0
    config = parse_config(answer.stdout, "printed")
    assert config.seed == 5
    assert config.tasks.settings.goals == 9


VALID = """\
tasks: point_goal
algorithm: ppo
stages:
  meta: {type: pretrain, env_steps: 10}
"""


def test_a_valid_config_is_reported_as_valid(here):
    Path("run.yaml").write_text(VALID)
    assert call("config", "run.yaml").stdout == (
        "run.yaml: valid; stages: meta (pretrain)\n"
        "memory: about 2.2 MiB (rollouts 1.8, weights 0.3, tasks 0.1)\n"
    )


def test_packaged_configs_are_found_by_name(here, monkeypatch):
    (here / "package" / "configs").mkdir(parents=True)
    (here / "package" / "configs" / "quickstart.yaml").write_text(VALID)
    monkeypatch.setattr("dmrl_ray.__path__", [str(here / "package")])
    assert call("config", "quickstart").exit_code == 0
    answer = call("config", "quickstrat")
    assert answer.exit_code == 2
    assert "quickstrat: there is no such file; did you mean 'quickstart'?" in answer.stderr


def test_run_hands_the_settings_to_the_controller_and_ends_with_the_report(here, controller):
    def run(config, folder, **more):
        controller.calls.append((config.seed, folder, more["address"], more["overwrite"]))
        RunWriter.create(folder, CONFIG, {}).close()

    controller.run = run
    answer = call("run", "run.yaml", "seed=3", "name=new", "--out", "elsewhere/new", "--overwrite")
    assert answer.exit_code == 0, answer.output
    assert controller.calls == [(3, here / "elsewhere" / "new", None, True)]
    assert "python -m dmrl_ray report elsewhere/new" in answer.stdout


def test_the_folder_of_a_run_is_its_name_and_the_time(here, controller):
    controller.run = lambda config, folder, **more: RunWriter.create(folder, CONFIG, {}).close()
    assert call("run", "run.yaml", "name=new").exit_code == 0
    (folder,) = (here / "runs").glob("new*")
    assert re.fullmatch(r"new-\d{8}-\d{6}", folder.name)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("stage meta: no"), 2),
        (FolderInUse("runs/x: in use"), 3),
        (StorageError("runs/x: disk full"), 4),
        (OSError("disk full"), 4),
        (ClusterError("needs 4 CPUs"), 6),
        (NumericalError("loss is nan"), 7),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(here, controller, error, code):
    controller.run = raises(error)
    answer = call("run", "run.yaml")
    assert answer.exit_code == code
    assert answer.stderr == f"error: {error}\n"


def test_runs_of_one_second_have_folders_of_their_own(here, controller):
    controller.run = lambda config, folder, **more: RunWriter.create(folder, CONFIG, {}).close()
    for _ in range(4):
        assert call("run", "run.yaml", f"name={'n' * 64}").exit_code == 0
    assert len(list((here / "runs").glob("nnn*"))) == 4


def test_a_run_that_cannot_begin_leaves_no_folder(here, controller):
    controller.run = raises(ConfigError("no"))
    assert call("run", "run.yaml", "name=new").exit_code == 2
    assert not list((here / "runs").glob("new*"))


def test_an_output_on_a_full_disk_does_not_end_a_run(here):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dmrl_ray", "run", "smoke", "workers.num=0", "--out", "r"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV)
    assert (ended.returncode, ended.stderr.count("\n")) == (0, 1)
    assert "the display is off" in ended.stderr
    with open("/dev/full", "w") as full:
        command[3:] = ["run", "run.yaml", "seed=x"]
        assert subprocess.run(command, stdout=full, stderr=full, env=ENV).returncode == 2


def test_a_long_name_leaves_room_for_the_time(here, controller):
    controller.run = lambda config, folder, **more: RunWriter.create(folder, CONFIG, {}).close()
    assert call("run", "run.yaml", f"name={'n' * 64}").exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_shows_how_to_resume(here, controller, number, code):
    controller.resume = raises(Interrupted(number))
    answer = call("resume", "fine-1")
    assert answer.exit_code == code
    assert answer.stderr == "interrupted; resume with: python -m dmrl_ray resume runs/fine-1\n"


def test_an_interruption_before_anything_is_committed_is_130(here, controller):
    controller.run = raises(KeyboardInterrupt())
    answer = call("run", "run.yaml")
    assert answer.exit_code == 130
    assert answer.stderr == "interrupted\n"


def test_a_missing_package_is_named(here, controller):
    controller.run = raises(ModuleNotFoundError("No module named 'ray'", name="ray"))
    answer = call("run", "run.yaml")
    assert answer.exit_code == 2
    assert "error: the package 'ray' is not installed" in answer.stderr


@pytest.mark.parametrize("kind", [AssertionError, ValueError, KeyError, ArithmeticError])
def test_a_fault_of_our_own_shows_its_traceback(here, controller, kind):
    controller.run = raises(kind("broken"))
    answer = call("run", "run.yaml")
    assert answer.exit_code == 1
    assert "Traceback" in answer.stderr
    assert "please report it" in answer.stderr


def test_a_relative_folder_in_a_ray_job_is_warned_about(here, controller, monkeypatch):
    (here / "_ray_pkg_12").mkdir()
    monkeypatch.chdir(here / "_ray_pkg_12")
    controller.run = raises(ValueError("stop"))
    assert "warning: a Ray job's" in call("run", "../run.yaml").stderr
    assert "warning" not in call("run", "../run.yaml", "--out", str(here)).stderr


@pytest.mark.parametrize("name", ["fine-1", "fine", "runs/fine-1"])
def test_a_run_is_found_by_folder_name_or_beginning(here, controller, name):
    controller.resume = lambda folder, **more: controller.calls.append(folder) or folder
    assert call("resume", name).exit_code == 0
    assert controller.calls == [here / "runs" / "fine-1"]


def test_a_run_that_is_not_there_is_named(here):
    RunWriter.create(here / "runs" / "fine-2", CONFIG, {}).close()
    assert "did you mean 'fine-1'" in call("report", "fien-1").stderr
    assert "fine: matches more than one run: fine-1, fine-2" in call("report", "fine").stderr
    assert call("report", "none").exit_code == 2


def test_evaluate_prints_its_episodes_as_json(here, controller):
    frame = pd.DataFrame({"task_id": ["a"], "return": [1.5]})
    controller.evaluate = lambda folder, **more: controller.calls.append(more) or frame
    answer = call("evaluate", "fine-1", "--tasks", "8", "--json")
    assert json.loads(answer.stdout) == [{"task_id": "a", "return": 1.5}]
    expected = {"stage": None, "split": "test", "tasks": 8, "trials": 1, "checkpoint": "best"}
    assert controller.calls == [expected]


def test_evaluate_refuses_a_split_that_does_not_exist(here):
    answer = call("evaluate", "fine-1", "--split", "tset")
    assert answer.exit_code == 2
    assert "command line: --split: found 'tset'; did you mean 'test'?" in answer.stderr


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "file:///tmp/x", "hdfs://h:1/x"])
def test_a_url_is_no_folder_to_write(here, controller, url):
    controller.run = lambda *_, **__: pytest.fail("it was run")
    for command in (("run", "run.yaml", "--out", url), ("export", "fine-1", url, "--to", "rllib")):
        answer = call(*command)
        assert answer.exit_code == 2
        assert answer.stderr.startswith(
            f"error: {url.replace('//', '/').replace('//', '/')}: is a URL"
        )
        assert len(answer.stderr.splitlines()) == 1
    assert {path.name for path in here.iterdir()} == {"run.yaml", "runs"}


def test_verify_finds_a_damaged_file(here):
    with RunWriter.open(here / "runs" / "fine-1") as writer:
        writer.commit({}, {})
    assert call("verify", "fine-1").exit_code == 0
    (commit,) = (here / "runs" / "fine-1" / "commits").glob("*.json")
    commit.write_bytes(commit.read_bytes().replace(b"{", b"[", 1))
    answer = call("verify", "fine-1")
    assert answer.exit_code == 4
    assert commit.name in answer.stdout


def test_tasks_lists_the_families():
    answer = call("tasks")
    assert answer.exit_code == 0
    assert "bandit" in answer.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run quick", ["quickstart"]),
        ("run quickstart learners.th", ["learners.threads="]),
        ("run quickstart algorithm.outer=", ["algorithm.outer=clip", "algorithm.outer=trpo"]),
        ("run quickstart algorithm.type=ma", ["algorithm.type=maml"]),
        ("run quickstart stages.online.change=t", ["stages.online.change=told"]),
        ("report fi", ["fine-1"]),
    ],
)
def test_configs_runs_settings_and_their_values_are_completed(here, typed, offered):
    shell = {
        "_DMRL_COMPLETE": "complete_bash",
        "COMP_WORDS": f"dmrl {typed}",
        "COMP_CWORD": str(len(typed.split())),
    }
    answer = CliRunner().invoke(cli.app, [], prog_name="dmrl", env=shell)
    assert answer.output.split()[: len(offered)] == offered


def test_the_version_is_shown():
    assert call("--version").output == f"dmrl_ray {cli.__version__}\n"
