"""Commands that read a run change nothing in it, hold no lock and follow no link out of it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dmrl_ray
from dmrl_ray import __main__ as cli
from dmrl_ray.errors import CorruptRun
from dmrl_ray.store.commit_records import seal
from dmrl_ray.store.run_folder import FolderLock
from tests.guarded import unchanged

CONFIG = """\
tasks: {type: point_goal}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [4]}}
algorithm: {type: ppo, num_steps: 20}
rollout: {shards: 1, num_envs: 4}
workers: {num: 0}
stages:
  train: {type: pretrain, env_steps: 160, validation_tasks: 4}
  held_out: {type: evaluate, init_from: train, tasks: 4, record: true}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.yaml").write_text(CONFIG)
    answer = call("run", folder / "run.yaml", "--out", folder / "out")
    assert answer.exit_code == 0, answer.output
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(answer, code, *parts):
    assert answer.exit_code == code, answer.output
    assert "Traceback" not in answer.output
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) == 1
    for part in parts:
        assert part in answer.stderr


READERS = {
    "report": ("report",),
    "evaluate": ("evaluate", "--tasks", "4"),
    "verify": ("verify",),
    "policy": ("export", "--to", "rllib"),
    "data": ("export", "--to", "rllib-data"),
}


def read(run, name, tmp_path):
    command, *options = READERS[name]
    out = [tmp_path / "exported"] if command == "export" else []
    return call(command, run, *out, *options)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_changes_nothing_in_a_run_that_another_process_writes(run, name, tmp_path):
    lock = FolderLock(run)
    with unchanged(run):
        answer = read(run, name, tmp_path)
    lock.release()
    assert answer.exit_code == 0, answer.output


def test_load_changes_nothing(run):
    with unchanged(run):
        for table in ("episodes", "metrics", "events", "tasks", "transitions"):
            dmrl_ray.load(run, table)


def test_load_report_and_verify_import_nothing_that_a_config_names(run, tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("raise SystemExit('a module of the config was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = (run / "config.yaml").read_text().replace("type: point_goal", "type: canary:Bird")
    config = config.replace("type: ppo", "type: canary:Bird").replace("type: mlp", "type: canary:B")
    rewrite_config(run, config)
    assert len(dmrl_ray.load(run))
    for command in ("report", "verify"):
        answer = call(command, run)
        assert answer.exit_code == 0, answer.output
    assert "canary:Bird" in call("report", run).stdout


def rewrite_config(run, text, **facts):
    """Give a run another config, with the checksum of the new one."""
    record = json.loads((run / "run.json").read_bytes())
    del record["sha256"]
    (run / "config.yaml").write_text(text)
    record["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (run / "run.json").write_bytes(seal(record | facts, indent=1))


@pytest.mark.parametrize("file", ["config.yaml", "run.json"])
def test_a_damaged_description_of_a_run_is_not_shown(run, file):
    path = run / file
    path.write_bytes(path.read_bytes().replace(b"seed", b"sede", 1))
    for command in ("report", "evaluate"):
        answer = call(command, run)
        refused(answer, answer.exit_code, f"{path}: is ")
        assert answer.exit_code in (2, 4)
    assert call("verify", run).exit_code == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1", "it has no checksum"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"sha256": ' + "9" * 5000 + "}", "is damaged"),
    ],
    ids=["a number", "deep", "a long number"],
)
def test_odd_json_is_one_sentence(run, text, why):
    for file in (run / "run.json", max((run / "commits").iterdir())):
        before = file.read_bytes()
        file.write_text(text)
        for command in ("report", "evaluate", "resume", "export"):
            more = ("--to", "rllib", run / "out") if command == "export" else ()
            if command != "resume" or file.name == "run.json":
                refused(call(command, run, *more), 4, file.name, why)
        assert call("verify", run).exit_code == 4
        file.write_bytes(before)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{" * 100_000, "stages: 1", "stages: {a: 1}", "- 1", "a: " + "9" * 5000]
)
def test_an_odd_config_with_its_right_checksum_is_one_sentence(run, text):
    rewrite_config(run, text)
    for command in ("report", "evaluate", "resume"):
        answer = call(command, run)
        assert answer.exit_code == 2
        assert "Traceback" not in answer.output
        assert "config.yaml" in answer.stderr


@pytest.mark.parametrize("change", ["missing", "foreign", "damaged"])
def test_a_part_that_is_not_as_committed_is_named(run, change):
    part = min((run / "metrics").iterdir())
    if change == "missing":
        part.unlink()
    elif change == "foreign":
        part = Path(
            shutil.copy(part, part.with_name("part-00000001-0009-0123456789abcdef.parquet"))
        )
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises((ValueError, CorruptRun), match=part.name):
        dmrl_ray.load(run, "metrics")
    answer = call("report", run)
    refused(answer, answer.exit_code, part.name)
    answer = call("verify", run)
    assert answer.exit_code == 4
    assert part.name in answer.stdout


def replace_by_link(path, elsewhere):
    """Move a file or folder away and leave a link to it."""
    elsewhere.mkdir()
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize("name", ["report", "evaluate", "policy"])
@pytest.mark.parametrize("link", ["commits", "config.yaml", "run.json", "metrics", "checkpoints"])
def test_a_link_out_of_the_folder_is_not_followed(run, link, name, tmp_path):
    replace_by_link(run / link, tmp_path / "elsewhere")
    read_by = {"metrics": ("report", "evaluate"), "checkpoints": ("evaluate", "policy")}
    if name in read_by.get(link, (name,)):
        answer = read(run, name, tmp_path)
        refused(answer, answer.exit_code, f"{run / link}", "is a symbolic link")
        assert answer.exit_code in (2, 4)


def test_a_lock_that_is_a_link_is_left_alone(run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run / "lock").unlink()
    (run / "lock").symlink_to(precious)
    for name in ("report", "evaluate"):
        assert read(run, name, tmp_path).exit_code == 0
    refused(call("resume", run), 4, f"{run}/lock", "is a symbolic link")
    assert precious.read_text() == "mine"


def test_a_part_that_is_a_pipe_does_not_hang(run):
    part = next((run / "metrics").iterdir())
    part.unlink()
    os.mkfifo(part)
    refused(call("report", run), 2, part.name, "is not a file")
    assert call("verify", run).exit_code == 4


def test_names_of_others_are_shown_escaped(run):
    record = json.loads((run / "run.json").read_bytes())
    del record["sha256"]
    record["facts"]["host"] = "\x1b]0;owned\x9b2J\u202e"
    (run / "run.json").write_bytes(seal(record, indent=1))
    answer = call("report", run)
    assert answer.exit_code == 0
    assert r"\x1b]0;owned\x9b2J\u202e" in answer.stdout
    (run / "checkpoints" / "a\x1b[2J").touch()
    assert r"checkpoints/a\x1b[2J" in call("verify", run).output


@pytest.mark.parametrize(
    "odd",
    [{"done": 0}, {"jobs": None}, {"jobs": {"train": 1}}, {"versions": {"a": -1}}, {"changed": []}],
    ids=str,
)
def test_an_odd_state_with_its_right_checksum_is_damage(run, odd):
    path = max((run / "commits").iterdir())
    record = json.loads(path.read_bytes())
    del record["sha256"]
    record["state"] |= odd
    path.write_bytes(seal(record))
    for command in ("report", "evaluate"):
        assert call(command, run).exit_code in (0, 2)
    refused(call("resume", run), 4, f"is damaged: state.{next(iter(odd))}")
