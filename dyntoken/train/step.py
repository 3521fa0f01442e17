"""The train step: pure and per device, so `shard_map` and `pmap` both run it.

The topology may not change the result. Random draws are keyed by the step and
the global position of a row; a loss is a sum over a count of the *global*
batch, never a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dyntoken import losses, optim
from dyntoken.train.state import TrainState

Tree = Any
Array = jax.Array
Augment = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    specs: losses.Specs,
    augment: Augment,
    seed: int,
    ema: float = 0.0,
    teacher: nn.Module | None = None,
    axis: str = "data",
) -> Callable[[TrainState, Tree, Mapping[str, Array]], tuple[TrainState, dict[str, tuple[Array, Array]]]]:
    """Builds `(state, teacher_variables, batch) -> (state, metrics)` for one device.

    Args:
      model: returns an `Output`; takes `ids` and the rngs `policy`, `dropout`.
      tx: the optimizer, clipping included.
      specs: the loss list, see `dyntoken.losses`.
      augment: `(key, images, labels, ids) -> (images, targets)`, uint8 in,
        normalised and mixed out; its draws may depend on the key and the global positions only.
      seed: of every draw, together with the step.
      ema: decay of the moving average of the variables; 0 for none.
      teacher: a frozen model that sees the same images, or None.
      axis: name of the mapped axis over devices.

    The batch holds this device's rows: `image` uint8 `[b, H, W, C]`, `label`
    int32 `[b]`, `mask` float32 `[b]`, `id` int32 `[b]` (global positions), and
    optionally `dense` `[b, N, K]` for the loss `token_label` (`augment` must then
    not mix, which `MixToken` does in its place).
    Metrics are (sum, count): each loss unweighted (of a model with exits also
    `..._per_exit`, with sums `[exits]`), `loss` (the weighted total), `grad_norm`
    before clipping and `update_norm`.
    """
    record = tuple(what for what in ("features", "dense") if what in losses.needs(specs))

    def train_step(state, teacher_variables, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mixing, policy, dropout = jax.random.split(key, 3)
        images, target = augment(mixing, batch["image"], batch["label"], batch["id"])
        data = {"image": images, "target": target, "mask": batch["mask"]}
        data |= {"dense": batch["dense"]} if "dense" in batch else {}
        if teacher is not None:
            seen = teacher.apply(teacher_variables, images, train=False, record=record)
            data["teacher"] = jax.lax.stop_gradient(seen)
        rngs = {"policy": policy, "dropout": dropout}

        def objective(params):
            variables = {"params": params, **state.extra}
            output, extra = model.apply(
                variables,
                images,
                train=True,
                ids=batch["id"],
                rngs=rngs,
                record=record,
                mutable=["batch_stats"],
            )
            parts = losses.evaluate(specs, output, data)
            sums = {name: total for name, (total, _) in parts.items()}
            counts = global_counts({name: count for name, (_, count) in parts.items()}, axis)
            # A device's share of the global loss: the shares add up, whatever their number.
            share = losses.total(specs, {name: (sums[name], counts[name]) for name in sums})
            return share, (sums, counts, extra)

        # Differentiating replicated parameters would already sum over devices, leaf by leaf.
        params = jax.lax.pcast(state.params, axis, to="varying")
        (total, (sums, counts, extra)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        grads, sums, total = jax.lax.psum((grads, sums, total), axis)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = {**state.extra, **extra}
        average = state.ema
        if ema:
            average = optim.ema(average, {"params": params, **extra}, ema)
        metrics = losses.metrics(specs, {name: (sums[name], counts[name]) for name in sums})
        norms = {"loss": total, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        metrics |= {name: (value, jnp.ones(())) for name, value in norms.items()}
        state = TrainState(state.step + 1, params, extra, opt_state, average)
        return state, metrics

    return train_step


def global_counts(counts: Mapping[str, Array], axis: str) -> dict[str, Array]:
    """Counts of the whole batch, by one all-reduce, before the backward pass."""
    names = sorted(counts)
    total = jax.lax.psum(jnp.stack([counts[name] for name in names]), axis)
    return {name: total[i] for i, name in enumerate(names)}
