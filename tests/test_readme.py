"""What the README says can be typed, can be typed; what it names, exists."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli
from dmrl_ray.config.loading import load_config, parse_config
from dmrl_ray.config.paths import find_config
from dmrl_ray.control import controller
from dmrl_ray.store.tables import SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

SMALLER = {
    "pretrain": {"env_steps": 1, "validation_tasks": 2},
    "finetune": {"tasks": 1, "updates": 1},
    "adapt": {"streams": 2, "tasks_per_stream": 2, "episodes_per_task": 2},
    "evaluate": {"tasks": 2},
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    """Every line of every bash block, without its comment."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def beginning(*words):
    found = [command for command in commands() if tuple(command[: len(words)]) == words]
    assert found
    return [pytest.param(command, id=" ".join(command)) for command in found]


MODULES = {re.match(r"# (\w+\.py)\n", text)[1]: text for text in blocks("python") if text[0] == "#"}
OURS = ("python", "-m", "dmrl_ray")
BENCHMARKS = ("benchmarks.learning", "benchmarks.throughput")


def smaller(arguments):
    """A run command that ends soon: one update of every stage, a few tasks, no Ray."""
    config = load_config(find_config(arguments[1]))
    less = {"workers.num": 0, "rollout.num_envs": 40}
    for name, stage in config.stages.items():
        less |= {f"stages.{name}.{key}": value for key, value in SMALLER[stage.type].items()}
    at = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    return [*arguments[:at], *(f"{key}={value}" for key, value in less.items()), *arguments[at:]]


def call(arguments):
    answer = CliRunner().invoke(cli.app, arguments)
    assert answer.exit_code == 0, answer.output
    return answer.stdout


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The command line makes the working directory importable."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in {Path(module).stem for module in MODULES} - modules:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "smoke"
    call(smaller(["run", "smoke", "--out", str(folder)]))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the README's modules and the repository's configs."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_command_is_of_a_kind_that_is_tested_below():
    kinds = {command[0] for command in commands()}
    assert kinds == {"make", "pip", "python", "ray", "export"}
    programs = {tuple(c[:3]) for c in commands() if c[0] == "python"}
    assert programs == {OURS} | {("python", "-m", name) for name in BENCHMARKS}


@pytest.mark.parametrize("command", beginning("make"))
def test_make_knows_the_target(command):
    answer = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for argument in command[2:]:
        assert argument.partition("=")[2] in answer.stdout


@pytest.mark.parametrize("command", beginning("pip"))
def test_what_pip_is_pointed_at_is_there(command):
    # Installing takes minutes and the network; the continuous integration does it.
    assert command == ["pip", "install", "-c", "constraints.txt", "-e", "."]
    assert (ROOT / "constraints.txt").is_file()
    assert (ROOT / "pyproject.toml").is_file()


@pytest.mark.parametrize("command", beginning(*OURS, "run"))
def test_a_run_runs(command, here, request):
    if "rllib" in command[4]:
        request.getfixturevalue("ray_instance")  # or it would start a smaller one
    assert "Adaptation on held-out tasks" in call(smaller(command[3:]))


@pytest.mark.parametrize("command", [p for p in beginning(*OURS) if p.values[0][3] != "run"])
def test_a_command_answers(command, here, small_run):
    shutil.copytree(small_run, here / "runs" / "smoke")
    assert call(command[3:])


def test_the_command_that_trains_for_longer_does(here, small_run):
    page = (ROOT / "docs" / "runs.md").read_text()
    (command,) = re.findall(r"^python -m dmrl_ray (.*env_steps=)\S+$", page, re.M)
    shutil.copytree(small_run, here / "runs" / "smoke")
    assert "stage 'meta' trains for 2 environment steps" in call(shlex.split(command + "2"))


@pytest.mark.parametrize("command", beginning("python", "-m", BENCHMARKS[0]))
def test_learning_is_measured(command, here, monkeypatch, capsys):
    config = find_config(command[3])
    small = [word for word in smaller(["run", str(config)])[2:] if word.count("=")]
    out = command[command.index("--out") :]
    figures = benchmark(
        f"{command[2]}.__main__", [str(config), *small, "--seeds", "0", *out], monkeypatch, capsys
    )
    assert figures["stages"]["held_out"]["tasks"] == SMALLER["evaluate"]["tasks"]


