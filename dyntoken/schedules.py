"""Exact functions of the training step: learning rates and the weight average's decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from dyntoken.registry import UnknownNameError, suggest

LITTLE = 1e-3  # sum of the rates of a run, below which it teaches little
Kind = Literal["cosine", "cosine_epoch", "cosine_epoch_start", "constant"]


def learning_rate(
    kind: Kind,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_epochs: float,
    warmup_steps: int | None,
    total_steps: int,
    steps_per_epoch: int,
    cooldown_epochs: float = 0,
) -> Callable[[Any], Any]:
    """The base learning rate as a function of the step, from 0.

    - `"cosine"`: per step; W warm-up steps run linearly from `warmup_lr` to
      `lr`, both included, then half a cosine from `lr` towards `min_lr`
      (raoyongming/DynamicViT, `cosine_scheduler`).
    - `"cosine_epoch"`: timm's cosine over epochs, stepped *after* each epoch,
      as TPS and EViT call it: epoch e runs at the rate of e - 1, so the first
      two epochs both run at `warmup_lr` (at `lr` without warm-up). The cosine
      counts from epoch 0, not from the end of the warm-up.
    - `"cosine_epoch_start"`: the same, but epoch e runs at its own rate, as
      timm's and T2T-ViT's training scripts and torch's `CosineAnnealingLR` have
      it: epoch 0 at `warmup_lr`, epoch 1 one step of the warm-up higher.
    - `"constant"`: `lr` after the warm-up of `"cosine"`.

    Args:
      kind: one of the above.
      lr: peak rate.
      min_lr: rate at the end.
      warmup_lr: rate of the first step (epoch).
      warmup_epochs: length of the warm-up in epochs, may be a fraction.
      warmup_steps: the same in steps; overrides `warmup_epochs` if not None.
      total_steps: length of the run; later steps stay at `min_lr`.
      steps_per_epoch: steps per epoch.
      cooldown_epochs: epochs at `min_lr` that end the run; the cosine is over
        before them.

    Returns:
      `lr_fn(step)` of an integer step. A Python or numpy step gives a numpy
      float64, a (traced) jax step a jax float32.

    Raises:
      UnknownNameError: for an unknown kind.
      ValueError: if the lengths do not fit together, or the rate would start
        or end above its peak.
    """
    if kind not in get_args(Kind):
        raise UnknownNameError(f"unknown schedule {kind!r}: {suggest(kind, get_args(Kind))}")
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"total_steps={total_steps} and steps_per_epoch={steps_per_epoch} must be at least 1"
        )
    warm = round(warmup_epochs * steps_per_epoch) if warmup_steps is None else warmup_steps
    cool = round(cooldown_epochs * steps_per_epoch)
    if cool < 0 or (cool > 0 and (cool >= total_steps or kind == "constant")):
        raise ValueError(
            f"a cool-down of {cool} steps does not fit into a {kind} schedule of {total_steps} steps: "
            "lower config.optim.cooldown_epochs"
        )
    total_steps -= cool
    if warm < 0 or (warm > 0 and warm >= total_steps):
        raise ValueError(
            f"a warm-up of {warm} steps does not fit into a run of {total_steps}: lower "
            f"config.optim.{'warmup_epochs' if warmup_steps is None else 'warmup_steps'}, or raise "
            "config.epochs (or config.steps)"
        )

    floors = {"min_lr": min_lr if kind != "constant" else 0.0, "warmup_lr": warmup_lr if warm else 0.0}
    for name, floor in floors.items():
        if floor > lr * (1 + 1e-6):  # the same rate, scaled twice, may differ in its last bits
            raise ValueError(
                f"{name}={floor:g} lies above lr={lr:g}, so the rate would rise where it should fall: lower "
                f"optim.{name} or raise optim.lr"
            )

    def per_step(step: Any) -> Any:
        xp, at = _real(step)
        rise = warmup_lr + (lr - warmup_lr) * (at / max(warm - 1, 1))
        left = xp.clip((total_steps - at) / (total_steps - warm), 0.0, 1.0)
        fall = min_lr + (lr - min_lr) * _half_cosine(xp, left) if kind == "cosine" else lr
        return _where(xp, at < warm, rise, fall)

    def per_epoch(step: Any) -> Any:
        xp, epoch = _real(step // steps_per_epoch)  # in integers: a float quotient may round up
        at = epoch if kind == "cosine_epoch_start" else xp.maximum(epoch - 1.0, 0.0)
        epochs, warm_epochs = total_steps / steps_per_epoch, warm / steps_per_epoch
        rise = warmup_lr + (lr - warmup_lr) * (at / max(warm_epochs, 1e-9))
        fall = min_lr + (lr - min_lr) * _half_cosine(xp, xp.clip((epochs - at) / epochs, 0.0, 1.0))
        return _where(xp, at < warm_epochs, rise, fall)

    return per_epoch if kind.startswith("cosine_epoch") else per_step


def _real(step: Any) -> tuple[Any, Any]:
    """The array module that suits a step, and the step as its float."""
    if isinstance(step, (int, np.integer, np.ndarray)):
        return np, np.asarray(step, np.float64)
    return jnp, jnp.asarray(step, jnp.float32)


def _where(xp: Any, condition: Any, yes: Any, no: Any) -> Any:
    value = xp.where(condition, yes, no)
    return value[()] if xp is np else value  # a scalar rather than a 0-d array


def _half_cosine(xp: Any, left: Any) -> Any:
    """`(1 + cos(pi (1 - left))) / 2`: 1 at left = 1, 0 at left = 0.

    Written as a squared sine, which in float32 stays exact near 0 where the
    sum would cancel.
    """
    return xp.square(xp.sin(left * (math.pi / 2)))


def step_warning(lr_fn: Callable[[Any], Any], steps: int, warm: int) -> str | None:
    """One line where a run under AdamW is too short, or its rate too low, to teach much.

    AdamW moves a weight by about the learning rate a step, so that the sum of the rates bounds how far
    one gets. Weights are some hundredths in size: below `LITTLE` in all, the run ends where it began.

    Args:
      lr_fn: see `learning_rate`.
      steps: of the run.
      warm: of them the warm-up.
    """
    rates = lr_fn(np.linspace(0, steps - 1, min(steps, 1000)).astype(int))
    if (total := float(np.mean(rates)) * steps) >= LITTLE:
        return None
    return (
        f"{steps} steps, {warm} of them warm-up, rate at most {np.max(rates):.3g}: little will be learnt (no weight "
        f"moves further than about {total:.1g}): raise epochs or optim.lr, or lower batch or warm-up"
    )


def ema_decay(step: Any, decay: float) -> tuple[Any, Any]:
    """`(kept, taken)` shares of the average and of the new weights under a decay that warms up.

    `min(decay, (1 + step) / (10 + step))`, so that the average forgets its start
    within some tens of steps, however long it remembers later: TensorFlow's
    `ExponentialMovingAverage` with `num_updates`.

    Args:
      step: updates done before this one, a traced integer.
      decay: of the long run.
    """
    at = jnp.asarray(step, jnp.float32)
    # Each share by itself: float32 has no good 1 - 0.99996.
    return jnp.minimum(decay, (1 + at) / (10 + at)), jnp.maximum(1.0 - decay, 9 / (10 + at))


def ema_start(steps: int, decay: float, *, warmup: bool) -> float:
    """The share, in [0, 1], that the start has in the average after so many steps."""
    if not warmup:
        return decay**steps
    # (1 + k) / (10 + k) reaches the decay at k = (10 decay - 1) / (1 - decay).
    rising = min(steps, max(0, math.ceil((10 * decay - 1) / (1 - decay))))
    logs = math.lgamma(rising + 1) + math.lgamma(10) - math.lgamma(rising + 10)
    return math.exp(logs) * decay ** (steps - rising)


def ema_warning(steps: int, decay: float, *, warmup: bool) -> str | None:
    """One line where the average is still to a good part (over 20 %) what the run started from."""
    share = ema_start(steps, decay, warmup=warmup)
    if not decay or share <= 0.2:
        return None
    return (
        f"the weight average is still {100 * share:.0f} % the start of the run (decay {decay:g}, step {steps}): "
        "the trained weights are those without average (load_weights: prefer='params'); ema_warmup=True or a "
        "smaller ema would forget the start sooner"
    )
