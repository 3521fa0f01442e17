"""What a checkpoint says of its run, and whether another run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dyntoken.train.checkpoint import CheckpointError
from dyntoken.weights import runs

if TYPE_CHECKING:
    from dyntoken.train.build import Run


def describe(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps of a run so that it can be opened without its data: see `weights.runs`."""
    info, chosen, shape = run.info, run.settings.data, run.shape
    native = info.image_shape is not None and tuple(info.image_shape[:2]) == tuple(shape[:2])
    reading = {key: chosen.eval[key] for key in ("crop_pct", "interpolation") if key in chosen.eval}
    facts = {"num_classes": info.num_classes, "img_size": list(shape[:2]), "in_chans": shape[2]}
    given = {k: v for k, v in run.settings.plain["model"].items() if k not in facts or v is not None}
    return {
        "class_names": list(info.class_names),
        "image_shape": list(shape),
        "mean": [float(x) for x in (info.mean if chosen.mean is None else chosen.mean)],
        "std": [float(x) for x in (info.std if chosen.std is None else chosen.std)],
        **reading,
        **({"crop_pct": 1.0} if native else {}),  # such images pass through untouched
        "model": {**facts, **given},
    }


def check(workdir: Any, run: Run, step: int | str = "newest") -> None:
    """Refuses a run whose classes or patch grid are not those of the run.

    Their arrays may have the very same shapes. What cannot be read is left to
    those who restore it.

    Args:
      workdir: of the run whose checkpoint is to be restored.
      run: of the run that is to go on from it.
      step: which checkpoint.

    Raises:
      CheckpointError: names both.
    """
    meta = runs.of_workdir(workdir, step)
    check_classes(meta, run, workdir, "use another workdir (init.path and init.head=reset take its weights)")
    before, now = runs.grids_of(meta), runs.grids(run.model)
    placed = any(name.endswith("pos_embed") for name in meta.get("leaves", ()))
    if placed and before and before != now:
        raise CheckpointError(
            f"{workdir} was trained on patches of {_spell(before)}, this config has {_spell(now)}: its position "
            "embedding belongs to other places. Set data.size as it was, or start another workdir from its "
            "weights (init.path), which resizes them"
        )


def check_classes(meta: Mapping[str, Any], run: Run, where: Any, remedy: str) -> None:
    """Raises `CheckpointError` unless a description names the classes of the run, in their order.

    Names are compared without spaces; a side that names none is not compared.
    """
    before, now = runs.class_names(meta), list(run.info.class_names)
    if not before or not now or _joined(before) == _joined(now):
        return
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    if gone or new:
        found = f"it lacks {_listed(gone)} and adds {_listed(new)}"
    else:
        at = next(i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1])
        found = f"the order differs: class {at} was {before[at]!r} and is {now[at]!r}"
    raise CheckpointError(
        f"{where} was trained on {len(before)} classes ({_listed(before)}), data set {run.info.name!r} has "
        f"{len(now)} ({_listed(now)}): {found}. Give the data as it was, or {remedy}"
    )


def _joined(names: Sequence[str]) -> list[str]:
    return ["".join(name.split()) for name in names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "") or "none"


def _spell(grids: Mapping[str, str]) -> str:
    return " / ".join(grids.values())
