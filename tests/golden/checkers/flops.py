"""Multiply-adds: kinds `flops` and `flops_backbones`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dyntoken.analysis import macs
from dyntoken.weights import files, official
from tests.golden.case import Case
from tests.golden.ledger import Ledger

PRODUCTS = ("linear", "matmul", "bmm", "einsum")
NORMS = ("layer_norm", "batch_norm")


def check(case: Case, ledger: Ledger) -> None:
    """Convolutions and matrix products of every entry, exactly."""
    for index, entry in enumerate(case.info["entries"]):
        _check_entry(ledger, f"entry {index} {entry['model_class']}", entry)
    ledger.note("norm rows of fvcore and the totals of torchprofile are the counters' own and not compared")


def _check_entry(ledger: Ledger, name: str, entry: Mapping[str, Any]) -> None:
    batch, channels, height, width = entry["input"]
    if batch != 1:
        raise ValueError(f"{name}: counted for {batch} images")
    try:
        official.find_reference(entry["repository"], entry["model_class"])
    except files.WeightsError as error:
        ledger.unsupported(name, str(error))
        return
    constructor = {"img_size": (height, width), "in_chans": channels, **entry["constructor"]}
    model = official.build(entry["repository"], entry["model_class"], constructor).model
    if entry["model_class"].startswith("Ada"):
        ledger.note(f"{name}: the counter traces the model, which rounds N * ratio in float32")
        model = model.clone(keep=_traced(model))
    counted = macs.count(model, (height, width, channels))
    theirs = entry["fvcore"]["by_operator"]
    unknown = set(theirs) - {"conv", *PRODUCTS, *NORMS}
    if unknown:
        raise ValueError(f"{name}: unknown operators {', '.join(sorted(unknown))}")
    # Its predictors are 1x1 convolutions there, linear layers here.
    moved = sum(stage.reducer for stage in counted.stages) if "ConvNeXt" in entry["model_class"] else 0
    ledger.equal(f"{name} conv", counted.conv + moved, theirs.get("conv", 0))
    ledger.equal(f"{name} products", counted.dot - moved, sum(theirs.get(kind, 0) for kind in PRODUCTS))


def _traced(model: Any) -> tuple[int, ...]:
    """How many cells each site keeps where N is a traced tensor."""
    sides = [model.plain().site_grid(at) for at in model.at]
    return tuple(
        int(np.float32(rows * columns) * np.float32(rate))
        for (rows, columns), rate in zip(sides, model.keep, strict=True)
    )
