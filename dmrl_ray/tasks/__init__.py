"""The contract of task families, their spaces, and the errors of external environments."""

from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv, make_tasks, split_stream

__all__ = ["TaskDistribution", "TaskVectorEnv", "make_tasks", "split_stream"]
