"""What a checkpoint says of its run, and whether another run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dyntoken.data.info import class_difference, list_names
from dyntoken.train.checkpoint import CheckpointError
from dyntoken.weights import runs

if TYPE_CHECKING:
    from dyntoken.train.plan import Plan


def describe(plan: Plan) -> dict[str, Any]:
    """What a checkpoint keeps of a plan so that it can be opened without its data: see `weights.runs`."""
    info, chosen, shape = plan.info, plan.settings.data, plan.shape
    native = info.image_shape is not None and tuple(info.image_shape[:2]) == tuple(shape[:2])
    reading = {key: chosen.eval[key] for key in ("crop_pct", "interpolation") if key in chosen.eval}
    facts = {"num_classes": info.num_classes, "img_size": list(shape[:2]), "in_chans": shape[2]}
    given = {k: v for k, v in plan.settings.plain["model"].items() if k not in facts or v is not None}
    return {
        "class_names": list(info.class_names),
        "image_shape": list(shape),
        "mean": [float(x) for x in (info.mean if chosen.mean is None else chosen.mean)],
        "std": [float(x) for x in (info.std if chosen.std is None else chosen.std)],
        **reading,
        **({"crop_pct": 1.0} if native else {}),  # such images pass through untouched
        "model": {**facts, **given},
    }


def check(workdir: Any, plan: Plan, step: int | str = "newest") -> None:
    """Refuses a run whose classes or patch grid are not those of the plan.

    Their arrays may have the very same shapes. What cannot be read is left to
    those who restore it.

    Args:
      workdir: of the run whose checkpoint is to be restored.
      plan: of the run that is to go on from it.
      step: which checkpoint.

    Raises:
      CheckpointError: names both.
    """
    meta = runs.of_workdir(workdir, step)
    check_classes(meta, plan, workdir, "use another workdir (init.path and init.head=reset take its weights)")
    before, now = runs.grids_of(meta), runs.grids(plan.model)
    placed = any(name.endswith("pos_embed") for name in meta.get("leaves", ()))
    if placed and before and before != now:
        raise CheckpointError(
            f"{workdir} was trained on patches of {_spell(before)}, this config has {_spell(now)}: its position "
            "embedding belongs to other places. Set data.size as it was, or start another workdir from its "
            "weights (init.path), which resizes them"
        )


def check_classes(meta: Mapping[str, Any], plan: Plan, where: Any, remedy: str) -> None:
    """Raises `CheckpointError` unless a description names the classes of the plan, in their order.

    See `class_difference`.
    """
    before, now = runs.class_names(meta), list(plan.info.class_names)
    if difference := class_difference("the run", before, "the data", now):
        raise CheckpointError(
            f"{where} was trained on {len(before)} classes ({list_names(before)}), data set {plan.info.name!r} has "
            f"{len(now)} ({list_names(now)}): {difference}. Give the data as it was, or {remedy}"
        )


def _spell(grids: Mapping[str, str]) -> str:
    return " / ".join(grids.values())
