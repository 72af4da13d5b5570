"""Damaged folders, configs and command lines: no traceback, no hang, and one sentence for each.

Every mutation is drawn from its own seed, which a failure names::

    python -m tests.test_fuzz folder 17     # one again, with its output
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli
from dmrl_ray.store.commit_records import seal

CONFIG = """\
tasks: {type: point_goal, horizon: 5}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [4]}}
algorithm: {type: ppo, num_steps: 10}
rollout: {shards: 1, num_envs: 2}
workers: {num: 0}
stages:
  train: {type: pretrain, env_steps: 40, validation_tasks: 2}
  special: {type: finetune, init_from: train, tasks: 1, updates: 1}
  online: {type: adapt, init_from: train, streams: 2, tasks_per_stream: 2, episodes_per_task: 1}
  held_out: {type: evaluate, init_from: train, tasks: 2, record: true}
"""
SECONDS = 30
CODES = {0, 2, 3, 4, 5, 6, 7}
ODD = ("", "0", "-1", "1e999", "null", "[]", "{}", "nan", "[[", "é\x1b[2J", "9" * 5000, "x" * 300)
ODD_JSON = (None, 0, -1, 10**400, "", "../../x", "é\x1b[2J", [], {}, [[]], {"a": 1}, True, 1.5)
READERS = (("report",), ("verify",), ("evaluate", "--tasks", "2"), ("resume",))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@contextmanager
def limited() -> Iterator[None]:
    def on_alarm(*_: object) -> None:
        raise TimeoutError(f"it takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(answer: Result, *arguments: str) -> None:
    shown = f"{arguments}\n{answer.output}"
    assert answer.exit_code in CODES, shown
    assert "Traceback" not in answer.output, shown
    assert not any(c < " " and c not in "\n\t" for c in answer.output), shown
    if answer.exit_code:
        assert answer.stderr.strip(), shown


def mutate_file(rng: random.Random, path: Path, elsewhere: Path) -> str:
    """Damage a file in one of many ways."""
    data = path.read_bytes()
    kind = rng.choice(
        ["flip", "cut", "insert", "empty", "gone", "link", "loop", "folder", "pipe", "copy", "text"]
    )
    if kind in ("gone", "link", "loop", "folder", "pipe"):
        path.unlink()
    if kind == "flip" and data:
        many = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            many[rng.randrange(len(many))] ^= 1 << rng.randrange(8)
        path.write_bytes(many)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == "insert":
        at = rng.randrange(len(data) + 1)
        path.write_bytes(data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "link":
        (elsewhere / "precious").write_bytes(data)
        path.symlink_to(elsewhere / "precious")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "copy":
        name = rng.choice(["a\x1b[2Jb", "x.parquet", "part-00000001-x.parquet", "1.json", "é"])
        shutil.copy(path, path.with_name(name))
    elif kind == "text":
        path.write_bytes(rng.choice([b"1", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b"\0" * 9]))
    return f"{kind} {path.name}"


def mutate_record(rng: random.Random, path: Path) -> str:
    """Change a value somewhere in a record, and seal it again."""
    try:
        record = json.loads(path.read_bytes())
        del record["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "none"  # It is damaged already.
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        items = value.items() if isinstance(value, dict) else ()
        items = enumerate(value) if isinstance(value, list) else items
        for key, below in items:
            places.append((value, key))
            walk(below)

    walk(record)
    where, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(where, dict):
        del where[key]
        what = "none"
    else:
        where[key] = what = rng.choice(ODD_JSON)  # type: ignore[index]
    path.write_bytes(seal(record, indent=1 if path.name == "run.json" else None))
    return f"{path.name}: {key} = {str(what)[:20]!r}"


def mutate_part(rng: random.Random, folder: Path) -> str:
    """Change cells of a table, and name the new part in its commit."""
    path = rng.choice(sorted(folder.glob("*/part-*.parquet")))
    table = pq.ParquetFile(path).read()
    kind = rng.choice(["nulls", "drop", "odd text", "rename", "no rows"])
    i = rng.randrange(table.num_columns)
    name = table.column_names[i]
    if kind == "nulls":
        column = pa.nulls(table.num_rows, table.schema.field(i).type)
        table = table.set_column(i, name, column)
    elif kind == "drop":
        table = table.drop_columns([name])
    elif kind == "odd text" and table.schema.field(i).type == "string":
        cells = [rng.choice([*ODD, "[" * 100_000, '{"complete": 1}']) for _ in range(len(table))]
        table = table.set_column(i, name, pa.array(cells, "string"))
    elif kind == "rename":
        table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
    elif kind == "no rows":
        table = table.slice(0, 0)
    pq.write_table(table, path)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    new = path.with_name(f"{path.name[:18]}-{sha256[:16]}.parquet")
    path.rename(new)
    replaced = {"path": f"{path.parent.name}/{new.name}", "size_bytes": len(data), "sha256": sha256}
    previous = None
    for commit in sorted((folder / "commits").iterdir()):
        record = json.loads(commit.read_bytes())
        del record["sha256"]
        old = f"{path.parent.name}/{path.name}"
        record["parts"] = [replaced if part["path"] == old else part for part in record["parts"]]
        record["previous_sha256"] = previous
        commit.write_bytes(seal(record))
        previous = hashlib.sha256(commit.read_bytes()).hexdigest()
    return f"{kind} {path.parent.name}.{name}"


def mutate_config(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        kind = rng.choice(["drop", "twice", "value", "byte", "deep", "swap"])
        if kind == "drop":
            lines[i] = ""
        elif kind == "twice":
            lines.insert(i, lines[i])
        elif kind == "value" and ":" in lines[i]:
            lines[i] = lines[i].rsplit(":", 1)[0] + ": " + rng.choice(ODD)
        elif kind == "byte" and lines[i]:
            at = rng.randrange(len(lines[i]))
            lines[i] = lines[i][:at] + chr(rng.choice([*range(128), 233])) + lines[i][at + 1 :]
        elif kind == "deep":
            lines[i] += rng.choice("[{") * rng.choice([1, 30, 10_000])
        elif kind == "swap":
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
    return "\n".join(lines)


def fuzz_folder(seed: int, whole: Path, scratch: Path) -> None:
    """Damage a run once or twice, then have everything read it that reads a run."""
    rng = random.Random(seed)
    folder = scratch / "run"
    shutil.copytree(whole, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    done = []
    for _ in range(rng.randint(1, 2)):
        how = rng.random()
        path = rng.choice(files)
        if how < 0.5 and path.is_file() and not path.is_symlink():
            done.append(mutate_file(rng, path, scratch))
        elif how < 0.8:
            records = [folder / "run.json", max(folder.glob("commits/*.json"), default=None)]
            record = rng.choice(records)
            if record is not None and record.is_file():
                done.append(mutate_record(rng, record))
        elif not done:
            done.append(mutate_part(rng, folder))
        if not done:
            text = mutate_config(rng, (folder / "config.yaml").read_text())
            data = text.encode(errors="surrogatepass")
            (folder / "config.yaml").write_bytes(data)
            record = json.loads((folder / "run.json").read_bytes())
            del record["sha256"]
            record["config_sha256"] = hashlib.sha256(data).hexdigest()
            (folder / "run.json").write_bytes(seal(record, indent=1))
            done.append("config")
    print(seed, done)
    for command, *options in READERS if seed % 4 == 0 else READERS[: 2 + seed % 2]:
        arguments = (command, str(folder), *options)
        check(call(*arguments), *arguments, *done)
    if (scratch / "precious").exists():
        assert not (scratch / "precious").is_symlink()


def fuzz_config(seed: int, whole: Path, scratch: Path) -> None:
    rng = random.Random(seed)
    path = scratch / "run.yaml"
    text = mutate_config(rng, CONFIG)
    path.write_bytes(text.encode())
    print(text[:2000])
    check(call("config", str(path)), text[:500])
    check(call("config", str(path), "--resolved"), text[:500])


def fuzz_command(seed: int, whole: Path, scratch: Path) -> None:
    rng = random.Random(seed)
    words = [
        *("report", "verify", "evaluate", "config", "resume", "export", "--split", "--tasks"),
        *("--stage", "--to", "rllib", "--checkpoint", "best", "--json", "-v", "--help", "--"),
        *("train", "2", str(whole), str(scratch / "none"), "seed=1", "stages.train.env_steps=1e9"),
        *(
            "a.b.c=1",
            "=",
            "..=[",
            "stages=1",
            "tasks={",
            "x" * 300,
            "é\x1b[2J",
            "a\0b",
            "",
            "/",
            ".",
        ),
    ]
    first = rng.choice(["report", "verify", "evaluate", "config", "export", "tasks"])
    arguments = [first, *rng.choices(words, k=rng.randint(0, 5))]
    arguments = [word for word in arguments if word != "-v"]
    if first == "config" and len(arguments) > 1:
        (scratch / "run.yaml").write_text(CONFIG)
        arguments[1] = str(scratch / "run.yaml")
    if first == "export":
        return
    print(arguments)
    check(call(*arguments), *arguments)


FUZZ: dict[str, Callable[[int, Path, Path], None]] = {
    "folder": fuzz_folder,
    "config": fuzz_config,
    "command": fuzz_command,
}


def make_run(folder: Path) -> Path:
    (folder / "run.yaml").write_text(CONFIG)
    answer = call("run", str(folder / "run.yaml"), "--out", str(folder / "out"))
    assert answer.exit_code == 0, answer.output
    return folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fuzz(name: str, seed: int, whole: Path, scratch: Path) -> None:
    with limited():
        FUZZ[name](seed, whole, scratch)


@pytest.mark.parametrize("name", FUZZ)
@pytest.mark.parametrize("start", range(0, 67, 23))
def test_damage_is_one_sentence(name, start, whole, scratch):
    for seed in range(start, min(start + 23, 67)):
        below = scratch / str(seed)
        below.mkdir()
        fuzz(name, seed, whole, below)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
@pytest.mark.parametrize("start", range(1000, 2000, 100))
def test_much_more_damage_is_one_sentence(name, start, whole, scratch):
    for seed in range(start, start + 100):
        with tempfile.TemporaryDirectory(dir=scratch) as below:
            fuzz(name, seed, whole, Path(below))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        (Path(here) / "scratch").mkdir()
        run = make_run(Path(here))
        for number in sys.argv[2:]:
            fuzz(sys.argv[1], int(number), run, Path(here) / "scratch")
