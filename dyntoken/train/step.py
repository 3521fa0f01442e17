"""The train step: a pure function of state and batch, so `jit`, `shard_map` and `pmap` all run it.

The topology may not change the result. Random draws are keyed by the step and
the global position of a row; a loss is a sum over a count of the *global*
batch, never a mean of means. It has two halves: `gradient`, which ends in the
gradient's all-reduce, and `update`, which is the same arithmetic on whole or on sharded
arrays and knows no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dyntoken import losses, optim
from dyntoken.nn.batchnorm import axis_size
from dyntoken.train.state import TrainState

Tree = Any
Array = jax.Array
Metrics = dict[str, tuple[Array, Array]]
Augment = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


class GradientResult(NamedTuple):
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


def train_step(
    state: TrainState,
    teacher_variables: Tree,
    batch: Mapping[str, Array],
    *,
    objective: losses.Objective,
    tx: optax.GradientTransformation,
    ema: float = 0.0,
    ema_warmup: bool = True,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    """One step on this device's rows: the new state, and metrics.

    Args:
      state: see `TrainState`.
      teacher_variables: `{}` without a teacher.
      batch: see `gradient`.
      objective, tx, ema, ema_warmup: see `update`.
      **options: of `gradient`.
    """
    variables = state.variables
    result = gradient(state.step, variables, teacher_variables, batch, objective=objective, **options)
    return update(state, result, objective=objective, tx=tx, ema=ema, ema_warmup=ema_warmup)


def gradient(
    step: Array,
    variables: Tree,
    teacher_variables: Tree,
    batch: Mapping[str, Array],
    *,
    model: nn.Module,
    objective: losses.Objective,
    augment: Augment,
    seed: int,
    teacher: nn.Module | None = None,
    self_teaching: bool = False,
    accumulate: int = 1,
    axis: str = "data",
) -> GradientResult:
    """The gradient of the losses, from this device's rows and those of the others.

    Args:
      step: number of updates done.
      variables, teacher_variables: of the two models.
      batch: `image` uint8 `[b, H, W, C]`, `label` int32 `[b]`, `mask` float32 `[b]`, `id` int32 `[b]`
        (global positions), and optionally `dense` `[b, N, K]` for the loss `token_label` (`augment` must
        then not mix, which `MixToken` does in its place).
      model: returns an `Output`; takes `ids` and the rngs `policy`, `dropout`.
      objective: the losses.
      augment: `(key, images, labels, ids) -> (images, targets)`, uint8 in,
        normalised and mixed out; its draws may depend on the key and the global positions only.
      seed: of every draw, together with the step.
      teacher: a frozen model that sees the same images, or None.
      self_teaching: the teacher runs on the parameters of `model`, in training like it, and learns by
        what losses say of it itself; those that compare with it stop its gradient.
      accumulate: slices of the rows that run one after the other, each forward
        and backward; one all-reduce of the gradient for all of them, and the same
        result from less memory. Rows that are mixed together must be in one slice.
      axis: name of the mapped axis over devices; where it is not mapped, the rows at hand are the batch.

    Raises (while tracing):
      ValueError: slices of a model that normalises over its batch.
    """
    refuse_batch_norm(model, variables, accumulate)
    mapped = axis_size(axis) > 0
    mix_key, policy_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
    extra = {name: tree for name, tree in variables.items() if name != "params"}
    record = tuple(what for what in ("features", "dense") if what in objective.needs)

    def over_devices(tree):
        return jax.lax.psum(tree, axis) if mapped else tree

    def per_device(tree):
        return jax.lax.pcast(tree, axis, to="varying") if mapped else tree

    def global_counts(counts):
        """Counts of the whole batch, by one all-reduce, before the backward pass."""
        names = sorted(counts)
        return dict(zip(names, over_devices(jnp.stack([counts[name] for name in names])), strict=True))

    def prepare(rows):
        images, target = augment(mix_key, rows["image"], rows["label"], rows["id"])
        data = {"image": images, "target": target, "mask": rows["mask"], "id": rows["id"]}
        data |= {"dense": rows["dense"]} if "dense" in rows else {}
        if teacher is not None and not self_teaching:
            seen = teacher.apply(teacher_variables, images, train=False, record=record)
            data["teacher"] = jax.lax.stop_gradient(seen)
        return data

    def evaluate(params, data):
        """Sum and count of each loss over some rows of this device; `extra` after them."""

        def train(which):
            return which.apply(
                {"params": params, **extra},
                data["image"],
                train=True,
                ids=data["id"],
                rngs={"policy": policy_key, "dropout": dropout_key},
                record=record,
                mutable=["batch_stats"],
            )

        output, after = train(model)
        if self_teaching:
            data = {**data, "teacher": train(teacher)[0]}
        parts = objective.evaluate(output, data)
        sums, counts = ({name: pair[i] for name, pair in parts.items()} for i in (0, 1))
        return sums, counts, after

    def loss(params, data, counts=None):
        sums, own, after = evaluate(params, data)
        counts = global_counts(own) if counts is None else counts
        # A share of the global loss: those of all devices and slices add up, whatever their number.
        share = objective.total({name: (sums[name], counts[name]) for name in sums})
        return share, (sums, counts, after)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    # Differentiating replicated parameters would already sum over devices, leaf by leaf.
    params = per_device(variables["params"])
    if accumulate == 1:
        (total, (sums, counts, after)), grads = differentiate(params, prepare(batch))
        extra |= after
    else:
        slices = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        # All counts ahead of the first backward pass. The compiler drops from this pass what they
        # do not depend on: all of it, unless a loss counts the tokens that a sampled mask leaves.
        own = jax.lax.map(lambda rows: evaluate(params, prepare(rows))[1], slices)
        counts = global_counts(jax.tree.map(lambda n: n.sum(0), own))

        def add(grads, rows):
            (total, (sums, _, _)), new = differentiate(params, prepare(rows), counts)
            return jax.tree.map(jnp.add, grads, new), (total, sums)

        zeros = per_device(jax.tree.map(jnp.zeros_like, variables["params"]))
        grads, parts = jax.lax.scan(add, zeros, slices)
        total, sums = jax.tree.map(lambda x: x.sum(0), parts)
    grads, sums, total = over_devices((grads, sums, total))
    return GradientResult(grads, sums, counts, total, extra)


def update(
    state: TrainState,
    result: GradientResult,
    *,
    tx: optax.GradientTransformation,
    objective: losses.Objective,
    ema: float = 0.0,
    ema_warmup: bool = True,
) -> tuple[TrainState, Metrics]:
    """The state after the step, and its metrics as (sum, count).

    Metrics are each loss unweighted (of a model with exits also `..._per_exit`, with sums `[exits]`),
    `loss` (the weighted total), `grad_norm` before clipping and `update_norm`.

    Args:
      state, result: before the step, and of `gradient`.
      tx: the optimizer, clipping included.
      objective: the losses.
      ema: decay of the moving average of the variables; 0 for none.
      ema_warmup: the decay rises to it from 0.1, see `schedules.ema_decay`.
    """
    updates, opt_state = tx.update(result.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema:
        average = optim.ema(
            average, {"params": params, **result.extra}, ema, state.step if ema_warmup else None
        )
    pairs = {name: (result.sums[name], result.counts[name]) for name in result.sums}
    norms = {"grad_norm": optax.tree.norm(result.grads), "update_norm": optax.tree.norm(updates)}
    ones = {name: (value, jnp.ones(())) for name, value in {"loss": result.total, **norms}.items()}
    state = TrainState(state.step + 1, params, result.extra, opt_state, average)
    return state, objective.metrics(pairs) | ones


def refuse_batch_norm(model: nn.Module, variables: Tree, accumulate: int) -> None:
    """Raises ValueError for slices of a model whose statistics are those of the whole batch."""
    frozen = dict(getattr(getattr(model, "backbone", None), "options", ())).get("frozen_stats", False)
    if accumulate > 1 and "batch_stats" in variables and not frozen:
        raise ValueError(
            f"accumulate={accumulate} splits the batch that this model's BatchNorm takes its statistics of, "
            "which would change the result: set accumulate to 1 (remat saves memory, too), or, where the "
            "model has it, model.frozen_stats=True"
        )
