"""Learning rates, keep rates and parameter groups: kinds `schedules` and `schedules_backbones`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dyntoken import optim, schedules, weights
from dyntoken.reducers.keep import keep_rate_schedule
from dyntoken.weights import files, official
from tests.golden.case import Case
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every table of the case."""
    for name, table in case.info.items():
        if not isinstance(table, Mapping):
            continue
        if name not in TABLES:
            ledger.fail(f"{name}: unknown table")
            continue
        TABLES[name](ledger, name, table)


def _cosine_scheduler(ledger: Ledger, name: str, table: Mapping[str, Any]) -> None:
    given = dict(table["arguments"])
    epochs, per_epoch = given.pop("epochs"), given.pop("niter_per_ep")
    steps = given.pop("warmup_steps", -1)
    rate = schedules.learning_rate(
        "cosine",
        lr=given.pop("base_value"),
        min_lr=given.pop("final_value"),
        warmup_lr=given.pop("start_warmup_value", 0),
        warmup_epochs=given.pop("warmup_epochs", 0),
        warmup_steps=steps if steps > 0 else None,
        total_steps=epochs * per_epoch,
        steps_per_epoch=per_epoch,
    )
    _all_read(given)
    ledger.table(name, [float(rate(step)) for step in range(epochs * per_epoch)], table["values"])


def _lr_per_epoch(ledger: Ledger, name: str, table: Mapping[str, Any]) -> None:
    given = dict(table["arguments"])
    if given.pop("sched") != "cosine":
        raise ValueError("only timm's cosine schedule is known")
    # Without effect before the end of the cosine, where the recorded values stop.
    given.pop("cooldown_epochs", None), given.pop("decay_rate", None)
    epochs, per_epoch = given.pop("epochs"), 3
    rate = schedules.learning_rate(
        "cosine_epoch",
        lr=given.pop("lr"),
        min_lr=given.pop("min_lr"),
        warmup_lr=given.pop("warmup_lr"),
        warmup_epochs=given.pop("warmup_epochs"),
        warmup_steps=None,
        total_steps=epochs * per_epoch,
        steps_per_epoch=per_epoch,
    )
    _all_read(given)
    count = len(table["values"])
    for step, which in ((0, "first"), (per_epoch - 1, "last")):
        ours = [float(rate(epoch * per_epoch + step)) for epoch in range(count)]
        ledger.table(f"{name} ({which} step of each epoch)", ours, table["values"])


def _keep_rate(ledger: Ledger, name: str, table: Mapping[str, Any]) -> None:
    given = dict(table["arguments"])
    maximum = given.pop("max_keep_rate", 1)
    if maximum != 1:
        raise ValueError(f"the keep rate starts at 1, not {maximum}")
    options = {
        "base": given.pop("base_keep_rate"),
        "steps_per_epoch": given.pop("ITERS_PER_EPOCH"),
        "warmup_epochs": given.pop("warmup_epochs"),
        "total_epochs": given.pop("total_epochs"),
    }
    _all_read(given)
    ours = [keep_rate_schedule(step, **options) for step in range(len(table["values"]))]
    ledger.table(name, ours, table["values"])


def _parameter_groups(ledger: Ledger, name: str, table: Mapping[str, Any]) -> None:
    for model, groups in table["groups"].items():
        if model not in MODELS:
            ledger.unsupported(f"{name} {model}", f"groups of {', '.join(MODELS)} are known")
            continue
        backbone = groups["decay"]
        listed = {key for group in groups.values() for key in group["params"]}
        params, keys = _tree(*MODELS[model], listed)
        ours = optim.groups(
            params,
            weight_decay=backbone["weight_decay"],
            backbone_lr_scale=backbone["lr_scale"],
            backbone_freeze_epochs=backbone["fix_step"],
            frozen=("cls_token$", "pos_embed$") if {*keys.values()} - listed else (),
        )
        for group, expected in groups.items():
            mine = {path: row for path, row in ours.items() if row.name == group}
            stem = f"{name} {model}.{group}"
            ledger.same(stem, sorted(keys[path] for path in mine), sorted(expected["params"]))
            for ours_name, theirs in (
                ("weight_decay", "weight_decay"),
                ("lr_scale", "lr_scale"),
                ("freeze_steps", "fix_step"),
            ):
                values = {getattr(row, ours_name) for row in mine.values()}
                ledger.same(f"{stem} {theirs}", sorted(values), [expected[theirs]])
        frozen = {keys[path] for path, row in ours.items() if row.name == "frozen"}
        ledger.same(f"{name} {model} never updated", sorted(frozen), sorted({*keys.values()} - listed))


def _tree(cls: str, options: Mapping[str, Any], listed: Iterable[str]) -> tuple[Any, dict[str, str]]:
    """A tree of parameter shapes with as many blocks and predictors as the keys name, and path -> key."""
    listed = list(listed)
    sites = 1 + _highest(r"(?:layers\.2\.)?score_predictor\.(\d+)", listed)
    stages = BLOCKS.get(cls)
    if stages is None:
        given = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 8,
            "num_heads": 2,
            "depth": 1 + _highest(r"blocks\.(\d+)", listed),
            "pruning_loc": list(range(1, sites + 1)),
            "token_ratio": [0.9**s for s in range(1, sites + 1)],
        }
    else:
        pattern, fast = stages
        first = min(int(hit[1]) for key in listed if (hit := re.match(pattern.format(stage=2) + fast, key)))
        given = {
            "img_size": 32,
            "depths": [1 + _highest(pattern.format(stage=stage), listed) for stage in range(4)],
            "pruning_loc": list(range(first, first + sites)),
            "sparse_ratio": [0.9**s for s in range(1, sites + 1)],
        }
    model = official.build("raoyongming/DynamicViT", cls, {**given, **options}).model
    shapes = {
        path: shape for path, shape in weights.shapes_of(model).items() if not path.startswith("batch_stats/")
    }
    leaves = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    table = {entry.path: entry.key for entry in weights.reference_keys(model).entries}
    return files.nest(leaves), {path: table[path] for path in shapes}


def _highest(pattern: str, keys: Iterable[str]) -> int:
    """The largest number that a pattern finds at the start of a key."""
    return max(int(found[1]) for key in keys if (found := re.match(pattern, key)))


# Class with stages -> its keys' (number of a block, what its fast path adds).
BLOCKS = {
    "AdaSwinTransformer": (r"layers\.{stage}\.blocks\.(\d+)", r"\.fastmlp"),
    "AdaConvNeXt": (r"stages\.{stage}\.(\d+)", r"\.fast_path"),
}
# Model of a table of parameter groups -> its class in raoyongming/DynamicViT and what its constructor needs.
MODELS = {
    "dynamicvit_deit": ("VisionTransformerDiffPruning", {}),
    "dylvvit": ("LVViTDiffPruning", {"return_dense": True}),
    "dyswin": ("AdaSwinTransformer", {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 4}),
    "dyconvnext": ("AdaConvNeXt", {"dims": (8, 16, 32, 64)}),
}


def _all_read(given: Mapping[str, Any]) -> None:
    if given:
        raise ValueError(f"arguments not understood: {', '.join(given)}")


TABLES = {
    "dynamicvit.cosine_scheduler": _cosine_scheduler,
    "dynamicvit.parameter_groups": _parameter_groups,
    "evit.adjust_keep_rate": _keep_rate,
    "evit.lr_per_epoch": _lr_per_epoch,
    "tps.lr_per_epoch": _lr_per_epoch,
}