@pytest.mark.parametrize("command", beginning("python", "-m", BENCHMARKS[1]))
def test_speed_is_measured(command, here, monkeypatch, capsys):
    less = ["--only", "no Ray", "--runs", "1", "--seconds", "0.5", "--limit", "0"]
    arguments = [*command[3:], *less]
    line = benchmark(f"{command[2]}.__main__", arguments, monkeypatch, capsys)
    assert line["figures"]["sps"]["median"] > 0


def benchmark(module, arguments, monkeypatch, capsys):
    """The line of figures that a benchmark prints."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    importlib.import_module(module).main()
    lines = capsys.readouterr().out.splitlines()
    return json.loads([line for line in lines if line.startswith('{"')][-1])


@pytest.mark.parametrize("command", beginning("ray"))
def test_ray_understands_its_arguments(command, here):
    # Without machines to start there is no more to test than that the arguments are known.
    ray = pytest.importorskip("ray.scripts.scripts")
    shutil.copy(ROOT / "cluster.yaml", here)
    group, arguments = ray.cli, [word for word in command[1:] if word != "&"]
    while hasattr(group, "commands"):
        group = group.commands[arguments.pop(0)]
    context = group.make_context(group.name, arguments)
    if "entrypoint" in context.params:
        ours = list(context.params["entrypoint"])
        assert tuple(ours[:3]) == OURS
        out = str(here / "out")
        assert call(smaller([out if word == "/abs/path" else word for word in ours[3:]]))
        assert (here / "out" / "run.json").is_file()


@pytest.mark.parametrize("command", beginning("export"))
def test_the_variables_are_those_of_the_cluster_file(command):
    assert " ".join(command) in (ROOT / "cluster.yaml").read_text()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_config_loads_and_its_parts_fit(text, here):
    controller.check(parse_config(text, "README.md", ["workers.num=0"]))


@pytest.mark.parametrize("algorithm", ["reinforce:Reinforce", "maml"])
def test_the_extensions_run_and_learn(algorithm, here):
    (text,) = (text for text in blocks("yaml") if "reinforce:Reinforce" in text)
    Path("walk.yaml").write_text(text)
    changes = ["workers.num=0", "rollout.num_envs=80", "stages.held_out.tasks=32"]
    if algorithm == "maml":  # "in place of the third line"
        changes += ["algorithm={type: maml}", "stages.trained.env_steps=60k"]
    call(["run", "walk.yaml", *changes, "--out", "out"])
    import dmrl_ray

    rows = dmrl_ray.load("out")
    held_out = rows[rows["stage"] == "held_out"].groupby("adaptation_step")["return"].mean()
    training = rows[rows["stage"] == "trained"]["return"]
    if algorithm == "maml":
        assert held_out.iloc[-1] > held_out.iloc[0] + 10
    else:
        assert training.iloc[-500:].mean() > training.iloc[:500].mean()


@pytest.mark.parametrize("text", [t for t in blocks("python") if t[0] != "#"])
def test_reading_results_works(text, here, small_run):
    shutil.copytree(small_run, here / "runs" / "smoke")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr
    assert "maml" in answer.stdout


def test_the_tables_have_the_columns_that_are_named():
    rows = re.findall(r"^\| `(\w+)` \| .* \| `([\w ]+)` \|$", README, re.M)
    expected = {
        name: [c for c in schema.names if c != "run_id"] for name, schema in SCHEMAS.items()
    }
    assert {name: columns.split() for name, columns in rows} == expected


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README)
    assert len(named) > 5
    for path, name in named:
        assert f"def {name}" in (ROOT / path).read_text()


def test_the_files_are_those_of_the_repository():
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"^```text\n(dmrl_ray/\n.*?)^```", page, re.M | re.S)[1]
    here = re.findall(r"[\w*]+\.py\b", tree)
    paths = [p.relative_to(ROOT / "dmrl_ray") for p in (ROOT / "dmrl_ray").rglob("*.py")]
    many = {"algorithms", "losses", "networks", "rllib"}  # a file for each of a kind
    for path in paths:
        if path.stem != "__init__" and path.parts[0] not in many:
            assert path.name in here, f"{path} is not named"
    for known in here:
        assert known in {path.name for path in paths}, f"{known} does not exist"
    for name in re.findall(r"^([\w.]+)", tree, re.M):
        assert (ROOT / name).exists()
