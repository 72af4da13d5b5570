"""Who raised an error in the middle of an environment's call: the environment or a signal."""

import os
import signal

import pytest

from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.errors import Interrupted
from dmrl_ray.tasks.faults import answer_of, contain_exit
from dmrl_ray.types import EnvironmentFault

FAMILY = PointGoal(PointGoal.Config())


@pytest.fixture
def handle():
    """Sets a handler of SIGINT until the test ends."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def call(raised):
    def step():
        raise raised

    answer_of(FAMILY, step)


def interrupt():
    def step():
        signal.raise_signal(signal.SIGINT)

    answer_of(FAMILY, step)


@pytest.mark.parametrize("raised", [SystemExit(0), KeyboardInterrupt(), Interrupted(2)])
def test_what_an_environment_raises_is_its_fault(raised, handle):
    handle(lambda *_: None)
    name = type(raised).__name__
    with pytest.raises(EnvironmentFault, match=f"family 'point_goal': step raised {name}: "):
        call(raised)


def test_what_a_handler_of_signals_raises_is_not(handle):
    def stop(*_):
        raise SystemExit(143)

    handle(stop)
    with pytest.raises(SystemExit):
        interrupt()


def test_ctrl_c_without_a_handler_of_ours_interrupts(handle):
    handle(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_handler_of_signals_may_end_the_process_while_an_environment_steps(handle):
    child = os.fork()
    if not child:
        contain_exit()
        handle(lambda *_: os._exit(7))
        try:
            interrupt()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
