"""The contract of task families, their spaces, and the errors of external environments."""

from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference

__all__ = ["Reference", "TaskDistribution", "TaskVectorEnv", "make_tasks", "split_stream"]
