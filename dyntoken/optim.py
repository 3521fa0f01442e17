"""The optimizer: parameter groups, AdamW and SGD as torch has them, EMA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dyntoken import schedules, schema
from dyntoken.nn.reduction_sites import ADDED
from dyntoken.schema import Natural, NonNegative, Pattern, Positive, Rate

Decay = Literal["not_1d", "all"]
NO_DECAY = (r"cls_token$", r"dist_token$", r"reg_token$", r"pos_embed$")
NEW_PARAMS = (ADDED,)


@dataclasses.dataclass(frozen=True)
class Group:
    """How one parameter is trained.

    Attributes:
      name: "decay" or "no_decay" for the backbone (head included), "new_param"
        or "new_param_no_decay" for what the reduction method adds, "frozen" for
        what is never updated.
      weight_decay: its own factor; times the learning rate for AdamW.
      lr_scale: factor on the schedule.
      freeze_steps: first steps at learning rate 0.
      lr_shift: added to the scaled rate.
    """

    name: str
    weight_decay: float
    lr_scale: float
    freeze_steps: int
    lr_shift: float = 0.0

    def rate(self, lr_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The learning rate of the group as a function of the step."""
        return lambda step: jnp.where(
            step < self.freeze_steps, 0.0, lr_fn(step) * self.lr_scale + self.lr_shift
        )


@schema.checked
def groups(
    params: Any,
    *,
    weight_decay: NonNegative = 0.05,
    decay: Decay = "not_1d",
    no_decay: Sequence[Pattern] = NO_DECAY,
    backbone_lr_scale: NonNegative = 1.0,
    backbone_freeze_epochs: NonNegative = 0,
    steps_per_epoch: int = 1,
    new_params: Sequence[Pattern] = NEW_PARAMS,
    frozen: Sequence[Pattern] = (),
) -> dict[str, Group]:
    """Sorts parameters into groups (raoyongming/DynamicViT, `optim_factory`).

    Patterns are regular expressions searched in the path, e.g.
    `backbone/trunk/blocks_0/attn/qkv/kernel`.

    Args:
      params: tree of arrays or of anything with a shape.
      weight_decay: factor of the groups that decay.
      decay: `"not_1d"` spares biases, vectors and scalars, and what `no_decay`
        matches, as DynamicViT and timm do; `"all"` spares nothing, as TPS does.
      no_decay: further parameters to spare, with `"not_1d"` only.
      backbone_lr_scale: factor on the rate of everything but `new_params`.
      backbone_freeze_epochs: epochs during which the backbone's rate is 0.
      steps_per_epoch: what turns those epochs into `Group.freeze_steps`.
      new_params: parameters that are no part of the pretrained backbone; by
        default what the method adds.
      frozen: parameters that are never updated.

    Returns:
      path -> `Group`, in the order of the tree's leaves.

    Raises:
      UnknownNameError: for an unknown decay rule.
      ValueError: if none of the `frozen` patterns matches anything.
    """

    def group(path: str, leaf: Any) -> Group:
        if _matches(frozen, path):
            return Group("frozen", 0.0, 0.0, 0)
        spared = decay == "not_1d" and (
            len(leaf.shape) <= 1 or path.rpartition("/")[2] == "bias" or _matches(no_decay, path)
        )
        factor = 0.0 if spared else weight_decay
        if _matches(new_params, path):
            return Group("new_param_no_decay" if spared else "new_param", factor, 1.0, 0)
        freeze = round(backbone_freeze_epochs * steps_per_epoch)
        return Group("no_decay" if spared else "decay", factor, backbone_lr_scale, freeze)

    table = {path: group(path, leaf) for path, leaf in leaves(params)}
    if frozen and not any(group.name == "frozen" for group in table.values()):
        raise ValueError(
            f"no parameter matches any of frozen={frozen}: paths look like {next(iter(table))!r}"
        )
    return table


