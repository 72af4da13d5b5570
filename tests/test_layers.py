"""The house keeps its shape: imports point down, Ray stays at the edge, files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    "types losses statistics settings config errors places yaml_text yaml_messages yaml_config",
    "arrays spaces tasks faults networks heads policy optimizers episodes finite buffers values "
    "rollout resident replay dataset data_files data_sources held_out lineage tables checkpoint "
    "commits run_folder writer",
    "algorithms",
    "spec transfer recording calls foreign averaging worker learner",
    "stages placement memory checks jobs run cluster connection pool worker_actor ray_learners "
    "display",
    "continuation controller",
    "__main__ results report_tables report rllib",
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
FIRST_WITH_RAY = 4
MAY_ENVS_IMPORT = {"types", "spaces", "tasks", "config", "envs"}

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


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_a_module_imports_only_its_own_layer_and_lower_ones(path):
    name = part(path)
    if name:
        assert name in LAYER, f"give '{name}' a layer in this test"
        assert not upward(name, path.read_text())
        assert "a relative import" not in imports(path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=short)
def test_ray_is_imported_by_the_upper_layers_only(path):
    name = part(path)
    assert not imports_ray(path.read_text()) or LAYER.get(name, 0) >= FIRST_WITH_RAY


@pytest.mark.parametrize("path", ENVS, ids=short)
def test_an_environment_knows_the_contract_alone(path):
    assert siblings(path.read_text()) <= MAY_ENVS_IMPORT
    assert not imports_ray(path.read_text())


@pytest.mark.parametrize("path", PACKAGE + ENVS, ids=short)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 500


def test_imports_inside_functions_count():
    source = "def f():\n    from dmrl_ray.controller import run\n    import ray.util\n"
    assert upward("jobs", source) == {"controller"}
    assert imports_ray(source)
    assert not upward("report", source)


def test_an_import_from_the_package_itself_counts():
    assert upward("losses", "from dmrl_ray import worker\n") == {"worker"}
