"""A run is killed before each of its file operations, then continued: nothing is lost or doubled.

The killing is done by a light process of its own (this file run as a script), because forking one
that has loaded torch is slow. An audit hook counts the operations: open for writing, rename, link,
remove, mkdir, truncate; fsync is wrapped. With loss of power, files and names that were not synced
are torn and undone before the kill. The second commit merges parts, which the third deletes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import dmrl_ray.store.compaction as compaction_module
import dmrl_ray.store.writer as writer_module
from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import Commit, hidden_path, verify
from dmrl_ray.store.writer import RunWriter

STEPS = 3
KINDS = ["kill", "power-loss-1", "power-loss-2"]
TABLES = {
    "episodes": ["job", "task_id", "trial", "return"],
    "metrics": ["name", "value"],
    "transitions": ["job", "trial", "reward"],
}


def weights_at(step):
    return np.random.default_rng(step).random((3, step + 1))


def run(folder, committed=None):
    """A small run; continues from wherever the folder is. Calls `committed` after each commit."""
    is_run = (folder / "run.json").exists()
    opened = RunWriter.open(folder, keep=2) if is_run else None
    with opened or RunWriter.create(folder, "seed: 0\n", {}, keep=2) as writer:
        start = 0
        if writer.state:
            start = writer.state["step"]
            np.testing.assert_array_equal(writer.load("last")["w"], weights_at(start))
            np.testing.assert_array_equal(writer.load("best")["names"], ["a", f"b{start // 2}"])
        assert writer.recovery == []
        for step in range(start, STEPS):
            add_rows(writer, step)
            files = {**writer.files, "last": writer.save("last", {"w": weights_at(step + 1)})}
            if (step + 1) % 2 == 0 or step == 0:
                names = np.array(["a", f"b{(step + 1) // 2}"])
                files["best"] = writer.save("best", {"names": names})
            writer.commit({"step": step + 1}, files)
            if committed:
                committed(step + 1)


def add_rows(writer, step):
    same = {"stage": "s", "job": f"j{step}", "policy_version": step, "env_steps": step * 10}
    rows = np.arange(3)
    zeros = dict.fromkeys(["seed", "trial", "episode", "adaptation_step", "length"], 0)
    for half in range(2):
        trial = rows + 3 * half + 6 * step
        changing = {"trial": trial, "return": trial / 7, "task_id": [f"t{n}" for n in trial]}
        where = {"algorithm": "ppo", "split": "train", "greedy": False, **same}
        writer.add("episodes", {**zeros, **where, **changing})
    for half in range(2):
        add_steps(writer, step, half)
    writer.add("metrics", {**same, "name": ["loss", "norm"], "value": [step / 3, np.nan]})
    if step == 0:
        writer.add("metrics", {**same, "stage": "old", "name": "loss", "value": 1.0})
    if step == STEPS - 1:
        writer.forget(["old"])


def add_steps(writer, step, half):
    vectors = pa.array(np.zeros((3, 4), np.float32).tolist(), pa.list_(pa.float32()))
    zeros = dict.fromkeys(
        ["environment", "episode", "t", "policy_version", "adaptation_step", "action"], 0
    )
    ends = {"terminated": False, "truncated": False, "log_prob": 0.0}
    where = {"stage": "s", "job": f"j{step}", "task_id": "t", "split": "train"}
    rows = np.arange(3) + 3 * half
    changing = {"trial": rows, "reward": rows / 7 + step, "obs": vectors}
    writer.add("transitions", {**zeros, **ends, **where, **changing})


def rows_of(folder):
    """Rows that stay, by step: those beside forgotten ones are written again, after later ones."""
    found = {table: load(folder, table).query("stage == 's'") for table in TABLES}
    found["metrics"] = found["metrics"].sort_values("env_steps", kind="stable")
    return {t: rows[TABLES[t]].reset_index(drop=True) for t, rows in found.items()}


class Disk:
    """Counts file operations below `root` and kills this process before number `kill_at`."""

    def __init__(self, root, kill_at, power_loss_seed=None):
        self.root, self.kill_at, self.count = str(root), kill_at, 0
        self.rng = None if power_loss_seed is None else np.random.default_rng(power_loss_seed)
        self.unsynced = set()  # files with content that a loss of power may tear
        self.undo = {}  # folder -> how to undo the changes of names since its last fsync
        self.graves = tempfile.mkdtemp(dir=root.parent.parent)
        self.busy = False
        os.fsync = self.counted_fsync
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.busy:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
            if writes and str(path).startswith(self.root):
                self.operation(self.opened, Path(path))
        elif event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate"):
            paths = [Path(os.fsdecode(a)) for a in args if isinstance(a, str | bytes | Path)]
            if event == "os.truncate" or any(str(p).startswith(self.root) for p in paths):
                self.operation(getattr(self, event[3:]), *paths)

    def operation(self, effect, *paths):
        self.busy = True
        self.count += 1
        if self.count == self.kill_at:
            if self.rng is not None:
                self.lose_power()
            os.kill(os.getpid(), signal.SIGKILL)
        effect(*paths)
        self.busy = False

    def later(self, path, undo, *args):
        self.undo.setdefault(path.parent, []).append((undo, args))

    def opened(self, path):
        self.unsynced.add(path)
        if not path.exists():
            self.later(path, lambda: path.unlink(missing_ok=True))

    def rename(self, old, new):
        assert not new.exists(), f"{new} is overwritten"
        if old in self.unsynced:
            self.unsynced.add(new)
        self.later(new, os.rename, new, old)

    def link(self, old, new):
        self.later(new, lambda: new.unlink(missing_ok=True))

    def remove(self, path):
        grave = Path(self.graves) / str(self.count)
        os.link(path, grave)
        self.later(path, lambda: os.rename(grave, path))

    def mkdir(self, path):
        self.later(path, shutil.rmtree, path)

    def truncate(self, *_):
        pass

    def counted_fsync(self, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.operation(lambda: None)
        self.unsynced.discard(path)
        self.undo.pop(path, None)

    def lose_power(self):
        for path in sorted(self.unsynced):
            if path.exists() and path.name != "lock":
                data = path.read_bytes()
                size = int(self.rng.integers(len(data) + 1))
                zeros = bytes(len(data) - size) if self.rng.random() < 0.5 else b""
                path.write_bytes(data[:size] + zeros)
        for _, steps in sorted(self.undo.items(), reverse=True):
            for undo, args in steps[::-1][: self.rng.integers(len(steps) + 1)]:
                undo(*args)


def killed(folder, kill_at, power_loss_seed):
    """Run in a forked child that is killed. Returns (whether it was, steps committed before)."""
    reader, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Disk(folder, kill_at, power_loss_seed)
            run(folder, lambda step: os.write(sender, bytes([step])))
        except BaseException as error:
            print(f"kill {kill_at}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(sender)
    _, status = os.waitpid(child, 0)
    steps = os.read(reader, 1000)
    os.close(reader)
    assert status in (0, signal.SIGKILL), f"kill {kill_at}: the run failed by itself"
    return status == signal.SIGKILL, max(steps, default=0)


def check_prefix(folder, expected, committed):
    """What a reader sees: whole commits, from the first on; what was committed is there."""
    if not (folder / "run.json").exists():
        assert committed == 0
        return
    commits = max((commit.number for commit in commits_of(folder)), default=0)
    assert commits >= committed
    for table, rows in rows_of(folder).items():
        per_step = len(expected[table]) // STEPS
        assert rows.equals(expected[table][: commits * per_step])
    assert (load(folder, "metrics")["stage"] == "old").sum() == (0 < commits < STEPS)


def commits_of(folder):
    paths = sorted((folder / "commits").glob("[0-9]*.json"))
    return [Commit.read(path) for path in paths]


def check_finished(folder, expected):
    assert verify(folder) == []
    assert all(rows.equals(expected[table]) for table, rows in rows_of(folder).items())
    before, newest = ({part.path for part in c.parts} for c in commits_of(folder))
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("_*")}
    assert left == {hidden_path(part) for part in before - newest}, "for going back"
    assert {path.split("/")[0] for path in left} >= {"metrics"}, "something was forgotten"
    assert len({part for part in newest if "transitions" in part}) == STEPS, "two became one"
    assert len(list((folder / "checkpoints").iterdir())) == 2 + 1, "last: 2, best: 1"


def campaign(root, power_loss_seed):
    """Kill before operation 1, 2, ... until the run outlives it; twice before continuing."""
    os.fsync = lambda descriptor: None  # what it does is simulated
    undisturbed = root / "0" / "run"
    run(undisturbed)
    expected = rows_of(undisturbed)
    kill_at, was_killed, recoveries = 0, True, 0
    while was_killed:
        kill_at += 1
        folder = root / str(kill_at) / "run"
        seed = None if power_loss_seed is None else 1000 * power_loss_seed + kill_at
        was_killed, committed = killed(folder, kill_at, seed)
        check_prefix(folder, expected, committed)
        again, later = killed(folder, 1 + kill_at * 7 % 41, seed)
        recoveries += again
        check_prefix(folder, expected, max(committed, later))
        run(folder)
        check_finished(folder, expected)
        shutil.rmtree(folder.parent)
    print(json.dumps({"points": kill_at - 1, "recoveries": recoveries}))


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory):
    """All campaigns, running side by side."""

    def start(kind):
        folder = tmp_path_factory.mktemp(kind)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.store.test_crash_points", folder, kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    processes = {kind: start(kind) for kind in KINDS}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_before_any_file_operation_loses_and_doubles_no_row(campaigns, kind):
    out, err = campaigns[kind].communicate(timeout=600)
    assert campaigns[kind].returncode == 0, err[-3000:]
    counts = json.loads(out)
    assert counts["points"] > 80, "the hook sees the operations"
    assert counts["recoveries"] > 70, "recovery itself is killed, too"


if __name__ == "__main__":
    compaction_module.TIER = 2
    writer_module.SPILL_BYTES = 40  # Three vectors of four numbers are more.
    seeds = {kind: seed for seed, kind in enumerate(KINDS)}
    campaign(Path(sys.argv[1]), seeds[sys.argv[2]] or None)
