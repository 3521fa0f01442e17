"""Models that `show` puts side by side, with their weights."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from dyntoken.tools import calibrate, cli


@dataclasses.dataclass
class Shown:
    """A reduced model.

    Attributes:
      title: what it is called.
      model: module.
      source: of its weights, unless `variables` holds them.
      trained: the workdir (or weights) that may say what it was trained on.
    """

    title: str
    model: Any
    source: Any = None
    trained: Any = None
    variables: Any = None

    def load(self) -> None:
        """Reads the weights, all arrays of the model.

        Raises:
          WeightsError: a source without some of them.
        """
        from dyntoken.weights import load_whole

        if self.variables is None:
            self.variables = load_whole(self.model, self.source)[0]

    def at(self, keep: float) -> Shown:
        """The same with another keep rate.

        Raises:
          ValueError: a model that cannot have it.
        """
        model = self.model.clone(keep=keep)
        model.validate()
        return dataclasses.replace(self, model=model)

    @functools.cached_property
    def _apply(self) -> Any:
        import jax

        return jax.jit(lambda variables, images: self.model.apply(variables, images))

    def __call__(self, images: Any) -> Any:
        """The `Output` of normalised images."""
        return self._apply(self.variables, images)


def of(args: argparse.Namespace) -> list[Shown]:
    """What NAME and --vs stand for, in this order; weights that need a model are not yet read.

    Raises:
      ValueError: a dense model, a method with parameters of its own, or options that do not go together.
    """
    names = [args.name, *args.vs]
    if all(Path(name).is_dir() for name in names) and (args.weights is not None or cli.overrides(args)):
        raise ValueError(
            f"{args.name} is a run, which says what its model and weights are: leave the options out"
        )
    weights = args.weights or next((name for name in names if Path(name).is_dir()), None)
    found = [_of(name, weights, args) for name in names]
    for name, shown in zip(names, found, strict=True):
        if not shown.model.sites():
            raise ValueError(
                f"{shown.title} is dense and keeps every token: name a method, e.g. dtps_{Path(name).name}"
            )
        if shown.model.input_shape != found[0].model.input_shape:
            shapes = [" x ".join(map(str, one.model.input_shape)) for one in (found[0], shown)]
            raise ValueError(f"{found[0].title} takes images of {shapes[0]}, {shown.title} of {shapes[1]}")
    return found


def _of(name: str, weights: str | None, args: argparse.Namespace) -> Shown:
    from dyntoken.models import create_model
    from dyntoken.reducers import METHODS
    from dyntoken.runs import load_run
    from dyntoken.weights import load_pretrained, prepared

    if Path(name).is_dir():
        run = load_run(name)
        return Shown(Path(name).resolve().name, run.model, trained=name, variables=run.variables)
    if weights is None:
        raise cli.UsageError(f"which weights of {name}? give --weights, or a run's workdir in place of NAME")
    method, options = calibrate.method_of(name)
    changed = {**cli.overrides(args), **options}
    if method not in METHODS:
        return Shown(name, prepared(create_model(name, **changed), weights), weights, weights)
    model, variables, report = load_pretrained(weights, method=method, return_report=True, **changed)
    if report.missing:
        raise ValueError(
            f"{method} has parameters of its own ({report.missing[0]}, ...), which {weights} does not hold: "
            "train it first"
        )
    return Shown(name, model, trained=weights, variables=variables)
