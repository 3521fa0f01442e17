"""What is looked at in a trained network: accuracy, and what other tokens, scores, grids or exits make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import weights
from dyntoken.eval import calibration, exits
from dyntoken.eval.solvers import SOLVERS
from dyntoken.registry import Table
from dyntoken.studies.reading import collect
from dyntoken.studies.setting import Setting
from dyntoken.studies.trial import Row, Trial
from dyntoken.train.build import Run, build

Tree = Any
SHARES = (0.25, 0.5, 0.75)  # of the way from the first exit's cost to the last one's
GRIDS = (0.6, 0.8, 1.0, 1.2)  # sides of a token grid, relative to the one trained on
SCORES = {"": {}, "shuffled": {"shuffle": True}, "random": {"score": "random"}}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network of a study.

    Attributes:
      trial, seed: which one.
      run: of its config, opened for evaluation.
      variables: its weights.
      metrics: of its last evaluation, {} of dense weights as they are.
    """

    trial: Trial
    seed: int
    setting: Setting
    run: Run
    variables: Tree
    metrics: Mapping[str, Any]

    model = property(lambda self: self.run.model)

    def row(self, *suffix: str, group: str = "", **values: float) -> Row:
        """A row of this network; a suffix says how it was run."""
        name = " ".join(filter(None, (self.trial.name, *suffix)))
        series = " ".join(filter(None, (self.trial.series or self.trial.name, *suffix)))
        return Row(name, series, group or self.trial.group, values)

    def logits(self, model: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """`[N, K]` (of a model with exits `[E, N, K]`) and labels `[N]`, by default of its own model."""
        model = model or self.model
        many = bool(getattr(model, "exits", ()))

        def read(variables: Tree, images: jax.Array) -> tuple[jax.Array]:
            logits = model.apply(variables, images).logits
            return (jnp.moveaxis(logits, 0, 1) if many else logits,)

        (found,), labels = collect(self.run, self.variables, read)
        return (np.moveaxis(found, 1, 0) if many else found), labels


def top1(found: Trained) -> list[Row]:
    """The network as it was trained."""
    right = found.metrics["top1"] if found.metrics else _share(*found.logits())
    return [found.row(top1=right, gmacs=found.setting.cost(found.model))]


def exchange(found: Trained) -> list[Row]:
    """The tokens that it keeps, those it drops at its first site in their place, and as many random ones.

    The dropped (or random) tokens then stay to the end; nothing is merged. "corrected" is the share of
    the images that the kept tokens get wrong and these get right.
    """
    plain, masked = found.model, found.model.clone(form="mask")
    sites = len(plain.sites())

    def read(variables: Tree, images: jax.Array) -> tuple[jax.Array, ...]:
        kept = plain.apply(variables, images)
        dropped = 1.0 - kept.reductions[0].decision
        draws = jax.random.uniform(jax.random.key(found.seed), dropped.shape[1:])
        few = jnp.argsort(jnp.argsort(draws))[None] < dropped.sum(axis=1, keepdims=True)
        rest = [jnp.ones_like(dropped)] * (sites - 1)
        others = [
            masked.apply(variables, images, decisions=[first.astype(dropped.dtype), *rest]).logits
            for first in (dropped, few)
        ]
        return (kept.logits, *others)

    logits, labels = collect(found.run, found.variables, read)
    right = [rows.argmax(axis=-1) == labels for rows in logits]
    cost, wrong = found.setting.cost(plain), max(1, int((~right[0]).sum()))
    rows = [found.row("kept", top1=float(right[0].mean()), gmacs=cost)]
    for name, one in zip(("dropped", "random"), right[1:], strict=True):
        corrected = float((one & ~right[0]).sum() / wrong)
        rows.append(found.row(name, top1=float(one.mean()), gmacs=cost, corrected=corrected))
    return rows


def scores(found: Trained) -> list[Row]:
    """The same weights with their own scores, with these on other patches, and with random ones."""
    rows = []
    for name, options in SCORES.items():
        own = {**dict(found.model.method_options), **options}
        model = found.model.clone(method_options=tuple(sorted(own.items())))
        logits, labels = found.logits(model)
        cost = found.setting.cost(found.model)
        group = " ".join(filter(None, (found.trial.group, name or "own")))
        rows.append(found.row(name, group=group, top1=_share(logits, labels), gmacs=cost))
        if dict(found.model.method_options).get("score") == "random":
            break  # there is nothing worse
    return rows


def grids(found: Trained) -> list[Row]:
    """The network on other numbers of tokens, its positions resized."""
    body, rows = found.model.plain(), []
    patch = np.broadcast_to(body.patch_size, 2)
    for side in GRIDS:
        grid = [max(2, round(side * n)) for n in body.grid]
        size = tuple(int(n * p) for n, p in zip(grid, patch, strict=True))
        # Nothing is trained; the teacher is one for the grid trained on.
        untaught = {"init": None, "teacher": None, "losses": {"ce": {"weight": 1.0}}}
        config = {**found.run.settings.plain, **untaught}
        config["data"] = {**config["data"], "size": size[0] if size[0] == size[1] else size}
        config["model"] = {k: v for k, v in config["model"].items() if k != "img_size"}
        try:
            run = build(config, training=False)
        except ValueError:
            if side >= 1:
                raise
            continue  # the sites leave nothing of so few tokens
        variables = weights.load_whole(run.model, found.variables, source_grid=body.grid)[0]
        other = dataclasses.replace(found, run=run, variables=variables)
        logits, labels = other.logits()
        name = "x".join(map(str, grid))
        row = other.row(name, group=name, top1=_share(logits, labels), gmacs=found.setting.cost(run.model))
        rows.append(dataclasses.replace(row, series=found.trial.series or found.trial.name))
    return rows


def exit_rules(found: Trained) -> list[Row]:
    """Every exit rule under the exact solver, every solver under the confidence rule, on the held-out half."""
    logits, labels = found.logits()
    costs = np.asarray(_costs(found.model))
    budgets = [float(costs[0] + share * (costs[-1] - costs[0])) for share in SHARES]
    best, rows = list(SOLVERS)[-1], []
    plans = [(rule, best) for rule in exits.RULES] + [
        ("confidence", name) for name in SOLVERS if name != best
    ]
    for rule, solver in plans:
        seen, unseen = calibration.halves(logits, labels, rule, seed=found.seed)
        points = calibration.solve([solver], seen, costs, budgets, seed=found.seed)[solver]
        for share, point in zip(SHARES, points, strict=True):
            there = unseen.judge(point, costs)
            row = found.row(
                rule, solver, f"{share:g}", group=f"{found.trial.name} {share:g}", top1=there.accuracy
            )
            series = f"{found.trial.name} {rule} {solver}"
            rows.append(dataclasses.replace(row, series=series, values={**row.values, "gmacs": there.cost}))
    return rows


def per_exit(found: Trained) -> list[Row]:
    """Each exit of the network alone."""
    rows = []
    for number, (right, cost) in enumerate(
        zip(found.metrics["top1_per_exit"], _costs(found.model), strict=True)
    ):
        row = found.row(f"exit {number}", group=f"exit {number}", top1=right, gmacs=cost)
        rows.append(dataclasses.replace(row, series=found.trial.series or found.trial.name))
    return rows


def _costs(model: Any) -> list[float]:
    from dyntoken.analysis import macs

    return list(macs.gmacs(model))


def _share(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=-1) == labels).mean())


MEASURES = Table(
    "measure",
    {
        "top1": top1,
        "exchange": exchange,
        "scores": scores,
        "grids": grids,
        "exit_rules": exit_rules,
        "per_exit": per_exit,
    },
)