@schema.checked
def make(
    params: Any,
    *,
    total_steps: int,
    steps_per_epoch: int,
    name: Literal["adamw", "sgd"] = "adamw",
    lr: NonNegative = 1e-3,
    min_lr: NonNegative = 0.0,
    schedule: schedules.Kind = "cosine",
    warmup_epochs: NonNegative = 0,
    warmup_steps: Natural | None = None,
    warmup_lr: NonNegative = 0.0,
    cooldown_epochs: NonNegative = 0,
    weight_decay: NonNegative = 0.05,
    decay: Decay = "not_1d",
    no_decay: Sequence[Pattern] = NO_DECAY,
    betas: tuple[Rate, Rate] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    momentum: Rate = 0.9,
    nesterov: bool = False,
    clip: Positive | None = None,
    backbone_lr_scale: NonNegative = 1.0,
    backbone_min_lr: NonNegative | None = None,
    backbone_freeze_epochs: NonNegative = 0,
    new_params: Sequence[Pattern] = NEW_PARAMS,
    frozen: Sequence[Pattern] = (),
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """Builds the optimizer of a run.

    `"adamw"` is `torch.optim.AdamW` (decay decoupled, times the rate; eps
    outside the root of the corrected moment), `"sgd"` is `torch.optim.SGD`
    (decay added to the gradient, before momentum). While a group is frozen its
    rate is 0 but its moments go on accumulating, as torch's do. Clipping comes
    first and sees every gradient, those of parameters never updated included.

    The arguments are those of `schedules.learning_rate` (`schedule` is its kind)
    and of `groups`, and besides:

    Args:
      params: tree of arrays or shapes, to sort into groups.
      name: `"adamw"` or `"sgd"`.
      betas: AdamW's moment decay rates.
      eps: AdamW's eps.
      momentum: SGD's momentum.
      nesterov: SGD's Nesterov momentum.
      clip: largest global gradient norm, or None.
      backbone_min_lr: rate at which the backbone ends, by default `min_lr *
        backbone_lr_scale`. Torch's schedulers end all groups at one rate; for
        runs without warm-up.

    Returns:
      `(tx, lr_fn)`; update k (from 0) uses `lr_fn(k)`, the base schedule before
      any group's factor.

    Raises:
      UnknownNameError: for an unknown optimizer, schedule or decay rule.
      ValueError: for settings that do not fit together.
    """
    lr_fn = schedules.learning_rate(
        schedule,
        lr=lr,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        warmup_epochs=warmup_epochs,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        cooldown_epochs=cooldown_epochs,
    )
    table = groups(
        params,
        weight_decay=weight_decay,
        decay=decay,
        no_decay=no_decay,
        backbone_lr_scale=backbone_lr_scale,
        backbone_freeze_epochs=backbone_freeze_epochs,
        steps_per_epoch=steps_per_epoch,
        new_params=new_params,
        frozen=frozen,
    )
    if backbone_min_lr is not None:  # a straight line from (lr, start) to (min_lr, backbone_min_lr)
        if not lr > min_lr:
            raise ValueError(
                f"backbone_min_lr={backbone_min_lr} needs a schedule that falls: lr={lr}, min_lr={min_lr}"
            )
        slope = (lr * backbone_lr_scale - backbone_min_lr) / (lr - min_lr)
        line = {"lr_scale": slope, "lr_shift": backbone_min_lr - slope * min_lr}
        for path, group in table.items():
            if group.name in ("decay", "no_decay"):
                table[path] = dataclasses.replace(group, **line)

    decayed = optax.add_decayed_weights(
        weight_decay, mask=lambda tree: _along(tree, table, lambda group: group.weight_decay > 0)
    )
    rates = {group.name: optax.scale_by_learning_rate(group.rate(lr_fn)) for group in table.values()}
    if "frozen" in rates:
        rates["frozen"] = optax.set_to_zero()
    parts = [optax.clip_by_global_norm(clip)] if clip is not None else []
    if name == "adamw":
        parts += [optax.scale_by_adam(*betas, eps=eps), decayed]
    else:
        parts += [decayed, optax.trace(momentum, nesterov=nesterov)]
    by_group = optax.partition(rates, lambda tree: _along(tree, table, lambda group: group.name))
    return optax.chain(*parts, by_group), lr_fn


def ema(average: Any, params: Any, decay: float, step: Any = None) -> Any:
    """`decay * average + (1 - decay) * params`, leaf by leaf.

    Start it from a copy of the parameters.

    Args:
      average, params: trees of one shape.
      decay: share of the average that stays.
      step: updates done before this one; the decay then warms up with it, see
        `schedules.ema_decay`. None: the same decay from the first step on, as
        timm's `ModelEma` has it.
    """
    kept, taken = (decay, 1.0 - decay) if step is None else schedules.ema_decay(step, decay)
    return jax.tree.map(lambda a, p: (kept * a + taken * p.astype(a.dtype)).astype(a.dtype), average, params)


def leaves(params: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` of a tree, the path as the patterns of `groups` see it."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]


def _along(tree: Any, table: Mapping[str, Group], value: Callable[[Group], Any]) -> Any:
    """A value of each parameter's group, in the shape of `tree`."""
    paths = [path for path, _ in leaves(tree)]
    if other := sorted(set(paths) ^ set(table)):
        raise ValueError(
            f"the optimizer was made for other parameters: {other[0]!r} is in only one of the two trees"
        )
    return jax.tree.unflatten(jax.tree.structure(tree), [value(table[path]) for path in paths])


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)
