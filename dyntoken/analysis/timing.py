"""Wall time of a model on the device at hand, measured in pairs.

Two programs are timed in turn, and their ratio is taken pair by pair: drift of
clock speed, temperature or load hits both alike and cancels. Data loading and
transfers are not part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function and what it is called with; a call starts the work and returns its arrays."""

    fn: Any
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.fn(*self.args)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per measurement; each is the mean of `calls` calls."""

    seconds: tuple[float, ...]
    calls: int = 1

    @property
    def latency(self) -> float:
        """Median seconds of one call."""
        return float(np.median(self.seconds))

    def images_per_s(self, batch: int) -> float:
        """Images per second at the median."""
        return batch / self.latency


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two programs timed in turn; `ratios`, pair by pair, are above 1 where the second is faster."""

    first: Times
    second: Times
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, first: Times, second: Times) -> Comparison:
        """Of two of the programs that `in_turn` timed."""
        return cls(first, second, tuple(a / b for a, b in zip(first.seconds, second.seconds, strict=True)))

    @property
    def ratio(self) -> float:
        """Median of the ratios: the speed-up of the second program."""
        return float(np.median(self.ratios))

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)


def measure(run: Run, calls: int = 1) -> float:
    """Seconds per call of `run`, over `calls` calls, waiting for the last result."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def compare(first: Run, second: Run, *, pairs: int = 20, warmup: int = 2, min_s: float = 0.1) -> Comparison:
    """Times two programs in turn, every other pair in reverse order.

    Args:
      first, second: start the work and return its arrays, e.g. from `evaluation` or `training`.
      pairs: number of pairs.
      warmup: untimed calls of each (the first one compiles).
      min_s: a measurement repeats its program until it lasts about this long.

    Raises:
      ValueError: fewer than one pair.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    return Comparison.of(*in_turn((first, second), rounds=pairs, warmup=warmup, min_s=min_s))


def in_turn(
    runs: Sequence[Run], *, rounds: int = 20, warmup: int = 2, min_s: float = 0.1, pause_s: float = 0.0
) -> list[Times]:
    """Times several programs in turn, every other round in reverse order; see `compare`.

    Args:
      pause_s: seconds to wait ahead of each measurement, after which threads of another
        library that wait for work in a loop have gone to sleep.
    """
    calls = []
    for run in runs:
        once = [measure(run) for _ in range(max(warmup, 1))][-1]
        calls.append(max(1, math.ceil(min_s / max(once, 1e-6))))
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for index in range(len(runs)) if number % 2 == 0 else reversed(range(len(runs))):
            time.sleep(pause_s) if pause_s else None
            seconds[index].append(measure(runs[index], calls[index]))
    return [Times(tuple(row), count) for row, count in zip(seconds, calls, strict=True)]


def latencies(run: Run, times: Times, calls: int = 100) -> dict[str, float]:
    """Seconds of single calls, each waited for: percentiles by name, "p50", "p90" and "p99".

    Those of `times` where it has measured single calls, else so many new ones.
    """
    alone = times.seconds if times.calls == 1 else [measure(run) for _ in range(calls)]
    return {f"p{q}": float(np.percentile(alone, q)) for q in (50, 90, 99)}


def device() -> str:
    """What is timed, `"gpu: NVIDIA H100"`."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def random_variables(model: Any, seed: int = 0) -> Any:
    """Variables of the model's shapes with small values; `model.init` would compile the whole model."""
    images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) * 0.02 + float(len(leaf.shape) == 1)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(fill, shapes)


def random_images(model: Any, batch: int, seed: int = 0) -> jax.Array:
    """Normal noise `[batch, H, W, C]` float32 on the device."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, *model.input_shape), np.float32))


def evaluation(model: Any, variables: Any, images: Any) -> Program:
    """A forward pass in evaluation, image tensor to logits; `images` may be a shape, to compile only."""
    return Program(
        jax.jit(lambda variables, images: model.apply(variables, images).logits), (variables, images)
    )


def training(
    model: Any, variables: Any, images: Any, optimizer: bool = False, teacher: tuple[Any, Any] | None = None
) -> Program:
    """A training pass: forward in training mode, cross-entropy, gradient in every parameter.

    A method with a learnt policy runs its mask form here unless the model says
    `form="gather"`, so it is no faster than the dense model; the others train at the reduced shapes.

    Args:
      optimizer: also applies AdamW, and returns its state and the new parameters; nothing is donated.
      teacher: a model and its variables; its forward pass is part of the step, and the KL to its logits of the loss.
    """
    constant = {name: value for name, value in variables.items() if name != "params"}
    teaching, known = teacher or (None, {})

    def loss(params: Any, images: jax.Array, key: jax.Array, known: Any) -> jax.Array:
        streams = dict(zip(("policy", "dropout"), jax.random.split(key), strict=True))
        mutable = list(constant) or False
        out = model.apply({"params": params, **constant}, images, train=True, rngs=streams, mutable=mutable)
        out = out[0] if mutable else out
        log_p = jax.nn.log_softmax(out.logits.astype(jnp.float32))
        total = -log_p[:, 0].mean()
        if teaching is not None:
            theirs = teaching.apply(known, images).logits.astype(jnp.float32)
            total += optax.kl_divergence(log_p, jax.nn.softmax(theirs)).mean()
        return total

    params, key = variables["params"], jax.random.key(0)
    if not optimizer:
        return Program(jax.jit(jax.grad(loss)), (params, images, key, known))
    adamw = optax.adamw(1e-3)

    def step(params: Any, state: Any, images: jax.Array, key: jax.Array, known: Any) -> Any:
        gradient = jax.grad(loss)(params, images, key, known)
        with jax.named_scope("optimizer"):
            updates, state = adamw.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

    return Program(jax.jit(step), (params, jax.jit(adamw.init)(params), images, key, known))


def exit_times(model: Any, variables: Any, images: jax.Array, *, calls: int = 5) -> np.ndarray:
    """Cumulative seconds per image, float64 `[E]`, when every image leaves at exit i.

    Each exit runs alone on the full batch `images [B, H, W, C]`, as in the early-exit
    runner when its buckets are full; the median of `calls` timed calls counts.

    Raises:
      ValueError: a model without exits, or fewer than one call.
    """
    if not model.exits:
        raise ValueError(f"{model.arch} has no exits to time")
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    upstream, seconds = None, []
    for index in range(len(model.exits)):
        step = jax.jit(functools.partial(model.apply, index=index, method="step"))
        run = functools.partial(step, variables, images, upstream)
        result = jax.block_until_ready(run())  # compiles
        seconds.append(np.median([measure(run) for _ in range(calls)]))
        upstream = result[1] if jax.tree.leaves(result[1]) else None
    return np.cumsum(seconds) / len(images)
