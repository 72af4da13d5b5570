"""The command line: ``python -m dmrl_ray``, or ``dmrl`` where it is installed.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dmrl_ray.config import RunConfig

app = typer.Typer(
    help="Train policies that adapt: run a config, resume it, look at what came out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more; show tracebacks.")]
ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or quickstart or smoke.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045, typer evaluates this on Python 3.10
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, as algorithm.lr=1e-3."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, or its name or its start in runs/.")
]
Address = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Ray cluster to use; without it, this machine."),
]
INTERRUPTED = (130, 143)


@app.callback()
def main() -> None:
    """Make the user's own modules, in the working directory, importable."""
    try:
        here = os.getcwd()
    except OSError:  # The working directory was deleted.
        return
    if here not in sys.path:
        sys.path.append(here)


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of runs; the run makes one in it.")] = Path(
        "runs"
    ),
    address: Address = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run of this name.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run all stages of a config."""
    with errors_told(verbose):
        settings = _load(config, overrides or ())
        if not out.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
            _warn("a Ray job's working directory is thrown away; give --out an absolute path")
        from dmrl_ray import controller
        from dmrl_ray.display import Display

        with Display() as display:
            folder = controller.run(
                settings, out.absolute(), address=address, overwrite=overwrite, display=display
            )
        _show_end(folder)


@app.command()
def resume(run: RunName, address: Address = None, verbose: Verbose = False) -> None:
    """Go on with a run from its last commit."""
    with errors_told(verbose):
        folder = find_run(run)
        from dmrl_ray import controller
        from dmrl_ray.display import Display

        with Display() as display:
            folder = controller.resume(folder, address=address, display=display)
        _show_end(folder)


@app.command()
def evaluate(
    run: RunName,
    stage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Stage whose policy to evaluate; the last trained one if left out."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 256,
    trials: Annotated[int, typer.Option(min=1, help="Trials on each task.")] = 1,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    json: Annotated[bool, typer.Option("--json", help="Print the episodes as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Play held-out tasks with a policy of a run."""
    with errors_told(verbose):
        _choose("--split", split, ("train", "validation", "test"))
        _choose("--checkpoint", checkpoint, ("best", "last"))
        folder = find_run(run)
        from dmrl_ray import controller, report

        frame = controller.evaluate(
            folder, stage=stage, split=split, tasks=tasks, trials=trials, checkpoint=checkpoint
        )
        if json:
            typer.echo(frame.to_json(orient="records", date_format="iso"))
        else:
            typer.echo(report.evaluation_report(frame))


@app.command()
def report(run: RunName, verbose: Verbose = False) -> None:
    """Show what a run achieved."""
    with errors_told(verbose):
        folder = find_run(run)
        from dmrl_ray.report import text_report

        typer.echo(text_report(folder))


@app.command()
def tasks(verbose: Verbose = False) -> None:
    """List the task families."""
    with errors_told(verbose):
        from dmrl_ray.report import families_report

        typer.echo(families_report())


@app.command()
def config(
    config: ConfigName,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting.")] = False,
    verbose: Verbose = False,
) -> None:
    """Check a config, or print it with every default."""
    with errors_told(verbose):
        settings = _load(config, overrides or ())
        if resolved:
            from dmrl_ray.yaml_config import resolved as resolved_text

            typer.echo(resolved_text(settings), nl=False)
        else:
            stages = ", ".join(f"{name} ({s.type})" for name, s in settings.stages.items())
            typer.echo(f"{config}: valid; stages: {stages}")


@app.command()
def verify(run: RunName, verbose: Verbose = False) -> None:
    """Check every file of a run against its commits."""
    with errors_told(verbose):
        folder = find_run(run)
        from dmrl_ray.commits import verify as problems_of
        from dmrl_ray.errors import CorruptRun

        if problems := problems_of(folder):
            typer.echo("\n".join(problems))
            raise CorruptRun(f"{folder}: {len(problems)} problem(s) found")
        typer.echo(f"{folder}: every file agrees with its commit")


@contextmanager
def errors_told(verbose: bool) -> Iterator[None]:
    """Turn what a user can do something about into one sentence and an exit code."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, typer.Exit | typer.Abort):
            raise
        told = _sentence(error)
        if verbose or told is None:
            traceback.print_exception(error)
        typer.echo(told or "error: this is a fault of dmrl_ray; please report it", err=True)
        raise typer.Exit(_exit_code(error)) from error


def _exit_code(error: BaseException) -> int:
    from dmrl_ray.errors import exit_code

    if isinstance(error, KeyboardInterrupt) and not hasattr(error, "exit_code"):
        return 130
    return 2 if isinstance(error, ModuleNotFoundError) else exit_code(error)


def _sentence(error: BaseException) -> str | None:
    """What to tell the user; None for an error that only we can mend."""
    from dmrl_ray.errors import ConfigError, DmrlError

    if getattr(error, "exit_code", None) in INTERRUPTED:
        folder = getattr(error, "folder", None) or str(error)
        return f"interrupted; resume with: python -m dmrl_ray resume {folder}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("dmrl_ray"):
        return f"error: the package '{error.name}' is not installed; try: pip install {error.name}"
    if isinstance(error, ConfigError) and "\n" in str(error):
        return f"error: the config cannot be used\n{error}"
    if isinstance(error, DmrlError | ValueError | OSError) or hasattr(error, "exit_code"):
        return f"error: {error}"
    return None


def find_config(name: str) -> Path:
    """The file of that path, or the packaged config of that name.

    Raises:
        ConfigError: there is neither.
    """
    import dmrl_ray
    from dmrl_ray.errors import ConfigError
    from dmrl_ray.settings import did_you_mean

    if Path(name).is_file():
        return Path(name)
    found = {
        file.stem: file
        for root in reversed(list(dmrl_ray.__path__))
        for file in (Path(root) / "configs").glob("*.yaml")
    }
    if name in found:
        return found[name]
    known = f"; packaged configs: {', '.join(sorted(found)) or 'none'}"
    raise ConfigError(f"{name}: there is no such file{did_you_mean(name, found) or known}")


def find_run(name: str) -> Path:
    """The run folder of that path, or the run in ``runs/`` whose name starts so.

    Raises:
        ConfigError: there is none, or more than one.
    """
    from dmrl_ray.errors import ConfigError
    from dmrl_ray.settings import did_you_mean

    if (Path(name) / "run.json").is_file():
        return Path(name).absolute()
    runs = {file.parent.name: file.parent for file in Path("runs").glob("*/run.json")}
    found = [run for run in sorted(runs) if run.startswith(name)]
    if name in runs or len(found) == 1:
        return runs[name if name in runs else found[0]].absolute()
    if found:
        raise ConfigError(f"{name}: more than one run starts so: {', '.join(found)}")
    raise ConfigError(f"{name}: there is no such run{did_you_mean(name, runs)}")


def _load(name: str, overrides: Sequence[str]) -> RunConfig:
    from dmrl_ray.yaml_config import load_config

    return load_config(find_config(name), overrides)


def _choose(option: str, value: str, allowed: Sequence[str]) -> None:
    from dmrl_ray.errors import ConfigError
    from dmrl_ray.settings import did_you_mean

    if value not in allowed:
        hint = did_you_mean(value, allowed) or f"; choose one of {', '.join(allowed)}"
        raise ConfigError(f"command line: {option}: found '{value}'{hint}")


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _show_end(folder: Path) -> None:
    from dmrl_ray.report import next_steps, text_report

    typer.echo(text_report(folder))
    typer.echo(next_steps(folder))


if __name__ == "__main__":
    app(prog_name="python -m dmrl_ray")
