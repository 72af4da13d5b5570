"""What a task family must do, its spaces, and what environments do wrong."""

from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv, make_tasks, split_stream

__all__ = ["TaskDistribution", "TaskVectorEnv", "make_tasks", "split_stream"]
