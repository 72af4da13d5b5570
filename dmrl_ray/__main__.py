"""The command line: ``python -m dmrl_ray``, or ``dmrl`` where it is installed.

Heavy imports are inside the commands, so that ``--help`` is fast.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dmrl_ray import __version__

if TYPE_CHECKING:
    from dmrl_ray.config.schema import RunConfig
    from dmrl_ray.types import Split

app = typer.Typer(
    help="Train policies that adapt: run a config, resume it, inspect the results.",
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
    """Completes the dotted name of a setting or, after ``=``, one of its allowed values."""
    from dmrl_ray.config.loading import choices_of

    name, equals, prefix = incomplete.partition("=")
    choices = choices_of(_load(context.params["config"], ()))
    if not equals:
        return [f"{found}=" for found in choices if found.startswith(name)]
    return [f"{name}={value}" for value in choices.get(name, ()) if value.startswith(prefix)]


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
        help="Overrides of settings, such as algorithm.lr=1e-3.",
        autocompletion=_complete_setting,
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, or the name of a run in runs/ or its beginning.",
        autocompletion=_complete_run,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster; by default, this machine."),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Allow reading RLlib's pickles in the run, which can run code."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmrl_ray {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Makes modules in the working directory importable."""
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
        typer.Option(help="The run folder; by default, runs/NAME-DATE-TIME."),
    ] = None,
    address: Address = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in OUT, if there is one, with CONFIG.")
    ] = False,
    trust: Trust = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the contents of OUT.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run all stages of a config."""
    with report_errors(verbose):
        settings = _load(config, overrides or ())
        if (out is None or not out.is_absolute()) and "_ray_pkg_" in str(Path.cwd()):
            _warn(
                "a Ray job's working directory is deleted at its end; give --out an absolute path"
            )
        from dmrl_ray.config.paths import new_run_folder
        from dmrl_ray.control import controller
        from dmrl_ray.results.display import Display
        from dmrl_ray.store.run_folder import local_path

        with nullcontext(out) if out is not None else new_run_folder(settings.name) as place:
            folder = local_path(place)
            with _resumable(folder), _locate_errors(config, overrides or ()), Display() as display:
                if resume and (folder / "run.json").exists():
                    controller.resume(
                        folder, config=settings, address=address, trust=trust, display=display
                    )
                else:
                    controller.run(
                        settings, folder, address=address, overwrite=overwrite, display=display
                    )
            _show_end(folder)


@app.command()
def resume(
    run: RunName,
    overrides: Overrides = None,
    address: Address = None,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Resume a run from its last commit; stages.NAME.env_steps=MORE trains for longer."""
    with report_errors(verbose):
        folder = _find_run(run)
        from dmrl_ray.config.loading import locate_errors
        from dmrl_ray.control import controller
        from dmrl_ray.results.display import Display

        located = locate_errors(folder / "config.yaml", overrides or ())
        with _resumable(folder), located, Display() as display:
            controller.resume(
                folder, overrides=overrides or (), address=address, trust=trust, display=display
            )
        _show_end(folder)


