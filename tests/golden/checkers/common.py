"""What the checkers share: building models, running them, and rows by label.

A row's label is the original patch it stands for; a fused token gets a label of
its own (first patch count + stage). Labels are followed through the sites on
both sides, so that tokens are compared row by row whatever order each side
keeps them in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dyntoken import weights
from dyntoken.nn.spec import Spec
from dyntoken.weights import keys, official
from tests.golden.case import Case, CaseError

RECORD = ("features", "embed", "blocks", "stages")
# The cases are tiny and run once: compile time is what counts.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass
class Built:
    """A reference model in this library."""

    model: Any
    variables: dict[str, Any]
    keys: keys.KeyMap

    def gradients(self, params: Any) -> dict[str, np.ndarray]:
        """Gradients under the reference's keys and layouts."""
        return self.keys.export(weights.flat_variables(params))


def build(
    case: Case,
    constructor: Mapping[str, Any],
    *,
    repository: str | None = None,
    cls: str | None = None,
    file: str = "weights.safetensors",
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Built:
    """Imports the weights of a case, those of a file or given ones: every key used, none missing."""
    repository = repository or case.info["repository"]
    cls = cls or case.info["reference_class"]
    if not case.has(file):
        raise CaseError(f"{case.folder}: has no {file}")
    given = case.tensors(file) if tensors is None else tensors
    model, variables = weights.import_reference(repository, cls, constructor, given)
    grid_only = official.build(repository, cls, constructor).grid_only
    return Built(model, variables, weights.reference_keys(model, no_embed_class=bool(grid_only)))


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles and runs a function once; results as numpy."""
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=COMPILER)
    return jax.tree.map(np.asarray, compiled(*arguments))


def records(model: Any) -> tuple[str, ...]:
    """Everything that a model can record."""
    return (*RECORD, "dense") if model.aux_weight is not None else RECORD


def evaluate(model: Any, variables: Any, images: np.ndarray) -> Any:
    """Evaluation with everything recorded."""
    return run(lambda v, x: model.apply(v, x, record=records(model)), variables, images)


def captured(built: Built, images: np.ndarray, kinds: tuple[type, ...]) -> tuple[Any, Any]:
    """Evaluation with everything recorded, and what the backbone's modules of these kinds returned."""

    def forward(variables: Any, images: Any) -> Any:
        return built.model.apply(
            variables,
            images,
            record=RECORD,
            capture_intermediates=lambda module, name: name == "__call__" and isinstance(module, kinds),
            mutable=["intermediates"],
        )

    out, state = run(forward, built.variables, images)
    return out, state["intermediates"]["backbone"]


def shrunk(built: Built, stage: int, cells: np.ndarray) -> Any:
    """What a hierarchical backbone makes of the last cells of a stage for the next one, `stage`."""
    return run(
        lambda v, x: built.model.apply(v, x, method=lambda m, x: m.body.downsample(stage, x)),
        built.variables,
        cells,
    )


def with_options(model: Any, **options: Any) -> Any:
    """The same model with other fields of its backbone."""
    options = {**dict(model.backbone.options), **options}
    return model.clone(backbone=Spec.of(model.backbone.make, **options))


def nhwc(images: np.ndarray) -> np.ndarray:
    """`[B, C, H, W]` to `[B, H, W, C]`."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def take(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`rows [B, n, ...]` at `index [B, k]`."""
    return np.stack([row[i] for row, i in zip(rows, index, strict=True)])


def first_labels(batch: int, count: int) -> np.ndarray:
    """`[B, N]`: every row is its own patch."""
    return np.broadcast_to(np.arange(count), (batch, count)).copy()


def order(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`[B, n]` index into our rows that puts them in the reference's order.

    Where the two label sets differ, the result is some order: the comparison of
    the kept sets reports that.
    """
    ranks = np.argsort(np.argsort(theirs, axis=1), axis=1)
    return take(np.argsort(ours, axis=1), ranks)


def align(rows: np.ndarray, ours: np.ndarray, theirs: np.ndarray, prefix: int = 0) -> np.ndarray:
    """Our `rows [B, prefix + n, ...]` in the reference's order; unchanged if the counts differ."""
    if rows.shape[1] - prefix != theirs.shape[1] or ours.shape != theirs.shape:
        return rows
    return np.concatenate([rows[:, :prefix], take(rows[:, prefix:], order(ours, theirs))], axis=1)


def positions(labels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """`[B, k]` place of each label in `among [B, n]`, -1 if it is not there."""
    hit = labels[:, :, None] == among[:, None, :]
    return np.where(hit.any(axis=2), hit.argmax(axis=2), -1)


def complement(keep: np.ndarray, count: int) -> np.ndarray:
    """`[B, n - k]` ascending indices that are not in `keep [B, k]`."""
    return np.stack([np.setdiff1d(np.arange(count), row) for row in keep])


def outgoing(labels: np.ndarray, reduction: Any, fused: int) -> np.ndarray:
    """Labels of our rows after a site, `[B, m]`; `fused` names a row that is no kept one."""
    after = np.full(reduction.place.shape, fused)
    kept = take(labels, reduction.keep)
    rows = take(reduction.remap, reduction.keep)
    for sample, row, label in zip(after, rows, kept, strict=True):
        sample[row] = label
    return after
