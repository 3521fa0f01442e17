"""The optimiser: parameter groups, AdamW and SGD as torch has them, EMA."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dyntoken import schedules, schema
from dyntoken.nn.reduction_sites import ADDED
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.schema import Natural, NonNegative, Pattern, Positive, Rate

DECAYS = ("not_1d", "all")
NO_DECAY = (r"cls_token$", r"dist_token$", r"pos_embed$")
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


def groups(
    params: Any,
    *,
    weight_decay: float = 0.05,
    decay: str = "not_1d",
    no_decay: Sequence[str] = NO_DECAY,
    backbone_lr_scale: float = 1.0,
    backbone_freeze_epochs: float = 0,
    steps_per_epoch: int = 1,
    new_params: Sequence[str] = NEW_PARAMS,
    frozen: Sequence[str] = (),
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
    if decay not in DECAYS:
        raise UnknownNameError(f"unknown decay rule {decay!r}: {suggest(decay, DECAYS)}")
    freeze = round(backbone_freeze_epochs * steps_per_epoch)
    found = {}
    for path, leaf in leaves(params):
        if _matches(frozen, path):
            found[path] = Group("frozen", 0.0, 0.0, 0)
            continue
        spared = decay == "not_1d" and (
            len(leaf.shape) <= 1 or path.rpartition("/")[2] == "bias" or _matches(no_decay, path)
        )
        new = _matches(new_params, path)
        name = (
            ("new_param_no_decay" if spared else "new_param") if new else ("no_decay" if spared else "decay")
        )
        found[path] = Group(
            name,
            weight_decay=0.0 if spared else float(weight_decay),
            lr_scale=1.0 if new else float(backbone_lr_scale),
            freeze_steps=0 if new else freeze,
        )
    if frozen and not any(group.name == "frozen" for group in found.values()):
        raise ValueError(
            f"no parameter matches any of frozen={tuple(frozen)}: paths look like {next(iter(found))!r}"
        )
    return found


@schema.checked
def make(
    params: Any,
    *,
    total_steps: int,
    steps_per_epoch: int,
    name: Literal["adamw", "sgd"] = "adamw",
    lr: NonNegative = 1e-3,
    min_lr: NonNegative = 0.0,
    schedule: Literal[schedules.KINDS] = "cosine",
    warmup_epochs: NonNegative = 0,
    warmup_steps: Natural | None = None,
    warmup_lr: NonNegative = 0.0,
    cooldown_epochs: NonNegative = 0,
    weight_decay: NonNegative = 0.05,
    decay: Literal[DECAYS] = "not_1d",
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
    """Builds the optimiser of a run.

    `"adamw"` is `torch.optim.AdamW` (decay decoupled, times the rate; eps
    outside the root of the corrected moment), `"sgd"` is `torch.optim.SGD`
    (decay added to the gradient, before momentum). While a group is frozen its
    rate is 0 but its moments go on accumulating, as torch's do. Clipping comes
    first and sees every gradient, those of parameters never updated included.

    Args:
      params: tree of arrays or shapes, to sort into groups.
      total_steps: length of the run.
      steps_per_epoch: steps per epoch.
      name: `"adamw"` or `"sgd"`.
      lr: peak rate.
      min_lr: see `schedules.learning_rate`.
      schedule: `"cosine"`, `"cosine_epoch"`, `"cosine_epoch_start"` or `"constant"`.
      warmup_epochs: see `schedules.learning_rate`.
      warmup_steps: see `schedules.learning_rate`.
      warmup_lr: see `schedules.learning_rate`.
      cooldown_epochs: see `schedules.learning_rate`.
      weight_decay: see `groups`.
      decay: see `groups`.
      no_decay: see `groups`.
      betas: AdamW's moment decay rates.
      eps: AdamW's eps.
      momentum: SGD's momentum.
      nesterov: SGD's Nesterov momentum.
      clip: largest global gradient norm, or None.
      backbone_lr_scale: see `groups`.
      backbone_min_lr: rate at which the backbone ends, by default `min_lr *
        backbone_lr_scale`. Torch's schedulers end all groups at one rate; for
        runs without warm-up.
      backbone_freeze_epochs: see `groups`.
      new_params: see `groups`.
      frozen: see `groups`.

    Returns:
      `(tx, lr_fn)`. The state of `tx` is a dict of arrays whose `"count"` is
      the number of updates so far; update k (from 0) uses `lr_fn(k)`, the base
      schedule before any group's factor.

    Raises:
      UnknownNameError: for an unknown optimiser, schedule or decay rule.
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
    if backbone_min_lr is not None:
        table = _with_floor(table, lr, min_lr, lr * backbone_lr_scale, backbone_min_lr)
    if name == "adamw":
        moments = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    else:
        moments = optax.trace(momentum, nesterov=nesterov)
    return _transformation(moments, table, lr_fn, coupled=name == "sgd", clip=clip), lr_fn


