"""The paths of a row and of a gradient are as docs/architecture.md lists them."""

import re
import sys
from pathlib import Path

import pytest

import dmrl_ray
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller, train_loop
from dmrl_ray.results.display import Display

PACKAGE = Path(dmrl_ray.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text()
CONFIG = """
tasks: cartpole
network: {encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 300, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 2}
workers: {num: 0}
learners: {threads: 1}
commit: {every_updates: 1}
stages:
  trained: {type: pretrain, env_steps: 1800, validate_every: 100, validation_tasks: 2}
"""


def path(of):
    """The hops of a list in the page: files or folders, and functions ("" if none is named)."""
    section = PAGE.partition(f"## The path of a {of}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/.]+)`(?: `([\w.]+)`)?", section, re.M)


def besides():
    found = PAGE.partition("on neither path: ")[2]
    return set(re.findall(r"`([\w/.]+)`", found))


@pytest.fixture(scope="module")
def update(tmp_path_factory):
    """File and function of every call and return in the second of three updates."""
    events, iterations = [], []
    iterate = train_loop.CollectAndUpdate.iterate

    def counted(self, progress):
        iterations.append(None)
        return iterate(self, progress)

    def trace(frame, event, _):
        code = frame.f_code
        if len(iterations) == 2 and event in ("call", "return"):
            file = Path(code.co_filename)
            if file.is_relative_to(PACKAGE):
                events.append((str(file.relative_to(PACKAGE)), code.co_qualname))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_loop.CollectAndUpdate, "iterate", counted)
        sys.setprofile(trace)
        try:
            folder = tmp_path_factory.mktemp("traced") / "run"
            controller.run(parse_config(CONFIG, "config"), folder, display=Display(quiet=True))
        finally:
            sys.setprofile(None)
    assert len(iterations) == 3
    return events


@pytest.mark.parametrize("of", ["row", "gradient"])
def test_an_update_enters_the_listed_functions_in_order(update, of):
    events = iter(update)
    for file, function in path(of):
        whole = not function  # a folder counts once
        assert any(
            entered.startswith(file) if whole else (entered, called) == (file, function)
            for entered, called in events
        ), f"{file} {function} is not entered after the hop before it"


def test_an_update_enters_no_other_file(update):
    listed = {file for of in ("row", "gradient") for file, _ in path(of)} | besides()
    folders = tuple(name for name in listed if name.endswith("/"))
    entered = {file for file, _ in update if not file.startswith(folders)}
    assert entered == {name for name in listed if not name.endswith("/")}


def test_the_paths_are_short():
    assert len({file for file, _ in path("row")}) <= 10
    assert len({file for file, _ in path("gradient")}) <= 14
