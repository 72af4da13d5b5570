"""Old records go with their files; no other may be missing, and readers tell them apart."""

import shutil

from dmrl_ray.store import commit_records
from dmrl_ray.store.commit_records import verify
from dmrl_ray.store.writer import RunWriter
from tests.store.small_run import make_run, step
from tests.store.test_run_folder import continue_run, damage, values


def test_a_record_that_no_commit_deleted_is_missed_and_told_once(tmp_path):
    folder = make_run(tmp_path / "run", 6)
    assert verify(folder) == [], "the records of commits 1 to 3 are deleted rightly"
    for number in (4, 5):
        again = tmp_path / str(number)
        shutil.copytree(folder, again)
        record = again / "commits" / f"0000000{number}.json"
        record.unlink()
        assert verify(again) == [f"{record}: is missing"]
        assert values(again) == list(range(24)), "the newest commit names all parts"
        RunWriter.open(again).close()
        assert verify(again) == []
        assert continue_run(again, 7) == []
        assert verify(again) == []


def test_no_record_is_missed_after_going_back_or_after_another_number_is_kept(tmp_path):
    folder = make_run(tmp_path / "run", 6, keep=2)
    for steps, keep in ((7, 4), (9, 1), (10, 2)):
        with RunWriter.open(folder, keep=keep) as writer:
            for number in range(writer.number, steps):
                step(writer, number)
                assert verify(folder) == []
    damage(folder / "commits" / "00000010.json")
    with RunWriter.open(folder, keep=3) as writer:
        for number in range(9, 14):
            step(writer, number)
            assert verify(folder) == []


def test_a_commit_that_was_stopped_while_it_deleted_is_no_damage(tmp_path):
    folder = make_run(tmp_path / "run", 5)
    name = "commits/00000003.json"
    record = (folder / name).read_bytes()
    checkpoint = folder / "checkpoints" / "last-00000003.safetensors"
    left = checkpoint.read_bytes()
    continue_run(folder, 6)
    (folder / name).write_bytes(record)
    assert verify(folder) == [], "its files are deleted first"
    checkpoint.write_bytes(left)
    assert continue_run(folder, 6) == []
    assert not (folder / name).exists()
    assert not checkpoint.exists()


def test_verify_takes_no_commit_that_comes_meanwhile_for_damage(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", 6)
    real = commit_records.difference
    with RunWriter.open(folder, keep=1) as writer:

        def difference(run, record):
            if writer.number < 12 and record.path.startswith("checkpoints/"):
                step(writer, writer.number)
            return real(run, record)

        monkeypatch.setattr(commit_records, "difference", difference)
        assert verify(folder) == []
        assert writer.number > 7
