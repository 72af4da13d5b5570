"""The connection to Ray: an instance on this machine, a running cluster, or the job's own."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError

from dmrl_ray.cluster.shipping import Shipment, shipment
from dmrl_ray.config.machine import usable_cores
from dmrl_ray.config.paths import JOB_VARIABLE, find_cluster
from dmrl_ray.config.schema import RunConfig, resolve_auto
from dmrl_ray.errors import ClusterError, ConfigError, Interrupted, JobLost
from dmrl_ray.jobs.protocols import POLL_S
from dmrl_ray.tasks.activity import mine

logger = logging.getLogger(__name__)

RayObject: TypeAlias = Any
"""An actor, a reference, or what a call of an actor returns: Ray gives none of them a type."""

START_TIMEOUT_S = 60.0
"""Time for actors to be placed and to import what they need."""

PATIENCE_S = {"here": 3.0, "cluster": 30.0}
"""Time without Ray's head process after which it is lost; that of a cluster may be restarted."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Read when NumPy is imported. Learners set their own number of threads afterwards."""

GROWTH_S = 8.0
"""Time for an autoscaler to notice that more nodes are needed."""

LONGEST_SOCKET_PATH = 107
"""Bytes that a path of a Unix socket can have."""

_NO_NETWORK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # Its port would be open on all interfaces.
}
"""Has Ray's processes listen on the loopback alone."""

_sent: list[Shipment] = []  # to the cluster, by this process


def connect(
    address: str | None, config: RunConfig, check: Callable[[], None] = lambda: None
) -> dict[str, object]:
    """Connect this process to Ray, unless it is connected already.

    Args:
        address: of a running cluster; None takes ``RAY_ADDRESS``, or the cluster that this process
            is a job of, or else starts Ray on this machine; "local" always does the latter.
        config: says how many processes there will be.
        check: called while Ray starts; what it raises ends the wait.

    Returns:
        The facts of the cluster: version, address, nodes, cpus, gpus.

    Raises:
        ClusterError: there is no connection.
    """
    # An error is in all results of a call; taken from the first, it would be logged for the others.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if not ray.is_initialized():
        cluster = find_cluster(address)
        begin = partial(_start_here, config)
        if cluster is not None:
            begin = partial(_join, cluster, inside_job=JOB_VARIABLE in os.environ)
        _in_own_thread(begin, check)
    resources = ray.cluster_resources()
    return {
        "ray": ray.__version__,
        "address": ray.get_runtime_context().gcs_address,
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "cpus": int(resources.get("CPU", 0)),
        "gpus": int(resources.get("GPU", 0)),
    }


def watch(patience_s: float, lost: Callable[[ClusterError], None], ended: threading.Event) -> None:
    """Look every second, in a thread of its own, whether the cluster is there.

    Ray's own way is to wait for a minute, and to end the process from C++ code.

    Args:
        patience_s: without a cluster.
        lost: called then.
        ended: set when nobody needs the cluster any more.
    """
    address = ray.get_runtime_context().gcs_address

    def look() -> None:
        there = time.monotonic()
        while not ended.wait(1.0):
            try:
                _knock(address)
                there = time.monotonic()
            except OSError as error:
                if not ray.is_initialized():  # The process has left it.
                    return
                if time.monotonic() - there > patience_s:
                    lost(
                        ClusterError(
                            f"the Ray cluster at {address} was lost ({error}); what is committed "
                            "is intact: resume the run"
                        )
                    )
                    return

    threading.Thread(target=look, name="ray-watch", daemon=True).start()


class Place(NamedTuple):
    """Where an actor is: its process, and the address and Ray's name of its node."""

    pid: int
    node: str
    node_id: str


def where() -> Place:
    """The place of an actor that calls this; from here on it notes what it does."""
    mine()
    node_id: str = ray.get_runtime_context().get_node_id()
    return Place(os.getpid(), ray.util.get_node_ip_address(), node_id)


def cause_of(error: RayError) -> Exception:
    """The error that an actor raised; or `JobLost` where data are gone, or the actor itself."""
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayError):
        cause = JobLost(f"data or a process of the job was lost: {first_sentence(cause)}")
    elif isinstance(cause, ImportError) and any(sent.left_out for sent in _sent):
        (sent,) = _sent
        cause = ClusterError(f"{first_sentence(cause)}; of {sent.folder} was {sent.without}")
    cause.__cause__ = error
    return cause


