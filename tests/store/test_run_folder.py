"""A run folder has one writer, and what is damaged in it is found, told and repaired."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmrl_ray.errors import ConfigError, CorruptRun, FolderInUse, StorageError
from dmrl_ray.results.reading import load
from dmrl_ray.store.commit_records import Commit, seal, verify
from dmrl_ray.store.files import FileRecord
from dmrl_ray.store.run_folder import files_of_others
from dmrl_ray.store.writer import RunWriter
from tests.store.small_run import add, create, make_run, step


def continue_run(folder, steps):
    """Open a run and bring it to `steps` commits; returns its messages."""
    with RunWriter.open(folder) as writer:
        for number in range(writer.state["step"], steps):
            step(writer, number)
        return writer.recovery


def values(folder):
    return load(folder, "metrics")["value"].tolist()


def damage(path, bit=None):
    """Flip a bit, or cut the file in half."""
    data = bytearray(path.read_bytes())
    if bit is None:
        data = data[: len(data) // 2]
    else:
        data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_an_existing_run_is_refused_and_left_alone(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=r"with `resume`, or delete it .* `--overwrite`"):
        create(folder)
    assert values(folder) == [0, 1, 2, 3]


def test_overwrite_starts_from_nothing(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    with create(folder, overwrite=True) as writer:
        add(writer, 50, rows=1)
        writer.commit({}, {})
    assert values(folder) == [50]
    assert verify(folder) == []


def test_a_folder_that_is_not_a_run_is_never_cleared(tmp_path):
    (tmp_path / "run" / "tasks").mkdir(parents=True)
    (tmp_path / "run" / "tasks" / "precious").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for name in ("run", "other"):
        with pytest.raises(ConfigError, match="is not a run folder"):
            create(tmp_path / name, overwrite=True)
        with pytest.raises(ConfigError, match="is not a run folder"):
            RunWriter.open(tmp_path / name)
    assert (tmp_path / "run" / "tasks" / "precious").exists()
    assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["-x", ".x", "a b", "ä", "x" * 65, "a\n", "a\0"])
def test_names_that_cannot_name_a_run_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a run"):
        create(tmp_path / "sub" / name)
    assert not (tmp_path / "sub").exists()


def test_an_object_store_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="local or shared file systems"):
        create("s3://bucket/run")


def test_a_changed_config_is_refused(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    (folder / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: is not the config"):
        RunWriter.open(folder)


def test_a_newer_format_is_refused_not_repaired(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    record = folder / "commits" / "00000002.json"
    newer = {**json.loads(record.read_bytes()), "format_version": 99}
    del newer["sha256"]
    record.write_bytes(seal(newer))
    with pytest.raises(ConfigError, match="has format version 99"):
        RunWriter.open(folder)
    assert record.exists()


HOLDER = """
import os, signal, sys
from dmrl_ray.store.writer import RunWriter
writer = RunWriter.open(sys.argv[1])
if os.fork():
    signal.pause()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout.readline() == b"open\n"
    for intrude in (RunWriter.open, lambda f: create(f, overwrite=True)):
        with pytest.raises(FolderInUse, match=f"process {holder.pid} on .*, started 20"):
            intrude(folder)
    holder.kill()
    holder.wait()
    assert continue_run(folder, 2) == [], "a forked child lives on, without the lock"
    holder.communicate()


@pytest.mark.parametrize("zombie_is_first", [True, False])
def test_of_two_writers_that_escaped_the_lock_one_commits(tmp_path, zombie_is_first):
    folder = make_run(tmp_path / "run", 2)
    zombie = RunWriter.open(folder)
    zombie.close()  # the lock is gone, the object lives on
    with RunWriter.open(folder) as heir:
        first, second = (zombie, heir) if zombie_is_first else (heir, zombie)
        for writer in (first, second):
            task = {"task_id": "t", "family": "f", "split": "train", "params": "{}"}
            writer.add("tasks", task)
            add(writer, 100 if writer is first else 200)
        first.commit({"step": 3}, first.files)
        with pytest.raises(FolderInUse, match="has written commit 3"):
            second.commit({"step": 3}, second.files)
    assert list(folder.rglob("_*")) == []
    assert continue_run(folder, 3) == []
    assert values(folder) == [*range(8), 100, 101, 102, 103]
    assert len(load(folder, "tasks")) == 1
    assert verify(folder) == []


