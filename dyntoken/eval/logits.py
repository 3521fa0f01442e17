"""A model over a whole split: top-1, top-5 and loss as exact sums, or the logits of every exit.

Batches are padded to one shape and masked, so that no example is lost or counted
twice, on any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

Tree = Any
Array = jax.Array
Batch = Mapping[str, Array]
Step = Callable[[Tree, Batch], Mapping[str, Array]]


def make_eval_step(
    model: nn.Module,
    *,
    prepare: Callable[[Array], Array],
    axis: str = "data",
    rows: Callable[[Array, Batch], Any] | None = None,
) -> Any:
    """Builds `(variables, batch) -> sums` for one device, or with `rows` to `(sums, rows)`.

    Args:
      model: returns an `Output` with logits `[b, classes]`, or `[exits, b, classes]`.
      prepare: uint8 images -> normalised float images, both `[b, H, W, C]`.
      axis: name of the mapped axis over devices.
      rows: from the model's logits and the batch to what is wanted of each image, see `eval.answers`.

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
            "top1": mask * right(batch, jnp.argmax(logits, -1)),
            # where, not a product: a padding row may be anything, NaN included.
            "loss": jnp.where(mask > 0, mask * loss, 0.0),
            "count": mask,
        }
        if logits.shape[-1] > 5:
            best = jnp.moveaxis(jax.lax.top_k(logits, 5)[1], -1, 0)  # [5, b]
            sums["top5"] = mask * jnp.any(right(batch, best), 0)
        totals = {name: jnp.sum(value) for name, value in sums.items()}
        if every.ndim == 3:
            hits = right(batch, jnp.argmax(every, -1))  # [exits, b]
            totals["top1_per_exit"] = jnp.sum(mask[None] * hits, axis=1)
        totals = jax.lax.psum(totals, axis)
        return totals if rows is None else (totals, rows(every, batch))

    return eval_step


def right(batch: Batch, guess: Array) -> Array:
    """Whether guesses `[..., b]` are right, bool of the same shape."""
    if "labels" not in batch:
        return guess == batch["label"].reshape((1,) * (guess.ndim - 1) + (-1,))
    return batch["labels"][jnp.arange(guess.shape[-1]), guess]


def classify(step: Step, variables: Tree, batches: Iterable[Batch]) -> dict[str, Any]:
    """Runs a compiled evaluation step over device batches, as many on every process.

    Returns:
      `top1`, `top5` (fractions in [0, 1]), `loss` (mean) and `count` (an int);
      of a model with exits also the list `top1_per_exit`.

    Raises:
      ValueError: if there is no example.
    """
    return means(one_behind(step(variables, batch) for batch in batches))


def means(found: Iterable[Mapping[str, Array]]) -> dict[str, Any]:
    """The means that the sums of some batches make; see `classify`."""
    totals: dict[str, Any] = {}
    for sums in found:
        # Float64 on the host: counts stay whole however long the split is.
        for name, value in jax.device_get(dict(sums)).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    count = round(float(totals.pop("count", 0.0)))
    if count == 0:
        raise ValueError("no example to evaluate: the split is empty")
    values = {name: (total / count).tolist() for name, total in sorted(totals.items())}
    return values | {"count": count}


def make_logits_step(
    model: nn.Module, mesh: Mesh, *, prepare: Callable[[Array], Array], axis: str = "data"
) -> Step:
    """Compiles `(variables, batch) -> {logits, label, mask}` for the devices that share the rows of a batch.

    The other arguments are as in `make_eval_step`, and so is the batch. The
    logits come back as float32 `[E, B, K]`, rows in order.

    Raises:
      ValueError: a model without exits.
    """
    if not getattr(model, "exits", ()):
        raise ValueError(
            f"{getattr(model, 'arch', type(model).__name__)} has no exits: thresholds need a model with "
            "several, such as dvt_deit_small"
        )

    def step(variables, batch):
        logits = model.apply(variables, prepare(batch["image"]), train=False).logits
        return {"logits": logits.astype(jnp.float32), "label": batch["label"], "mask": batch["mask"]}

    rows = PartitionSpec(axis)
    split = {"logits": PartitionSpec(None, axis), "label": rows, "mask": rows}
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=split))


def collect(step: Step, variables: Tree, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all exits and labels of a whole split, padding left out.

    Every process gets all rows, in the order of the split, from its device
    batches (as many on every process). The host holds them all: 50,000 images,
    1000 classes and three exits are 0.6 GB.

    Returns:
      logits float32 `[E, N, K]` and labels int32 `[N]`.

    Raises:
      ValueError: no example, or logits that are not finite.
    """
    logits, labels = [], []
    for outputs in one_behind(step(variables, batch) for batch in batches):
        whole = {name: on_host(value) for name, value in outputs.items()}
        real = whole["mask"] > 0
        logits.append(whole["logits"][:, real])
        labels.append(whole["label"][real])
    if not sum(map(len, labels)):
        raise ValueError("no example to collect logits of: the split is empty")
    logits = np.concatenate(logits, axis=1)
    if not np.isfinite(logits).all():
        exit_, image = np.argwhere(~np.isfinite(logits).all(axis=-1))[0]
        raise ValueError(
            f"logits are not finite (first at exit {exit_}, image {image}): train the model again"
        )
    return logits, np.concatenate(labels)


def on_host(value: Array) -> np.ndarray:
    """A global array, whole, in every process."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def one_behind(outputs: Iterator[Any]) -> Iterator[Any]:
    """The same, each after the next was started: the device never waits for the host."""
    waiting = None
    for following in outputs:
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting
