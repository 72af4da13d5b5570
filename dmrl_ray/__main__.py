"""The command line: ``python -m dmrl_ray``, or ``dmrl`` where it is installed.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dmrl_ray import __version__

if TYPE_CHECKING:
    from dmrl_ray.config.schema import RunConfig
    from dmrl_ray.types import Split

app = typer.Typer(
    help="Train policies that adapt: run a config, resume it, look at what came out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete_config(incomplete: str) -> list[str]:
    from dmrl_ray.config.paths import packaged_configs

    files = [str(file) for file in Path().glob(f"{incomplete}*") if file.suffix == ".yaml"]
    folders = [f"{file}/" for file in Path().glob(f"{incomplete}*") if file.is_dir()]
    return [name for name in packaged_configs() if name.startswith(incomplete)] + files + folders


def _complete_run(incomplete: str) -> list[str]:
    from dmrl_ray.config.paths import runs_here

    return [name for name in runs_here() if name.startswith(incomplete)]


def _complete_setting(context: typer.Context, incomplete: str) -> list[str]:
    """Dotted names of a config's settings, or the values that one can take, if they are few."""
    from dmrl_ray.config.loading import choices_of

    name, equals, begun = incomplete.partition("=")
    choices = choices_of(_load(context.params["config"], ()))
    if not equals:
        return [f"{found}=" for found in choices if found.startswith(name)]
    return [f"{name}={value}" for value in choices.get(name, ()) if value.startswith(begun)]


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more; show tracebacks.")]
ConfigName = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or quickstart or smoke.",
        autocompletion=_complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to change, as algorithm.lr=1e-3.",
        autocompletion=_complete_setting,
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's folder, or its name or its start in runs/.",
        autocompletion=_complete_run,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use; without it, this machine."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmrl_ray {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it, and end."),
    ] = False,
) -> None:
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
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder; without it, runs/NAME-DATE-TIME."),
    ] = None,
    address: Address = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with OUT if it is begun, by CONFIG.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run all stages of a config."""
    with errors_told(verbose):
        settings = _load(config, overrides or ())
        out = out or Path("runs") / f"{settings.name[:48]}-{datetime.now():%Y%m%d-%H%M%S}"
        if not out.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
            _warn("a Ray job's working directory is thrown away; give --out an absolute path")
        from dmrl_ray.control import controller
        from dmrl_ray.results.display import Display

        folder = out.absolute()
        with _resumable(folder), _places_told(config, overrides or ()), Display() as display:
            if resume and (folder / "run.json").exists():
                controller.resume(folder, config=settings, address=address, display=display)
            else:
                controller.run(
                    settings, folder, address=address, overwrite=overwrite, display=display
                )
        _show_end(folder)


@app.command()
def resume(
    run: RunName, overrides: Overrides = None, address: Address = None, verbose: Verbose = False
) -> None:
    """Go on with a run from its last commit; stages.NAME.env_steps=MORE trains for longer."""
    with errors_told(verbose):
        folder = _find_run(run)
        from dmrl_ray.config.loading import places_told
        from dmrl_ray.control import controller
        from dmrl_ray.results.display import Display

        told = places_told(folder / "config.yaml", overrides or ())
        with _resumable(folder), told, Display() as display:
            controller.resume(folder, overrides=overrides or (), address=address, display=display)
        _show_end(folder)


@app.command()
def evaluate(
    run: RunName,
    stage: Annotated[
        str | None,
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
        folder = _find_run(run)
        from dmrl_ray.control import controller
        from dmrl_ray.results import report

        frame = controller.evaluate(
            folder,
            stage=stage,
            split=cast("Split", split),
            tasks=tasks,
            trials=trials,
            checkpoint=checkpoint,
        )
        if json:
            typer.echo(frame.to_json(orient="records", date_format="iso"))
        else:
            typer.echo(report.evaluation_report(frame))


@app.command()
def report(run: RunName, verbose: Verbose = False) -> None:
    """Show what a run achieved."""
    with errors_told(verbose):
        folder = _find_run(run)
        from dmrl_ray.results.report import text_report

        typer.echo(text_report(folder))


@app.command()
def tasks(verbose: Verbose = False) -> None:
    """List the task families."""
    with errors_told(verbose):
        from dmrl_ray.results.report import families_report

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
            from dmrl_ray.config.loading import resolved as resolved_text

            typer.echo(resolved_text(settings), nl=False)
        else:
            from dmrl_ray.control.checks import check
            from dmrl_ray.jobs.memory import summary

            with _places_told(config, overrides or ()):
                held = check(settings)
            stages = ", ".join(f"{name} ({s.type})" for name, s in settings.stages.items())
            typer.echo(f"{config}: valid; stages: {stages}")
            if held:
                typer.echo(f"memory: {summary(held)}")


@app.command()
def verify(run: RunName, verbose: Verbose = False) -> None:
    """Check every file of a run against its commits."""
    with errors_told(verbose):
        folder = _find_run(run)
        from dmrl_ray.errors import CorruptRun
        from dmrl_ray.store.commits import verify as problems_of

        if problems := problems_of(folder):
            typer.echo("\n".join(problems))
            raise CorruptRun(f"{folder}: {len(problems)} problem(s) found")
        typer.echo(f"{folder}: every file agrees with its commit")


@app.command()
def export(
    run: RunName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; it must not exist.")],
    to: Annotated[str, typer.Option(help="rllib: a policy; rllib-data: recorded steps.")],
    stage: Annotated[
        str | None,
        typer.Option(help="Which stage's, or fine-tuned job's; the last trained if left out."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    verbose: Verbose = False,
) -> None:
    """Hand a policy, or recorded steps, to RLlib."""
    with errors_told(verbose):
        _choose("--to", to, ("rllib", "rllib-data"))
        _choose("--checkpoint", checkpoint, ("best", "last"))
        source = _find_run(run)
        if not verbose:  # RLlib warns of itself.
            logging.getLogger("ray").setLevel(logging.ERROR)
        if to == "rllib":
            from dmrl_ray.rllib.policies import export_policy

            name = export_policy(source, folder.absolute(), stage=stage, checkpoint=checkpoint)
            typer.echo(f"{folder}: policy {name}, for dmrl_ray.rllib.policies.exported('{folder}')")
        else:
            from dmrl_ray.rllib.data import export_steps

            steps = export_steps(source, folder.absolute(), stage=stage)
            typer.echo(f"{folder}: {steps:,} steps, for offline_data(input_=['{folder}'])")


@contextmanager
def errors_told(verbose: bool) -> Iterator[None]:
    """Turn what a user can do something about into one sentence and an exit code."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    from dmrl_ray.errors import FAULT, exit_code, sentence

    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, typer.Exit | typer.Abort):
            raise
        told = sentence(error)
        if verbose or told is None:
            traceback.print_exception(error)
        typer.echo(told or f"error: {FAULT}", err=True)
        raise typer.Exit(exit_code(error)) from error


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """An interruption after a clean commit says how to go on."""
    from dmrl_ray.errors import Interrupted

    try:
        yield
    except Interrupted as error:
        command = f"python -m dmrl_ray resume {_shown(folder)}"
        typer.echo(f"interrupted; resume with: {command}", err=True)
        raise typer.Exit(error.exit_code) from error


def _shown(folder: Path) -> Path:
    """The folder as the user would type it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _load(name: str, overrides: Sequence[str]) -> RunConfig:
    from dmrl_ray.config.loading import load_config
    from dmrl_ray.config.paths import find_config

    return load_config(find_config(name), overrides)


def _places_told(name: str, overrides: Sequence[str]) -> AbstractContextManager[None]:
    from dmrl_ray.config.loading import places_told
    from dmrl_ray.config.paths import find_config

    return places_told(find_config(name), overrides)


def _find_run(name: str) -> Path:
    from dmrl_ray.config.paths import find_run

    return find_run(name)


def _choose(option: str, value: str, allowed: Sequence[str]) -> None:
    from dmrl_ray.config.components import did_you_mean
    from dmrl_ray.errors import ConfigError

    if value not in allowed:
        hint = did_you_mean(value, allowed) or f"; choose one of {', '.join(allowed)}"
        raise ConfigError(f"command line: {option}: found '{value}'{hint}")


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _show_end(folder: Path) -> None:
    from dmrl_ray.results.report import next_steps, text_report

    typer.echo(text_report(folder))
    typer.echo(f"\n{next_steps(_shown(folder))}")


if __name__ == "__main__":
    app(prog_name="python -m dmrl_ray")
