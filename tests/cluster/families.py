"""Task families with faults that the tests of liveness are about, importable in workers."""

import os
import signal
import time

from dmrl_ray.envs.point_goal import PointGoal, PointGoalVectorEnv

SECONDS = 4.0


class SleepyEnv(PointGoalVectorEnv):
    def begin(self, env_ids):
        time.sleep(SECONDS)
        super().begin(env_ids)


class Sleepy(PointGoal):
    """Every reset sleeps."""

    def make_vec(self, num_envs):
        return SleepyEnv(num_envs, self.config.horizon)


class LoopingEnv(PointGoalVectorEnv):
    def begin(self, env_ids):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            pass
        super().begin(env_ids)


class Looping(PointGoal):
    """Every reset computes."""

    def make_vec(self, num_envs):
        return LoopingEnv(num_envs, self.config.horizon)


class EndingEnv(PointGoalVectorEnv):
    def step(self, actions):
        os.kill(os.getpid(), signal.SIGKILL)


class Ending(PointGoal):
    """Its first step ends the process."""

    def make_vec(self, num_envs):
        return EndingEnv(num_envs, self.config.horizon)


class BlockedEnv(PointGoalVectorEnv):
    @property
    def idle(self):  # Asked by the sampler, outside any call of the environment.
        time.sleep(1e6)

    @idle.setter
    def idle(self, value):
        time.sleep(1e6)


class Blocked(PointGoal):
    """Makes the sampler wait for ever outside environments."""

    def make_vec(self, num_envs):
        return BlockedEnv(num_envs, self.config.horizon)