def first_sentence(error: Exception) -> str:
    """An error's name and the first sentence of what it says."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0]}"


def no_room(what: str, cpus: int, gpus: int = 0) -> ClusterError:
    """The error for actors that could not be placed in time."""
    total, free = ray.cluster_resources(), ray.available_resources()
    needs, has = f"{cpus} CPUs", f"{total.get('CPU', 0):g} ({free.get('CPU', 0):g} of them free)"
    if gpus:
        needs += f" and {gpus} GPUs"
        has += f" and {total.get('GPU', 0):g} ({free.get('GPU', 0):g} free)"
    return ClusterError(
        f"{what} not up after {START_TIMEOUT_S:g} s: needs {needs}, cluster has {has}"
    )


def wait_for_room(config: RunConfig, check: Callable[[], None], *, learners: bool) -> None:
    """Wait until the cluster has CPUs for all workers and learners, or launches nodes for them.

    Args:
        config: the run's; its actors have been asked for.
        check: is called while waiting; what it raises ends the wait.
        learners: whether there are learners beside the workers.

    Raises:
        ClusterError: it has too few, and does not grow.
    """
    workers, threads = resolve_auto(config.workers.num), resolve_auto(config.learners.threads)
    beside = config.learners.num * threads if learners else 0
    end = time.monotonic() + GROWTH_S
    while workers + beside > (has := int(ray.cluster_resources().get("CPU", 0))):
        check()
        if nodes_are_coming():
            return
        if time.monotonic() > end:
            also = f" and {config.learners.num} learners of {threads} threads" if beside else ""
            most = has - beside
            advice = f"set workers.num: {most}" if most > 0 else "set fewer learners.threads"
            raise ClusterError(
                f"workers.num: {workers} rollout workers{also} need {workers + beside} CPUs, and "
                f"the cluster has {has}; {advice}, or add nodes"
            )
        time.sleep(POLL_S)


def nodes_are_coming() -> bool:
    """Whether an autoscaler is launching nodes."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # There need not be an autoscaler, nor one that answers.
        return False
    return bool(status.pending_launches or status.pending_nodes)


def _start_here(config: RunConfig) -> None:
    """Ray on this machine, with as many logical CPUs as the run has processes."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's ports are open to the network. It asks for a token by itself, and given one here
        # it leaves no token file behind.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    _check_socket_paths()
    learners = config.learners.num * resolve_auto(config.learners.threads)
    cpus = max(usable_cores(), resolve_auto(config.workers.num) + learners + 1)
    # Environment variables that Ray's daemons inherit cost nothing; a runtime_env would keep the
    # workers from using processes that Ray has started in advance (1.0 s against 1.6 s each).
    # Ray's niceness of 15 made learning 3 times slower beside other busy processes.
    paths = os.pathsep.join(_own_paths())
    variables = {"PYTHONPATH": paths, "RAY_worker_niceness": "0", **_NO_NETWORK}
    with _environment({**ONE_THREAD, **variables}), _on_loopback():
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_QUIET)


def _check_socket_paths() -> None:
    """Raise ConfigError where sockets in the temporary folder would have too long a path."""
    root = get_default_ray_temp_dir()
    now = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    longest = len(os.path.join(root, now, "sockets", "plasma_store").encode())
    if longest > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"{root}: is {longest - LONGEST_SOCKET_PATH} characters too long for the temporary "
            "folder of Ray, whose sockets lie in it; set RAY_TMPDIR=/tmp, or another short path, "
            "or run with workers.num=0"
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray take the loopback as the address of this machine, as it does on macOS."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str, *, inside_job: bool) -> None:
    if inside_job:  # The job has a working directory, and variables that must not be given twice.
        runtime_env: dict[str, object] = {
            "env_vars": {k: v for k, v in ONE_THREAD.items() if k not in os.environ}
        }
    else:
        _sent[:] = [shipment(Path.cwd())]
        logger.info("sent to the cluster: %s", _sent[0])
        runtime_env = {
            "working_dir": str(_sent[0].folder),
            "excludes": _sent[0].excludes,
            "env_vars": dict(ONE_THREAD),
        }
    try:
        _knock(address)
        ray.init(address=address, runtime_env=runtime_env, **_QUIET)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"no connection to the Ray cluster at {address!r} ({first_sentence(error)}); check "
            f"that it is up, that it runs Ray {ray.__version__} and Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, and, as most clusters ask for a "
            "token, that RAY_AUTH_MODE=token is set here and ~/.ray/auth_token is the cluster's"
        ) from error


def _knock(address: str) -> None:
    """Raise OSError where no server listens; `ray.init` would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


_QUIET: dict[str, object] = {"logging_level": logging.ERROR, "log_to_driver": False}


def _own_paths() -> list[str]:
    """Where this process finds modules that are not installed."""
    installed = (sys.prefix, sys.base_prefix)
    return [p or os.getcwd() for p in sys.path if not p.startswith(installed)]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


_STARTS = threading.Lock()
"""Held by the thread that connects to Ray: one that a stop left behind goes on first."""


def _in_own_thread(begin: Callable[[], None], check: Callable[[], None]) -> None:
    """Connect to Ray in a thread, as C++ code in it heeds no signal for seconds.

    The thread lives on with the connection, because Ray's daemons end with the thread that started
    them. If `check` raises meanwhile, the process does not wait for Ray when it ends.
    """
    connected, errors = threading.Event(), list[BaseException]()

    def target() -> None:
        with _STARTS:
            try:
                if not ray.is_initialized():
                    begin()
            except BaseException as error:  # Raised where it is waited for.
                errors.append(error)
            connected.set()
        if not errors:
            threading.Event().wait()

    threading.Thread(target=target, name="ray", daemon=True).start()
    try:
        while not connected.is_set():
            connected.wait(POLL_S)
            if threading.current_thread() is threading.main_thread():
                # Ray puts a handler of C++ before Python's, which ends a process 3 s later.
                signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            check()
    except Interrupted as stopped:
        atexit.register(_leave, connected, stopped.exit_code)
        raise
    if errors:
        raise errors[0]


def _leave(connected: threading.Event, code: int) -> None:
    """End the process if Ray is still being started, which ends what there is of Ray."""
    if not connected.is_set():
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
