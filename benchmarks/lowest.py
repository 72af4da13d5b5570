"""Whether the version ranges of pyproject.toml are true: the tests run at their lower ends.

    python -m benchmarks.lowest                          # some ten minutes on two cores
    python -m benchmarks.lowest --python python3.13      # by another interpreter
    python -m benchmarks.lowest --upper                  # the versions of constraints.txt instead
    python -m benchmarks.lowest tests/losses/test_losses.py     # other tests than the fast ones

Installs the project with its `dev` extra into a new virtual environment, every requirement of both
at the lower end of its range and what those require at the newest version that fits, and runs all
tests but those that take long. Nothing is kept. Exits with what pip or pytest exits with. On Linux
pip takes PyTorch with CUDA, which is gigabytes; `--pip` gives pip more arguments, such as an index
of CPU builds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

LEFT_OUT = (
    "rllib/test_lazy.py",
    "cluster/test_cluster.py",
    "control/test_continuation.py",
    "store/test_crash_points.py",
    "test_determinism.py",
    "test_matrix.py",
    "test_readme.py",
    "control/test_resume.py",
)
"""Half of the time of all tests: the matrix, whole runs, and processes that are killed."""


def main() -> int:
    """Try the ranges as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", nargs="*", help="files or folders; by default the fast tests")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to try")
    parser.add_argument("--upper", action="store_true", help="the versions of constraints.txt")
    parser.add_argument("--pip", default="", metavar="ARGUMENTS", help="more arguments of pip")
    options = parser.parse_args()
    tests = options.tests or ["tests", *(f"--ignore=tests/{name}" for name in LEFT_OUT)]
    with tempfile.TemporaryDirectory(prefix="lowest-") as folder:
        if options.upper:
            constraints = ROOT / "constraints.txt"
        else:
            constraints = Path(folder) / "lowest.txt"
            constraints.write_text("\n".join(lowest(requirements("dev"))) + "\n")
            print(constraints.read_text(), flush=True)
        python = str(Path(folder) / "venv" / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", *shlex.split(options.pip)]
        commands = [
            [options.python, "-m", "venv", str(Path(folder) / "venv")],
            [*install, "-c", str(constraints), "-e", f"{ROOT}[dev]"],
            [python, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        ]
        for command in commands:
            print("$", shlex.join(command), flush=True)
            code = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD).returncode
            if code:
                return code
    return 0


def requirements(*extras: str) -> list[Requirement]:
    """Returns the requirements in pyproject.toml, and those of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def lowest(needed: Iterable[Requirement]) -> list[str]:
    """The lower ends of ranges, as pip's constraints; a requirement without one is left open."""
    ends = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in needed}
    return [f"{name}=={version}" for name, versions in ends.items() for version in versions]


if __name__ == "__main__":
    sys.exit(main())
