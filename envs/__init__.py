"""Task families, one file each; imported as ``dmrl_ray.envs``."""
