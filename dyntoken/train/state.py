"""What a training run carries from one step to the next."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

Tree = Any


class TrainError(RuntimeError):
    """Training cannot go on; the message names the step and the reason."""


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds.

    Attributes:
      step: int32 scalar, number of updates done.
      params: trainable parameters.
      extra: the other collections of the model (`batch_stats`), `{}` if none.
      opt_state: state of the optimizer.
      ema: moving average of `variables`, or None.
    """

    step: jax.Array
    params: Tree
    extra: Tree
    opt_state: Tree
    ema: Tree | None

    @property
    def variables(self) -> dict[str, Tree]:
        """What `model.apply` takes."""
        return {"params": self.params, **self.extra}


def init_variables(model: nn.Module, shape: tuple[int, ...], seed: int) -> dict[str, Tree]:
    """Fresh variables for images of one `[H, W, C]` shape; the same on any number of devices."""
    return model.init(jax.random.key(seed), jnp.zeros((1, *shape), jnp.float32))


def create_state(variables: Tree, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state before the first step.

    The average starts as a copy: two leaves that share a buffer must not be
    donated to the step together.
    """
    extra, params = dict(variables), variables["params"]
    del extra["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extra=extra,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    )
