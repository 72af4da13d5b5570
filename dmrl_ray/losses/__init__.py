"""Returns, losses and distributions as pure functions of tensors.

No function here knows a network, an optimiser, a config or a device: tensors in, tensors out.

Axes: T time steps, B environments. Every per-step tensor is (T, B). Reward ``reward[t]`` is the
one received for ``action[t]``; ``next_value[t]`` is the value of the state that action led to,
before any auto-reset.
"""
