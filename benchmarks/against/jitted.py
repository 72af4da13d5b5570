"""PPO with environment, rollout and update in one compiled JAX function.

Written for this comparison, as an upper bound of the speed on this machine, in the style of fully
compiled training (Lu et al., "Discovered Policy Optimisation", 2022), which is limited to
environments written in JAX. Compilation is not part of the measured time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.against.match import Clock, Match

NEEDS = ("jax", "optax")


class Task(NamedTuple):
    """A single environment, vectorised by `vmap`."""

    width: int  # of an observation
    actions: int
    begin: Callable[[Any], Any]  # key -> state
    observe: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]]  # key, state, action -> next, reward, end


def train(match: Match) -> Clock:
    """Trains until the clock is over."""
    import jax

    task = bandit(match) if match.memory else cartpole()
    first, iterate = compiled(match, task)
    carry = first(jax.random.key(0))
    run = jax.jit(iterate, donate_argnums=0).lower(carry).compile()
    clock, steps = Clock(match), 0
    ended: list[tuple[float, int]] = []
    while True:
        carry, (total, count) = run(carry)
        ended.append((float(total), int(count)))
        steps += match.batch
        if clock.update(steps, newest(ended, match.target[1])):
            return clock


def newest(ended: list[tuple[float, int]], window: int) -> float | None:
    """Returns the mean return of the newest iterations with at least `window` episodes."""
    total, count = 0.0, 0
    for returns, episodes in reversed(ended):
        total, count = total + returns, count + episodes
        if count >= window:
            return total / count
    return None


def cartpole() -> Task:
    """Returns CartPole-v1; the state is position, velocity, angle, angular velocity and time."""
    import jax
    import jax.numpy as jnp

    def begin(key: Any) -> Any:
        return jnp.append(jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), 0.0)

    def step(key: Any, state: Any, action: Any) -> tuple[Any, Any, Any]:
        x, v, angle, spin, t = state
        force = jnp.where(action == 1, 10.0, -10.0)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1
        pull = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
        thrust = push - 0.05 * pull * cos / 1.1
        moved = jnp.stack(
            [x + 0.02 * v, v + 0.02 * thrust, angle + 0.02 * spin, spin + 0.02 * pull, t + 1]
        )
        fell = (jnp.abs(moved[0]) > 2.4) | (jnp.abs(moved[2]) > 0.2094395)
        return moved, 1.0, fell | (moved[4] >= 500)

    return Task(4, 2, begin, lambda state: state[:4], step)


def bandit(match: Match) -> Task:
    """Returns a Bernoulli bandit; state: probabilities, last action, reward and done, and time."""
    import jax
    import jax.numpy as jnp

    pulls = match.num_steps
    arms = int(match.family().action_space.n)  # type: ignore[attr-defined]

    def begin(key: Any) -> Any:
        return jax.random.uniform(key, (arms,)), jnp.zeros(arms), 0.0, 1.0, 0

    def observe(state: Any) -> Any:
        _, action, reward, end, _ = state
        return jnp.concatenate([jnp.zeros(1), action, jnp.stack([reward, end])])

    def step(key: Any, state: Any, action: Any) -> tuple[Any, Any, Any]:
        probs, _, _, _, t = state
        reward = (jax.random.uniform(key) < probs[action]).astype(jnp.float32)
        return (probs, jax.nn.one_hot(action, arms), reward, 0.0, t + 1), reward, t + 1 >= pulls

    return Task(arms + 3, arms, begin, observe, step)


def network(match: Match, task: Task) -> tuple[Any, Any]:
    """Returns (key -> parameters) and (parameters, obs, memory -> logits, value, memory)."""
    import jax
    import jax.numpy as jnp

    act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[match.activation]
    orthogonal = jax.nn.initializers.orthogonal

    def layers(key: Any, widths: list[int], gain: float) -> list[Any]:
        keys = jax.random.split(key, len(widths))
        gains = [2**0.5] * (len(widths) - 2) + [gain]
        pairs = zip(keys, widths, widths[1:], gains, strict=False)
        return [(orthogonal(g)(k, (i, o)), jnp.zeros(o)) for k, i, o, g in pairs]

    def dense(parameters: list[Any], x: Any) -> Any:
        for weight, bias in parameters[:-1]:
            x = act(x @ weight + bias)
        return x @ parameters[-1][0] + parameters[-1][1]

    def make(key: Any) -> Any:
        one, two, three = jax.random.split(key, 3)
        inputs = match.memory or task.width
        heads = {
            "pi": layers(one, [inputs, *match.hidden, task.actions], 0.01),
            "value": layers(two, [inputs, *match.hidden, 1], 1.0),
        }
        if match.memory:
            size = (task.width + match.memory, 4 * match.memory)
            heads["cell"] = [(orthogonal(1.0)(three, size), jnp.zeros(size[1]))]
        return heads

    def apply(parameters: Any, obs: Any, memory: Any) -> tuple[Any, Any, Any]:
        if match.memory:
            h, c = memory
            gates = dense(parameters["cell"], jnp.concatenate([obs, h], -1))
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            obs = jax.nn.sigmoid(o) * jnp.tanh(c)
            memory = (obs, c)
        return dense(parameters["pi"], obs), dense(parameters["value"], obs)[..., 0], memory

    return make, apply


def compiled(match: Match, task: Task) -> tuple[Any, Any]:
    """Returns (key -> carry) and (carry -> carry, sum and number of returns)."""
    import jax
    import jax.numpy as jnp
    import optax

    make, apply = network(match, task)
    clipped = optax.clip_by_global_norm(match.max_grad_norm)
    optimizer = optax.chain(clipped, optax.adam(match.lr, eps=1e-5))
    num_envs = match.num_envs
    reset = jax.vmap(task.begin)

    def initial_memory() -> Any:
        size = (num_envs, match.memory)
        return (jnp.zeros(size), jnp.zeros(size)) if match.memory else ()

    def where(end: Any, new: Any, old: Any) -> Any:
        return jax.tree.map(
            lambda a, b: jnp.where(end.reshape(-1, *[1] * (b.ndim - 1)), a, b), new, old
        )

    def first(key: Any) -> Any:
        key, one, two = jax.random.split(key, 3)
        parameters = make(one)
        state = reset(jax.random.split(two, num_envs))
        returns = jnp.zeros(num_envs)
        return key, parameters, optimizer.init(parameters), state, initial_memory(), returns

    def act(carry: Any, key: Any) -> tuple[Any, Any]:
        parameters, state, memory, returns = carry
        obs = jax.vmap(task.observe)(state)
        logits, value, memory = apply(parameters, obs, memory)
        one, two, three = jax.random.split(key, 3)
        action = jax.random.categorical(one, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        keys = jax.random.split(two, num_envs)
        state, reward, end = jax.vmap(task.step)(keys, state, action)
        returns = returns + reward
        row = (obs, action, log_prob, value, jnp.broadcast_to(reward, (num_envs,)), end)
        ended = jnp.where(end, returns, 0.0)
        state = where(end, reset(jax.random.split(three, num_envs)), state)
        memory = where(end, initial_memory(), memory)
        return (parameters, state, memory, jnp.where(end, 0.0, returns)), (*row, ended)

    def advantages(value: Any, reward: Any, end: Any, last: Any) -> Any:
        def back(carry: Any, row: Any) -> tuple[Any, Any]:
            after, trace = carry
            v, r, e = row
            delta = r + match.gamma * after * ~e - v
            trace = delta + match.gamma * match.gae_lambda * ~e * trace
            return (v, trace), trace

        start = (last, jnp.zeros_like(last))
        return jax.lax.scan(back, start, (value, reward, end), reverse=True)[1]

    def loss(parameters: Any, part: Any) -> Any:
        obs, action, old, advantage, target = part
        if match.memory:  # Whole trials (T, B), from the initial memory.
            zeros = jnp.zeros((obs.shape[1], match.memory))

            def forward(memory: Any, x: Any) -> tuple[Any, Any]:
                logits, value, memory = apply(parameters, x, memory)
                return memory, (logits, value)

            logits, value = jax.lax.scan(forward, (zeros, zeros), obs)[1]
        else:
            logits, value, _ = apply(parameters, obs, ())
        log = jax.nn.log_softmax(logits)
        ratio = jnp.exp(jnp.take_along_axis(log, action[..., None], -1)[..., 0] - old)
        clipped = jnp.clip(ratio, 1 - match.clip, 1 + match.clip)
        policy = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = -(jnp.exp(log) * log).sum(-1).mean()
        error = 0.5 * jnp.square(value - target).mean()
        return policy + match.value_coef * error - match.entropy_coef * entropy

    def learn(carry: Any, part: Any) -> tuple[Any, None]:
        parameters, moments = carry
        gradient = jax.grad(loss)(parameters, part)
        updates, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), None

    def iterate(carry: Any) -> tuple[Any, Any]:
        key, parameters, moments, state, memory, returns = carry
        key, one, two = jax.random.split(key, 3)
        keys = jax.random.split(one, match.num_steps)
        rolled, rows = jax.lax.scan(act, (parameters, state, memory, returns), keys)
        _, state, memory, returns = rolled
        obs, action, old, value, reward, end, ended = rows
        last = apply(parameters, jax.vmap(task.observe)(state), memory)[1]
        advantage = advantages(value, reward, end, last)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        batch = (obs, action, old, advantage, target)
        axis = 1 if match.memory else 0
        if not match.memory:
            batch = jax.tree.map(lambda x: x.reshape(match.batch, *x.shape[2:]), batch)
        size = batch[1].shape[axis]

        def epoch(carry: Any, key: Any) -> tuple[Any, None]:
            order = jax.random.permutation(key, size).reshape(match.minibatches, -1)
            return jax.lax.scan(
                lambda c, i: learn(c, jax.tree.map(lambda x: jnp.take(x, i, axis), batch)),
                carry,
                order,
            )

        keys = jax.random.split(two, match.epochs)
        (parameters, moments), _ = jax.lax.scan(epoch, (parameters, moments), keys)
        carry = (key, parameters, moments, state, memory, returns)
        return carry, (ended.sum(), end.sum())

    return first, iterate
