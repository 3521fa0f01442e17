"""Batch normalisation over the global batch, with torch's running statistics."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class BatchNorm(nn.Module):
    """torch's `BatchNorm2d` on `[B, ..., C]`; statistics live in "batch_stats".

    In training the statistics are those of the rows on all devices of a mapped
    axis, so that the result does not depend on their number: one more
    all-reduce of 3 C numbers forward and one backward. The running variance is
    the unbiased one, as torch's (linen's own is biased). Computed in float32.

    Running statistics are updated where the caller asks for them
    (`mutable=["batch_stats"]`); without, training normalises all the same.
    Padding rows count like any other: training batches have none.

    Attributes:
      axis: name of the mapped axis whose devices share the batch. Outside of
        such an axis (one device, `jax.jit` alone) the batch is the rows at hand.
      frozen: training, too, uses the running statistics and leaves them alone.
      momentum: weight of the new statistics in the running ones.
      eps: added to the variance.
      dtype: of the result.
    """

    axis: str | None = "data"
    frozen: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape, ones = (x.shape[-1],), nn.initializers.ones
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale, bias = self.param("scale", ones, shape), self.param("bias", nn.initializers.zeros, shape)
        mean, var = running_mean.value, running_var.value
        x = x.astype(jnp.float32)
        if train and not self.frozen:
            mean, var, count = moments(x, self.axis)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        factor = jax.lax.rsqrt(var + self.eps) * scale
        lead = (None,) * (x.ndim - 1)
        return ((x - mean[lead]) * factor[lead] + bias[lead]).astype(self.dtype)


def moments(x: Array, axis: str | None) -> tuple[Array, Array, int]:
    """Mean and (biased) variance per channel over the global batch.

    Args:
      x: `[B, ..., C]` float32, this device's rows.
      axis: mapped axis to sum over, if it is mapped.

    Returns:
      `(mean [C], variance [C], number of values per channel)`.
    """
    over = tuple(range(x.ndim - 1))
    mean = x.mean(axis=over)
    var = jnp.square(x - mean[(None,) * (x.ndim - 1)]).mean(axis=over)
    count = x.size // x.shape[-1]
    devices = axis_size(axis)
    if devices > 1:
        # Variance within the devices plus variance between them: exact where all means agree.
        own, mean, square = jax.lax.pmean(jnp.stack([var, mean, jnp.square(mean)]), axis)
        var = own + jnp.maximum(square - jnp.square(mean), 0.0)
    elif devices:
        mean, var = jax.lax.pmean((mean, var), axis)  # of one device; marks them as replicated
    return mean, var, count * max(devices, 1)


def axis_size(axis: str | None) -> int:
    """Devices along a mapped axis while tracing, 0 if there is no such axis."""
    if axis is None:
        return 0
    try:
        return jax.lax.axis_size(axis)
    except NameError:  # jax's way to say that the axis is not mapped here
        return 0
