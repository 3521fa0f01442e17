"""Top-1, top-5 and loss of a classifier, exact on any number of devices.

Batches are padded to one shape and masked; what is reduced are sums, so that
no example is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any
Array = jax.Array


def make_eval_step(
    model: nn.Module, *, prepare: Callable[[Array], Array], axis: str = "data"
) -> Callable[[Tree, Mapping[str, Array]], dict[str, Array]]:
    """Builds `(variables, batch) -> sums` for one device.

    Args:
      model: returns an `Output` with logits `[b, classes]`, or `[exits, b,
        classes]`.
      prepare: uint8 images -> normalised float images, both `[b, H, W, C]`.
      axis: name of the mapped axis over devices.

    The batch holds `image`, `label` int32 `[b]` and `mask` `[b]` (0.0 for
    padding). With `labels` bool `[b, classes]` besides (`imagenet2012_real`) a
    guess is right if it is any of them; the loss stays that of `label`. The
    sums are `top1`, `top5` (with more than five classes only), `loss`
    (cross-entropy, nats) and `count`, over all devices. Of a model with exits
    they are those of the last one, and `top1_per_exit` is `[exits]`.
    """

    def eval_step(variables, batch):
        every = model.apply(variables, prepare(batch["image"]), train=False).logits
        logits = every[-1] if every.ndim == 3 else every  # [b, classes]
        labels, mask = batch["label"], batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        sums = {
            "top1": mask * _right(batch, jnp.argmax(logits, -1)),
            # where, not a product: a padding row may be anything, NaN included.
            "loss": jnp.where(mask > 0, mask * loss, 0.0),
            "count": mask,
        }
        if logits.shape[-1] > 5:
            best = jnp.moveaxis(jax.lax.top_k(logits, 5)[1], -1, 0)  # [5, b]
            sums["top5"] = mask * jnp.any(_right(batch, best), 0)
        totals = {name: jnp.sum(value) for name, value in sums.items()}
        if every.ndim == 3:
            hits = _right(batch, jnp.argmax(every, -1))  # [exits, b]
            totals["top1_per_exit"] = jnp.sum(mask[None] * hits, axis=1)
        return jax.lax.psum(totals, axis)

    return eval_step


def _right(batch: Mapping[str, Array], guess: Array) -> Array:
    """Whether guesses `[..., b]` are right, bool of the same shape."""
    if "labels" not in batch:
        return guess == batch["label"].reshape((1,) * (guess.ndim - 1) + (-1,))
    return batch["labels"][jnp.arange(guess.shape[-1]), guess]


def classify(
    step: Callable[[Tree, Mapping[str, Array]], Mapping[str, Array]],
    variables: Tree,
    batches: Iterable[Mapping[str, Array]],
) -> dict[str, Any]:
    """Runs a compiled evaluation step over all batches.

    Args:
      step: `make_eval_step`, made parallel.
      variables: raw or averaged variables of the model.
      batches: device batches, as many on every process.

    Returns:
      `top1`, `top5` (fractions in [0, 1]), `loss` (mean) and `count` (an int);
      of a model with exits also the list `top1_per_exit`.

    Raises:
      ValueError: if there is no example.
    """
    totals: dict[str, Any] = {}
    waiting = None
    for batch in batches:
        sums = step(variables, batch)
        if waiting is not None:  # one batch behind, so that the device never waits
            _add(totals, waiting)
        waiting = sums
    if waiting is not None:
        _add(totals, waiting)
    count = round(float(totals.pop("count", 0.0)))
    if count == 0:
        raise ValueError("no example to evaluate: the split is empty")
    means = {name: (total / count).tolist() for name, total in sorted(totals.items())}
    return means | {"count": count}


def _add(totals: dict[str, Any], sums: Mapping[str, Array]) -> None:
    # Float64 on the host: counts stay whole however long the split is.
    for name, value in jax.device_get(dict(sums)).items():
        totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