@app.command()
def evaluate(
    run: RunName,
    stage: Annotated[
        str | None,
        typer.Option(help="Stage whose policy to evaluate; by default, the last trained one."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 256,
    trials: Annotated[int, typer.Option(min=1, help="Trials on each task.")] = 1,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    json: Annotated[bool, typer.Option("--json", help="Print the episodes as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a policy of a run on held-out tasks."""
    with report_errors(verbose):
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
            _say(report.evaluation_report(frame))


@app.command()
def report(run: RunName, verbose: Verbose = False) -> None:
    """Show the results of a run."""
    with report_errors(verbose):
        folder = _find_run(run)
        from dmrl_ray.results.report import text_report

        _say(text_report(folder))


@app.command()
def tasks(verbose: Verbose = False) -> None:
    """List the task families."""
    with report_errors(verbose):
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
    with report_errors(verbose):
        settings = _load(config, overrides or ())
        if resolved:
            from dmrl_ray.config.loading import resolved as resolved_text

            typer.echo(resolved_text(settings), nl=False)
        else:
            from dmrl_ray.control.checks import check
            from dmrl_ray.jobs.memory import summary

            with _locate_errors(config, overrides or ()):
                memory = check(settings)
            stages = ", ".join(f"{name} ({s.type})" for name, s in settings.stages.items())
            typer.echo(f"{config}: valid; stages: {stages}")
            if memory:
                typer.echo(f"memory: {summary(memory)}")


@app.command()
def verify(run: RunName, verbose: Verbose = False) -> None:
    """Verify the files of a run against the checksums in its commits."""
    with report_errors(verbose):
        folder = _find_run(run)
        from dmrl_ray.errors import CorruptRun
        from dmrl_ray.store.commit_records import verify as problems_of
        from dmrl_ray.store.run_folder import files_of_others

        problems = problems_of(folder)
        for path in files_of_others(folder):
            _say(f"{path}: is not of this run, and left alone")
        if problems:
            _say("\n".join(problems))
            raise CorruptRun(f"{folder}: {len(problems)} problem(s) found")
        _say(f"{folder}: every file matches its commit")


@app.command()
def reproduce(
    run: RunName,
    event: Annotated[
        int | None, typer.Argument(help="Number of the fault in the run; by default, the newest.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Play again what led to the fault of an environment."""
    with report_errors(verbose):
        folder = _find_run(run)
        from dmrl_ray.control.reproduction import find_fault
        from dmrl_ray.control.reproduction import reproduce as play_again
        from dmrl_ray.types import EnvironmentFault

        fault = find_fault(folder, event)
        typer.echo(f"fault {fault['number']}: {fault['message']}")
        try:
            play_again(folder, fault)
        except EnvironmentFault as error:
            traceback.print_exception(error.__cause__ or error)
            raise
        typer.echo("it did not show again: it depends on more than the seed and the actions")


@app.command()
def export(
    run: RunName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Output folder; it must not exist.")
    ],
    to: Annotated[str, typer.Option(help="rllib: a policy; rllib-data: recorded transitions.")],
    stage: Annotated[
        str | None,
        typer.Option(help="A stage or fine-tuned job; by default, the last trained stage."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    verbose: Verbose = False,
) -> None:
    """Export a policy, or recorded transitions, to RLlib."""
    with report_errors(verbose):
        _choose("--to", to, ("rllib", "rllib-data"))
        _choose("--checkpoint", checkpoint, ("best", "last"))
        source = _find_run(run)
        from dmrl_ray.store.run_folder import refuse_url

        refuse_url(folder)
        if not verbose:  # RLlib warns that its own API is experimental.
            logging.getLogger("ray").setLevel(logging.ERROR)
        if to == "rllib":
            from dmrl_ray.rllib.policies import export_policy

            name = export_policy(source, folder.absolute(), stage=stage, checkpoint=checkpoint)
            _say(f"{folder}: policy {name}, for dmrl_ray.rllib.policies.exported('{folder}')")
        else:
            from dmrl_ray.rllib.data import export_steps

            steps = export_steps(source, folder.absolute(), stage=stage)
            _say(f"{folder}: {steps:,} steps, for offline_data(input_=['{folder}'])")


@contextmanager
def report_errors(verbose: bool) -> Iterator[None]:
    """Shows errors that the user can fix as one sentence; exits with the code of the error."""
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
        message = sentence(error)
        if verbose or message is None:
            _say("".join(traceback.format_exception(error)), err=True)
        notes = getattr(error, "__notes__", ())
        _say("\n".join([message or f"error: {FAULT}", *notes]), err=True)
        raise typer.Exit(exit_code(error)) from error


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Shows how to resume a run that was interrupted, or to play the fault of an environment."""
    from dmrl_ray.errors import Interrupted
    from dmrl_ray.types import EnvironmentFault

    try:
        yield
    except EnvironmentFault as error:
        if error.number is not None:
            command = f"python -m dmrl_ray reproduce {_shown(folder)} {error.number}"
            error.add_note(f"play it again with: {command}")
        raise
    except Interrupted as error:
        how = "interrupted before the run began"
        if (folder / "run.json").exists():
            how = f"interrupted; resume with: python -m dmrl_ray resume {_shown(folder)}"
        _say(how, err=True)
        raise typer.Exit(error.exit_code) from error


def _shown(folder: Path) -> Path:
    """Returns the folder relative to the working directory, where it is inside."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _load(name: str, overrides: Sequence[str]) -> RunConfig:
    from dmrl_ray.config.loading import load_config
    from dmrl_ray.config.paths import find_config

    return load_config(find_config(name), overrides)


def _locate_errors(name: str, overrides: Sequence[str]) -> AbstractContextManager[None]:
    from dmrl_ray.config.loading import locate_errors
    from dmrl_ray.config.paths import find_config

    return locate_errors(find_config(name), overrides)


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
    _say(f"warning: {text}", err=True)


def _say(text: str, *, err: bool = False) -> None:
    """Shows a text with the control characters of others escaped; an output may fail."""
    from dmrl_ray.errors import printable

    with suppress(OSError, ValueError):
        typer.echo(printable(text), err=err)


def _show_end(folder: Path) -> None:
    from dmrl_ray.results.report import next_steps, text_report

    _say(text_report(folder))
    _say(f"\n{next_steps(_shown(folder))}")


def command_line(program: str | None = None) -> None:
    """Runs a command in a process of its own."""
    from dmrl_ray.errors import ClusterError

    code = None
    try:
        app(prog_name=program)
    except SystemExit as end:
        code = end.code
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):  # Python would exit with 120.
                with suppress(AttributeError, OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(code, int) and (code == ClusterError.exit_code or code > 128):
            # Ray's orderly end takes seconds, or a minute without a cluster; if local, it ends now.
            os._exit(code)


if __name__ == "__main__":
    command_line("python -m dmrl_ray")
