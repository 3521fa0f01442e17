"""The train step: pure and per device, so `shard_map` and `pmap` both run it.

The topology may not change the result. Random draws are keyed by the step and
the global position of a row; a loss is a sum over a count of the *global*
batch, never a mean of means. It has two halves: `make_gradient`, which ends in
the all-reduce, and `make_update`, which is the same arithmetic on whole or on
sharded arrays and knows no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dyntoken import losses, optim
from dyntoken.train.state import TrainState

Tree = Any
Array = jax.Array
Metrics = dict[str, tuple[Array, Array]]
Augment = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


class Found(NamedTuple):
    """What the gradient half learns from the global batch; equal on all devices.

    Attributes:
      grads: of the weighted total of the losses.
      sums, counts: of each loss.
      total: the weighted total.
      extra: collections of the model besides the parameters (`batch_stats`), as after the step.
    """

    grads: Tree
    sums: dict[str, Array]
    counts: dict[str, Array]
    total: Array
    extra: Tree


Gradient = Callable[[Array, Tree, Tree, Mapping[str, Array]], Found]
Update = Callable[[TrainState, Found], tuple[TrainState, Metrics]]
TrainStep = Callable[[TrainState, Tree, Mapping[str, Array]], tuple[TrainState, Metrics]]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    specs: losses.Specs,
    augment: Augment,
    seed: int,
    ema: float = 0.0,
    ema_warmup: bool = True,
    teacher: nn.Module | None = None,
    accumulate: int = 1,
    axis: str = "data",
) -> TrainStep:
    """Builds `(state, teacher_variables, batch) -> (state, metrics)` for one device.

    Args:
      model, specs, augment, seed, teacher, accumulate, axis: see `make_gradient`.
      tx, ema, ema_warmup: see `make_update`.
    """
    options = {"specs": specs, "augment": augment, "seed": seed, "teacher": teacher}
    gradient = make_gradient(model, **options, accumulate=accumulate, axis=axis)
    return joined(gradient, make_update(tx, specs=specs, ema=ema, ema_warmup=ema_warmup))


def joined(gradient: Gradient, update: Update) -> TrainStep:
    """The two halves as one function."""

    def train_step(state, teacher_variables, batch):
        return update(state, gradient(state.step, state.variables, teacher_variables, batch))

    return train_step


def make_gradient(
    model: nn.Module,
    *,
    specs: losses.Specs,
    augment: Augment,
    seed: int,
    teacher: nn.Module | None = None,
    accumulate: int = 1,
    axis: str = "data",
) -> Gradient:
    """Builds `(step, variables, teacher_variables, batch) -> Found` for one device.

    Args:
      model: returns an `Output`; takes `ids` and the rngs `policy`, `dropout`.
      specs: the loss list, see `dyntoken.losses`.
      augment: `(key, images, labels, ids) -> (images, targets)`, uint8 in,
        normalised and mixed out; its draws may depend on the key and the global positions only.
      seed: of every draw, together with the step.
      teacher: a frozen model that sees the same images, or None.
      accumulate: slices of the rows that run one after the other, each forward
        and backward; one all-reduce for all of them, and the same result from
        less memory. Rows that are mixed together must be in one slice.
      axis: name of the mapped axis over devices.

    The batch holds this device's rows: `image` uint8 `[b, H, W, C]`, `label`
    int32 `[b]`, `mask` float32 `[b]`, `id` int32 `[b]` (global positions), and
    optionally `dense` `[b, N, K]` for the loss `token_label` (`augment` must then
    not mix, which `MixToken` does in its place).

    Raises (while tracing):
      ValueError: slices of a model that normalises over its batch.
    """
    objective = losses.Objective(specs)
    record = tuple(what for what in ("features", "dense") if what in objective.needs)

    def gradient(step, variables, teacher_variables, batch):
        refuse_batch_norm(model, variables, accumulate)
        mixing, policy, dropout = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
        extra = {name: tree for name, tree in variables.items() if name != "params"}

        def prepare(rows):
            images, target = augment(mixing, rows["image"], rows["label"], rows["id"])
            data = {"image": images, "target": target, "mask": rows["mask"], "id": rows["id"]}
            data |= {"dense": rows["dense"]} if "dense" in rows else {}
            if teacher is not None:
                seen = teacher.apply(teacher_variables, images, train=False, record=record)
                data["teacher"] = jax.lax.stop_gradient(seen)
            return data

        def evaluate(params, data):
            """Sum and count of each loss over some rows of this device; `extra` after them."""
            output, after = model.apply(
                {"params": params, **extra},
                data["image"],
                train=True,
                ids=data["id"],
                rngs={"policy": policy, "dropout": dropout},
                record=record,
                mutable=["batch_stats"],
            )
            parts = objective.evaluate(output, data)
            sums, counts = ({name: pair[i] for name, pair in parts.items()} for i in (0, 1))
            return sums, counts, after

        def loss(params, data, counts=None):
            sums, own, after = evaluate(params, data)
            counts = global_counts(own, axis) if counts is None else counts
            # A share of the global loss: those of all devices and slices add up, whatever their number.
            share = objective.total({name: (sums[name], counts[name]) for name in sums})
            return share, (sums, counts, after)

        differentiate = jax.value_and_grad(loss, has_aux=True)
        # Differentiating replicated parameters would already sum over devices, leaf by leaf.
        params = jax.lax.pcast(variables["params"], axis, to="varying")
        if accumulate == 1:
            (total, (sums, counts, after)), grads = differentiate(params, prepare(batch))
            extra |= after
        else:
            slices = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            # All counts ahead of the first backward pass. The compiler drops from this pass what they
            # do not depend on: all of it, unless a loss counts the tokens that a sampled mask leaves.
            own = jax.lax.map(lambda rows: evaluate(params, prepare(rows))[1], slices)
            counts = global_counts(jax.tree.map(lambda n: n.sum(0), own), axis)

            def add(grads, rows):
                (total, (sums, _, _)), new = differentiate(params, prepare(rows), counts)
                return jax.tree.map(jnp.add, grads, new), (total, sums)

            zeros = jax.lax.pcast(jax.tree.map(jnp.zeros_like, variables["params"]), axis, to="varying")
            grads, parts = jax.lax.scan(add, zeros, slices)
            total, sums = jax.tree.map(lambda x: x.sum(0), parts)
        grads, sums, total = jax.lax.psum((grads, sums, total), axis)
        return Found(grads, sums, counts, total, extra)

    return gradient


def make_update(
    tx: optax.GradientTransformation, *, specs: losses.Specs, ema: float = 0.0, ema_warmup: bool = True
) -> Update:
    """Builds `(state, found) -> (state, metrics)`.

    Args:
      tx: the optimizer, clipping included.
      specs: the loss list.
      ema: decay of the moving average of the variables; 0 for none.
      ema_warmup: the decay rises to it from 0.1, see `schedules.ema_decay`.

    Metrics are (sum, count): each loss unweighted (of a model with exits also
    `..._per_exit`, with sums `[exits]`), `loss` (the weighted total), `grad_norm`
    before clipping and `update_norm`.
    """

    objective = losses.Objective(specs)

    def update(state, found):
        updates, opt_state = tx.update(found.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if ema:
            average = optim.ema(
                average, {"params": params, **found.extra}, ema, state.step if ema_warmup else None
            )
        pairs = {name: (found.sums[name], found.counts[name]) for name in found.sums}
        norms = {"grad_norm": optax.tree.norm(found.grads), "update_norm": optax.tree.norm(updates)}
        ones = {name: (value, jnp.ones(())) for name, value in {"loss": found.total, **norms}.items()}
        state = TrainState(state.step + 1, params, found.extra, opt_state, average)
        return state, objective.metrics(pairs) | ones

    return update


def refuse_batch_norm(model: nn.Module, variables: Tree, accumulate: int) -> None:
    """Raises ValueError for slices of a model whose statistics are those of the whole batch."""
    frozen = dict(getattr(getattr(model, "backbone", None), "options", ())).get("frozen_stats", False)
    if accumulate > 1 and "batch_stats" in variables and not frozen:
        raise ValueError(
            f"accumulate={accumulate} splits the batch that this model's BatchNorm takes its statistics of, "
            "which would change the result: set accumulate to 1 (remat saves memory, too), or, where the "
            "model has it, model.frozen_stats=True"
        )


def global_counts(counts: Mapping[str, Array], axis: str) -> dict[str, Array]:
    """Counts of the whole batch, by one all-reduce, before the backward pass."""
    names = sorted(counts)
    total = jax.lax.psum(jnp.stack([counts[name] for name in names]), axis)
    return {name: total[i] for i, name in enumerate(names)}