def _with_floor(
    table: Mapping[str, Group], lr: float, min_lr: float, start: float, end: float
) -> dict[str, Group]:
    """The backbone from `start` to `end` while the schedule falls from `lr` to `min_lr`."""
    if not lr > min_lr:
        raise ValueError(f"backbone_min_lr={end} needs a schedule that falls: lr={lr}, min_lr={min_lr}")
    slope = (start - end) / (lr - min_lr)
    shift = end - slope * min_lr
    return {
        path: dataclasses.replace(group, lr_scale=slope, lr_shift=shift)
        if group.name in ("decay", "no_decay")
        else group
        for path, group in table.items()
    }


def _transformation(
    moments: optax.GradientTransformation,
    table: Mapping[str, Group],
    lr_fn: Callable[[Any], Any],
    *,
    coupled: bool,
    clip: float | None,
) -> optax.GradientTransformation:
    """Clip, moments, decay and per-group rates as one transformation."""
    kind = type(moments.init({}))

    def init(params: Any) -> dict[str, Any]:
        return {"count": jnp.zeros((), jnp.int32), **moments.init(params)._asdict()}

    def update(grads: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        if params is None:
            raise ValueError("this optimizer decays weights: call tx.update(grads, state, params)")
        step = state["count"]
        if clip is not None:
            # torch's clip_grad_norm_, whose 1e-6 keeps an all-zero gradient finite.
            scale = jnp.minimum(1.0, clip / (optax.tree.norm(grads) + 1e-6))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        tree = _group_tree(table, params)
        if coupled:
            grads = jax.tree.map(lambda g, p, group: g + group.weight_decay * p, grads, params, tree)
        inner = kind(**{field: state[field] for field in kind._fields})
        directions, inner = moments.update(grads, inner, params)
        base = lr_fn(step)

        def move(direction: jax.Array, p: jax.Array, group: Group) -> jax.Array:
            if group.name == "frozen":
                return jnp.zeros_like(p)
            rate = jnp.where(step < group.freeze_steps, 0.0, base * group.lr_scale + group.lr_shift)
            if not coupled:
                direction = direction + group.weight_decay * p
            return -rate.astype(p.dtype) * direction

        updates = jax.tree.map(move, directions, params, tree)
        return updates, {**inner._asdict(), "count": step + 1}

    return optax.GradientTransformation(init, update)


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


def describe(table: Mapping[str, Group]) -> list[str]:
    """One line per distinct group, with the number of its parameter arrays."""
    counts = collections.Counter(table.values())
    return [
        f"{group.name}: {count} arrays, weight decay {group.weight_decay:g}, "
        f"lr x{group.lr_scale:g} after {group.freeze_steps} steps"
        for group, count in sorted(counts.items(), key=lambda item: item[0].name)
    ]


def leaves(params: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` of a tree, the path as the patterns of `groups` see it."""
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]


def _group_tree(table: Mapping[str, Group], params: Any) -> Any:
    """The groups in the shape of `params`."""
    paths = [path for path, _ in leaves(params)]
    if set(paths) != set(table):
        odd = sorted(set(paths) ^ set(table))[0]
        raise ValueError(
            f"the optimizer was made for other parameters: {odd!r} is in only one of the two trees"
        )
    return jax.tree.unflatten(jax.tree.structure(params), [table[path] for path in paths])


def _matches(patterns: Sequence[str], path: str) -> bool:
    if isinstance(patterns, str):  # else every single letter would be a pattern
        patterns = (patterns,)
    return any(re.search(pattern, path) for pattern in patterns)
