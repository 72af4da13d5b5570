"""Version ranges are written once, and what else names a version agrees with them."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.lowest import LEFT_OUT, ROOT, lowest, requirements
from dmrl_ray import rllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_lower_ends_are_pinned_and_what_has_none_is_left_open():
    lines = ["ray[rllib,default]>=2.60,<3", "numpy >= 2.1", "ruff", "old<3"]
    assert lowest(map(Requirement, lines)) == ["ray==2.60", "numpy==2.1"]


def test_every_dependency_has_a_lower_end():
    assert len(lowest(requirements())) == len(PYPROJECT["project"]["dependencies"])


@pytest.mark.parametrize("needed", requirements("dev"), ids=str)
def test_the_pinned_version_is_in_the_range(needed):
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert Version(pins[needed.name]) in needed.specifier


def test_the_oldest_python_is_the_same_everywhere():
    project = PYPROJECT["project"]
    oldest = project["requires-python"].removeprefix(">=")
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python" in c]
    assert min(named, key=Version) == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    for page in ("README.md", "Makefile"):
        assert f"Python {oldest} or newer" in (ROOT / page).read_text()


def test_the_range_of_ray_is_that_of_the_rllib_edge():
    (ray,) = [needed for needed in requirements() if needed.name == "ray"]
    oldest, too_new = (".".join(map(str, v)) for v in (rllib.OLDEST, rllib.TOO_NEW))
    assert ray.specifier == Requirement(f"ray>={oldest},<{too_new}").specifier


def test_tests_that_are_left_out_are_there():
    assert all((ROOT / "tests" / name).is_file() for name in LEFT_OUT)
