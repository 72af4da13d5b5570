"""What is sent to a cluster is listed, has no secrets in it, and is not too large."""

import os
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from dmrl_ray.cluster import connection, shipping
from dmrl_ray.cluster.shipping import shipment
from dmrl_ray.errors import ConfigError

SECRETS = [
    *(".ssh/id_rsa", ".aws/credentials", ".netrc", ".git-credentials", ".env", ".env.local"),
    *("token.txt", "deep/down/auth_token", "server.pem", "id_rsa.old", "deep/.ssh/config"),
]
SENT = ["train.py", "tokenizer.py", "tokens/__init__.py", "secrets.py", "configs/run.yaml"]


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"canary of {name}")


def packed(folder, tmp_path):
    """The names in the package that Ray makes of a folder."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(folder), package, excludes=shipment(folder).excludes, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture
def project(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    return project


def test_secrets_are_not_in_the_package_and_all_else_is(project, tmp_path):
    fill(project, SECRETS + SENT)
    assert packed(project, tmp_path) == set(SENT)
    found = shipment(project)
    assert set(found.files) == set(SENT)
    assert {"token.txt", ".ssh", ".env.local"} < found.left_out.keys()
    assert "left out: .aws (may be secret), " in str(found)


def test_a_link_to_a_secret_is_one(project, tmp_path):
    fill(tmp_path, [".ssh/config"])
    fill(project, SENT)
    (project / "notes.txt").symlink_to(tmp_path / ".ssh" / "config")
    assert packed(project, tmp_path) == set(SENT)


def test_what_cannot_be_read_is_skipped(project, tmp_path):
    fill(project, SENT)
    os.mkfifo(project / "pipe [1]")
    (project / "nowhere").symlink_to(tmp_path / "missing")
    (project / "round").symlink_to(project)
    assert shipment(project).left_out.keys() == {"pipe [1]", "nowhere", "round"}
    assert packed(project, tmp_path) == set(SENT)


def test_what_is_ignored_is_neither_sent_nor_counted(project, tmp_path):
    fill(project, [*SENT, "data/large.bin", "other/large.bin"])
    (project / ".gitignore").write_text("data/\n")
    (project / "other" / ".rayignore").write_text("*.bin\n")
    assert "data/large.bin" not in shipment(project).files
    assert set(shipment(project).files) == packed(project, tmp_path)


def test_too_large_a_folder_is_refused_with_its_largest_files(project, monkeypatch):
    fill(project, SENT)
    with open(project / "data.bin", "wb") as file:
        file.truncate(shipping.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"500\.0 MB at most.* data\.bin \(500\.0 MB\).*\.rayign"):
        shipment(project)


@pytest.mark.parametrize("folder", [".", ".."])
def test_a_home_directory_is_refused(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="home directory; change to the folder of the project"):
        shipment(Path(tmp_path / folder))


def test_an_import_that_fails_says_what_was_left_out(project, monkeypatch):
    fill(project, ["settings.env"])
    monkeypatch.setattr(connection, "_sent", [shipment(project)])
    error = RayTaskError("f", "traceback", ModuleNotFoundError("No module named 'mine'"))
    told = str(connection.cause_of(error))
    assert "No module named 'mine'; of " in told
    assert told.endswith("left out: settings.env (may be secret)")