def test_a_writer_whose_number_is_free_again_commits_nothing(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    zombie = RunWriter.open(folder)
    zombie.close()
    continue_run(folder, 8)
    assert not (folder / "commits" / "00000003.json").exists(), "its record is deleted"
    add(zombie, 100)
    with pytest.raises(FolderInUse, match="has written commit 3"):
        zombie.commit({"step": 3}, {"last": zombie.save("last", {"w": np.ones(3)})})
    assert list(folder.rglob("_*")) == []
    assert continue_run(folder, 8) == []
    assert values(folder) == list(range(32))
    assert verify(folder) == []


def test_a_flipped_bit_of_a_commit_record_is_found(tmp_path):
    path = make_run(tmp_path / "run", 1) / "commits" / "00000001.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptRun, match=r"00000001\.json: is damaged"):
            Commit.read(path)


def test_damage_to_the_newest_commit_is_found_told_and_repaired(tmp_path):
    whole = make_run(tmp_path / "whole", 4)
    rng = np.random.default_rng(0)
    newest = [path for path in whole.rglob("*00000004*") if path.is_file()]
    assert len(newest) == 3, "a record, a part, a checkpoint"
    for path in newest:
        for bit in [None, *rng.integers(2**20, size=7).tolist()]:
            folder = tmp_path / "run"
            shutil.copytree(whole, folder)
            damage(folder / path.relative_to(whole), bit)
            assert path.name in verify(folder)[0]
            set_aside, going_on = continue_run(folder, 4)
            assert set_aside.startswith("commit 4 is set aside: ")
            assert path.name in set_aside
            assert going_on == "continuing from commit 3"
            assert values(folder) == list(range(16))
            assert verify(folder) == []
            shutil.rmtree(folder)


def test_damage_two_commits_back_goes_back_two(tmp_path):
    folder = make_run(tmp_path / "run", 4)
    damage(next((folder / "metrics").glob("part-00000003*")), bit=99)
    messages = continue_run(folder, 4)
    assert [m.split(":")[0] for m in messages[:2]] == [
        f"commit {n} is set aside" for n in (4, 3)
    ], "both name the part"
    assert messages[2] == "continuing from commit 2"
    assert values(folder) == list(range(16))


def test_damage_further_back_than_the_commits_kept_is_told_and_the_run_goes_on(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    (path,) = (folder / "metrics").glob("part-00000001-*.parquet")
    damage(path, bit=1000)
    (message,) = continue_run(folder, 7)
    assert message == f"lost for good: {path}: its sha256 is not the committed one"
    assert values(folder) == list(range(4, 28))
    assert path.with_name(f"_rejected-{path.name}.hidden").exists()


def test_rows_that_are_lost_for_good_do_not_keep_a_run_from_going_back(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    damage(next((folder / "metrics").glob("part-00000001-*")), bit=1000)
    continue_run(folder, 7)
    damage(next((folder / "checkpoints").glob("last-00000007*")), bit=5)
    assert continue_run(folder, 8)[1] == "continuing from commit 6"
    assert values(folder) == list(range(4, 32))


def test_a_damaged_record_before_the_newest_is_no_harm(tmp_path):
    folder = make_run(tmp_path / "run", 4)
    damage(folder / "commits" / "00000003.json", bit=99)
    assert len(verify(folder)) == 1
    (message,) = continue_run(folder, 8)
    assert message.startswith("commit 3 is set aside: ")
    assert values(folder) == list(range(32))
    assert verify(folder) == []


def test_going_back_never_costs_more_than_the_commits_that_are_kept(tmp_path):
    # Commits that name no files would be complete for ever.
    with create(tmp_path / "run") as writer:
        for number in range(8):
            add(writer, 4 * number)
            writer.commit({"step": number + 1}, {})
    damage(next((tmp_path / "run" / "metrics").glob("part-00000003*")), bit=99)
    (message,) = continue_run(tmp_path / "run", 8)
    assert message.startswith("lost for good: ")


def test_a_record_of_another_history_is_no_past(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    record = folder / "commits" / "00000002.json"
    other = {**json.loads(record.read_bytes()), "state": {"step": 100}}
    del other["sha256"]
    record.write_bytes(seal(other))
    assert verify(folder) == [f"{folder}/commits/00000003.json: does not follow commit 2"]


def test_a_part_of_no_commit_is_told_and_set_aside(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    stray = folder / "metrics" / "part-00000002-0000-0123456789abcdef.parquet"
    shutil.copy(next((folder / "metrics").iterdir()), stray)
    assert verify(folder) == [f"{stray}: belongs to no commit"]
    RunWriter.open(folder).close()
    assert values(folder) == list(range(8))


def test_a_run_of_which_no_commit_is_complete_is_never_started_anew(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    for path in (folder / "checkpoints").iterdir():
        damage(path, bit=5)
    with pytest.raises(CorruptRun, match=r"none of its 3 commits is complete: .*last-00000003"):
        RunWriter.open(folder)
    assert values(folder) == list(range(12))


def forget(folder, stage="s"):
    """Leave out a stage in one commit that adds a row of another."""
    with RunWriter.open(folder) as writer:
        add_of(writer, "other", 100)
        writer.forget([stage])
        writer.commit(writer.state, writer.files)


def add_of(writer, stage, value):
    same = {"job": "j", "policy_version": 0, "env_steps": 0, "name": "loss"}
    writer.add("metrics", {**same, "stage": stage, "value": [float(value)]})


def mixed_run(folder):
    """Two commits, whose first part holds rows of two stages."""
    with create(folder) as writer:
        add_of(writer, "kept", 50)
        for number in range(2):
            step(writer, number)
    return folder


def test_what_is_forgotten_is_gone_and_rows_beside_it_stay(tmp_path):
    folder = mixed_run(tmp_path / "run")
    forget(folder)
    assert values(folder) == [50, 100]
    assert continue_run(folder, 3) == []
    assert values(folder) == [50, 100, *range(8, 12)]
    assert verify(folder) == []
    forget(folder)
    assert values(folder) == [50, 100, 100]


def test_rows_that_were_to_be_forgotten_come_back_with_the_commit_before(tmp_path):
    folder = mixed_run(tmp_path / "run")
    forget(folder)
    damage(folder / "commits" / "00000003.json", bit=99)
    assert continue_run(folder, 2)[-1] == "continuing from commit 2"
    assert values(folder) == [50, *range(8)]
    assert verify(folder) == []


def test_damage_of_an_older_record_brings_no_forgotten_row_back(tmp_path):
    folder = mixed_run(tmp_path / "run")
    forget(folder)
    continue_run(folder, 4)
    damage(folder / "commits" / "00000003.json", bit=99)
    continue_run(folder, 8)
    assert values(folder) == [50, 100, *range(8, 32)]


def test_readers_see_what_a_commit_forgot_before_its_files_are_renamed(tmp_path, monkeypatch):
    folder = mixed_run(tmp_path / "run")
    monkeypatch.setattr(RunWriter, "_publish", lambda self: None)
    forget(folder)
    assert values(folder) == [50, 100]
    monkeypatch.undo()
    RunWriter.open(folder).close()
    assert values(folder) == [50, 100]
    assert len(list((folder / "metrics").glob("part-*"))) == 2


def test_rows_that_were_to_be_forgotten_stay_if_the_commit_is_given_up(tmp_path):
    folder = mixed_run(tmp_path / "run")
    with RunWriter.open(folder) as writer:
        writer.forget(["s"])
        writer.discard()
        writer.commit(writer.state, writer.files)
    assert values(folder) == [50, *range(8)]
    assert list(folder.rglob("_*")) == []


OF_OTHERS = (
    "checkpoints/best of all.safetensors",
    "checkpoints/mine-00000002.safetensors",
    "metrics/notes.txt",
    "metrics/_mine.tmp",
    "thesis.tex",
)


def test_files_of_others_in_a_run_folder_are_left_alone_and_told(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    for name in OF_OTHERS:
        (folder / name).write_text("mine")
    damage(folder / "commits" / "00000006.json")
    continue_run(folder, 9)
    assert [(folder / name).read_text() for name in OF_OTHERS] == ["mine"] * len(OF_OTHERS)
    shown = [name for name in sorted(OF_OTHERS) if "/_" not in name]
    assert files_of_others(folder) == [folder / name for name in shown]
    assert verify(folder) == []


def test_a_checkpoint_of_a_commit_that_did_not_come_is_deleted(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    with RunWriter.open(folder) as writer:
        lost = writer.save("last", {"w": np.zeros(3)})
    continue_run(folder, 2)
    assert not (folder / lost.path).exists()


@pytest.mark.parametrize("name", ["lock", "commits", "checkpoints", "metrics", "run.json"])
def test_a_writer_refuses_a_link_and_leaves_what_it_names_alone(tmp_path, name):
    folder = make_run(tmp_path / "run", 2)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)
    precious = elsewhere / "precious" if elsewhere.is_dir() else elsewhere
    precious.write_bytes(b"mine")
    for intrude in (RunWriter.open, lambda f: create(f, overwrite=True)):
        with pytest.raises((StorageError, CorruptRun), match="is a symbolic link"):
            intrude(folder)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_with_a_way_round(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=r"has no locks .* give a folder on a local disk"):
        create(tmp_path / "run")


def test_a_rightly_deleted_checkpoint_is_no_fault_after_going_back(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    damage(folder / "commits" / "00000006.json")
    RunWriter.open(folder).close()
    assert verify(folder) == []
    with RunWriter.open(folder) as writer:
        step(writer, 5)
        assert verify(folder) == []
    next((folder / "checkpoints").glob("*00000005*")).unlink()
    assert len(verify(folder)) == 1


def test_what_was_told_as_lost_does_not_keep_readers_from_the_rest(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    next((folder / "metrics").glob("part-00000001*")).unlink()
    with pytest.raises(CorruptRun, match=r"part-00000001.*: is missing, though a commit names it"):
        load(folder, "metrics")
    (message,) = continue_run(folder, 7)
    assert message.startswith("lost for good: ")
    assert values(folder) == list(range(4, 28))


ODD = {
    "files": {"files": {"last": {"path": "../../etc/passwd", "size_bytes": 1, "sha256": "0"}}},
    "parts": {"parts": [{"path": "metrics/x", "size_bytes": {}, "sha256": "0"}]},
    "no list": {"parts": 3},
    "number": {"number": "one"},
    "keep": {"keep": 0},
    "state": {"state": []},
}


@pytest.mark.parametrize("field", ODD)
def test_an_odd_record_with_its_right_checksum_is_damage(tmp_path, field):
    folder = make_run(tmp_path / "run", 1)
    path = folder / "commits" / "00000001.json"
    record = {**json.loads(path.read_bytes()), **ODD[field]}
    del record["sha256"]
    path.write_bytes(seal(record))
    with pytest.raises(CorruptRun, match=f"{path.name}: is damaged"):
        load(folder, "metrics")
    assert path.name in verify(folder)[0]


class Unpickled(pa.ExtensionType):
    """A type that runs code when a file that names it is opened, as some libraries have."""

    calls = 0

    def __init__(self):
        super().__init__(pa.string(), "test.unpickled")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        cls.calls += 1
        return cls()


@pytest.fixture
def hostile(tmp_path):
    """A run whose part has a column of a type that runs code, named by a sealed commit."""
    folder = make_run(tmp_path / "run", 1)
    (part,) = (folder / "metrics").iterdir()
    table = pq.read_table(part)
    kind = Unpickled()
    column = pa.ExtensionArray.from_storage(kind, table["name"].combine_chunks())
    pa.register_extension_type(kind)
    pq.write_table(table.set_column(5, "name", column), folder / "metrics" / "part-x.parquet")
    part.unlink()
    path = folder / "commits" / "00000001.json"
    record = json.loads(path.read_bytes())
    del record["sha256"]
    data = (folder / "metrics" / "part-x.parquet").read_bytes()
    record["parts"] = [asdict(FileRecord.of("metrics/part-x.parquet", data))]
    path.write_bytes(seal(record))
    Unpickled.calls = 0
    yield folder
    pa.unregister_extension_type("test.unpickled")


def test_types_of_a_part_are_refused_before_any_of_them_runs_code(hostile):
    with pytest.raises(ValueError, match=r"part-x\.parquet: has columns of an extension type"):
        load(hostile, "metrics")
    with RunWriter.open(hostile) as writer, pytest.raises(ValueError, match="extension type"):
        writer.forget(["s"])
    assert verify(hostile) == []
    assert Unpickled.calls == 0
