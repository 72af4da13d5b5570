"""The house keeps its shape: imports point down, Ray stays at the edge, files stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.config.components import SHORT_NAMES, import_class

ROOT = Path(__file__).resolve().parent.parent

ROOMS = [
    "errors",
    "types",
    "backend",
    "config",
    "tasks",
    "losses",
    "networks",
    "store",
    "data",
    "rollout",
    "learn",
    "algorithms",
    "jobs",
    "results",
    "cluster",
    "control",
    "rllib",
    "__main__",
]
"""From the lowest to the highest: an import points to a lower one, or stays in its own."""

LAYER = {name: level for level, name in enumerate(ROOMS)}
WITH_RAY = {"cluster", "rllib"}
MAY_ENVS_IMPORT = {"types", "tasks", "config", "envs"}

PACKAGE = sorted((ROOT / "dmrl_ray").rglob("*.py"))
ENVS = sorted((ROOT / "envs").rglob("*.py"))


def part(path: Path) -> str:
    """The module or folder of the package that a file belongs to; "" for the package itself."""
    top = path.relative_to(ROOT / "dmrl_ray").parts[0].removesuffix(".py")
    return "" if top == "__init__" else top


def imports(source: str) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("a relative import")
        elif isinstance(node, ast.ImportFrom) and node.module == "dmrl_ray":
            found |= {f"dmrl_ray.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def siblings(source: str) -> set[str]:
    """The parts of the package that a file imports."""
    parts = {name.split(".")[1] for name in imports(source) if name.startswith("dmrl_ray.")}
    return parts - {"__version__", "load"}


def upward(name: str, source: str) -> set[str]:
    return {other for other in siblings(source) if LAYER[other] > LAYER[name]}


def imports_ray(source: str) -> bool:
    return any(name.split(".")[0] == "ray" for name in imports(source))


def private_in_torch(source: str) -> set[str]:
    """Names of PyTorch with a leading underscore, imported or as attributes."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)} | imports(
        source
    )
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if re.match(r"(torch|nn|functional)\b[\w.]*\._[A-Za-z]", name)}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_a_module_imports_only_its_own_room_and_lower_ones(path):
    name = part(path)
    if name:
        assert name in LAYER, f"give '{name}' a place among the rooms in this test"
        assert not upward(name, path.read_text())
        assert "a relative import" not in imports(path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_ray_is_imported_at_the_edges_only(path):
    assert not imports_ray(path.read_text()) or part(path) in WITH_RAY


@pytest.mark.parametrize("path", PACKAGE + ENVS, ids=short)
def test_only_the_backend_names_what_is_private_in_pytorch(path):
    assert path == ROOT / "dmrl_ray" / "backend.py" or not private_in_torch(path.read_text())


@pytest.mark.parametrize("path", ENVS, ids=short)
def test_an_environment_knows_the_contract_alone(path):
    assert siblings(path.read_text()) <= MAY_ENVS_IMPORT
    assert not imports_ray(path.read_text())


@pytest.mark.parametrize("path", PACKAGE + ENVS, ids=short)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 500


def test_imports_inside_functions_count():
    source = "def f():\n    from dmrl_ray.control.controller import run\n    import ray.util\n"
    assert upward("jobs", source) == {"control"}
    assert imports_ray(source)
    assert not upward("rllib", source)


def test_private_names_are_found_however_they_are_reached():
    source = "import torch._inductor\nfrom torch._C import x\nnn.modules.batchnorm._BatchNorm(a)\n"
    source += "y = torch.ops.mkldnn._linear_pointwise(1)\nz = nn.Linear(self._width)\n"
    assert private_in_torch(source) == {
        "torch._inductor",
        "torch._C",
        "torch._C.x",
        "nn.modules.batchnorm._BatchNorm",
        "torch.ops.mkldnn._linear_pointwise",
    }


def test_an_import_from_the_package_itself_counts():
    assert upward("losses", "from dmrl_ray import jobs\n") == {"jobs"}


def test_the_top_of_the_package_can_be_taken_in_at_a_glance():
    entries = {path.relative_to(ROOT / "dmrl_ray").parts[0] for path in PACKAGE}
    assert len(entries) <= 22


def test_where_ray_cannot_be_imported_a_run_in_one_process_goes_through_all_stages(tmp_path):
    few = [f"stages.{name}.env_steps=4000" for name in ("meta", "multitask")]
    command = ["run", "smoke", "workers.num=0", *few, "--out", str(tmp_path / "run")]
    code = "import sys; sys.modules['ray'] = None\n"
    code += f"from dmrl_ray.__main__ import app\napp({command!r})"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "Adaptation on held-out tasks" in answer.stdout


def test_an_algorithm_is_at_most_two_classes_below_the_contract():
    for name in SHORT_NAMES["algorithm"]:
        if not name.startswith("rllib:"):
            lineage = import_class(name, "algorithm").__mro__
            assert lineage.index(Algorithm) <= 2, [kind.__name__ for kind in lineage]


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
