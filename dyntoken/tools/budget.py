"""Exit thresholds under a budget: `python -m dyntoken.tools.budget --workdir=...`."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import paths
from dyntoken.analysis import macs, plot, published, timing
from dyntoken.eval import calibration, collect, exits, thresholds
from dyntoken.eval.calibration import CALIBRATION, HELD_OUT, Half, Point
from dyntoken.eval.thresholds import Solution
from dyntoken.tools import cli
from dyntoken.train.evaluate import open_workdir

TEXT = """\
Finds one threshold per exit of a trained model, so that an image costs a given
budget on average and as many images as possible are classified correctly.

The split (by default the run's evaluation split) is halved: images of even
index calibrate the thresholds, images of odd index judge them. Another split
calibrates on other images, e.g. --split='train[:10000]'; it is evaluated
without augmentation.

Writes calibration.json, curves.csv, curves.png and shares.png into
WORKDIR/budget."""
EXAMPLES = """\
  python -m dyntoken.tools.budget --workdir=runs/dvt_demo
  python -m dyntoken.tools.budget --workdir=runs/dvt_demo --gmacs=0.01,0.02 --solver=optimal
  python -m dyntoken.tools.budget --workdir=runs/dvt_demo --ms=5 --rule=margin"""
UNITS = {"gmacs": "GMACs", "ms": "ms"}
COLUMNS = (
    "model",
    "kind",
    "solver",
    "rule",
    "half",
    "budget",
    "cost",
    "unit",
    "gmacs",
    "accuracy",
    "standard_error",
)
HEADINGS = (
    *("budget", "solver", "calibration", "held-out", "cost", "held-out cost"),
    *("exits", "evaluations", "seconds"),
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model with exits and what it says about a split.

    Attributes:
      name: of the model.
      data: name of the data set and the split.
      step: of the checkpoint.
      logits, labels: `[E, N, K]` and `[N]`.
      gmacs: per exit, cumulative, in 1e9.
      costs: per exit, cumulative, in the unit of the budgets.
    """

    name: str
    data: tuple[str, str]
    step: int
    logits: np.ndarray
    labels: np.ndarray
    gmacs: np.ndarray
    costs: np.ndarray


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Solves, prints a table and writes the results; returns the exit status."""
    args = _parser().parse_args(argv)
    exits.RULES[args.rule]  # a wrong name must not show up after the inference
    names = list(thresholds.SOLVERS) if args.solver == "all" else [args.solver]
    for name in names:
        thresholds.SOLVERS[name]
    unit = "gmacs" if args.ms is None else "ms"
    run = load(args.workdir, args, unit)
    cited = published.rows(run.data[0]) if args.published else ()
    if cited and unit == "ms":
        raise ValueError("the published curves are in GMACs: leave --ms or --published out")
    rival = load(args.vs, args, unit) if args.vs else None
    if rival is not None and rival.data != run.data:
        raise ValueError(f"--vs saw {'/'.join(rival.data)}, this run {'/'.join(run.data)}: give --split")
    result = Result.of(run, names, args, unit)
    other = None
    if rival is not None:
        again = argparse.Namespace(**{**vars(args), unit: ()})  # its own sweep: its exits cost something else
        other = Result.of(rival, names[-1:], again, unit, rules=False)
    out = paths.resolve(args.workdir) / "budget"
    say = (lambda line: print(line, file=sys.stderr)) if args.json else print
    result.write(out, args, other, cited, say)
    print(json.dumps(result.as_json(args)) if args.json else report(result, other))
    say(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser("budget", TEXT, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="of a trained model with exits")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--gmacs",
        type=cli.floats,
        nargs="?",
        const=(),
        help="average budgets in 1e9 multiply-adds (0.01,0.02)",
    )
    asked.add_argument(
        "--ms",
        type=cli.floats,
        nargs="?",
        const=(),
        help="average budgets in measured ms per image (without: a sweep)",
    )
    parser.add_argument("--rule", default="confidence", help=f"exit rule: {', '.join(exits.RULES)}")
    parser.add_argument("--solver", default="all", help=f"all, or one of {', '.join(thresholds.SOLVERS)}")
    parser.add_argument("--split", help="split to read, halved by even and odd index (default: the run's)")
    parser.add_argument("--points", type=cli.positive, default=20, help="budgets of a sweep (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the genetic search and of the random rule")
    parser.add_argument("--ema", action="store_true", help="take the weight average")
    parser.add_argument("--vs", metavar="WORKDIR", help="another model with exits, drawn beside this one")
    parser.add_argument("--published", action="store_true", help="draw the papers' curves too (ImageNet)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def load(workdir: str, args: argparse.Namespace, unit: str) -> Loaded:
    """Runs every exit of a workdir's model over the split.

    Raises:
      ValueError: no run there, or a model without exits.
    """
    opened = open_workdir(workdir, split=args.split, ema=args.ema, log=_stderr)
    plan, model = opened.run, opened.run.model
    step = collect.make_step(model, plan.mesh, prepare=plan.prepare)
    logits, labels = collect.collect(step, opened.variables, opened.batches())
    gmacs = costs = np.array(macs.gmacs_per_exit(model, macs.count(model)))
    if unit == "ms":
        # On one device: the variables lie on all of them.
        variables = jax.device_put(jax.device_get(opened.variables), jax.devices()[0])
        images = plan.prepare(next(plan.eval_batches())["image"])
        costs = 1e3 * np.asarray(timing.exit_times(model, variables, images))
    data = plan.settings.data
    return Loaded(
        plan.settings.model["name"],
        (data.name, str(data.eval_split)),
        opened.step,
        logits,
        labels,
        gmacs,
        costs,
    )


def _stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Result:
    """Solutions and points of one model.

    Attributes:
      run: the model.
      unit: "gmacs" or "ms".
      rule: exit rule.
      both: calibration and held-out half.
      solutions: solver -> one per budget.
      points: everything that is drawn and written.
    """

    run: Loaded
    unit: str
    rule: str
    both: tuple[Half, Half]
    solutions: dict[str, list[Solution]]
    points: list[Point]

    @classmethod
    def of(
        cls, run: Loaded, names: Sequence[str], args: argparse.Namespace, unit: str, *, rules: bool = True
    ) -> Result:
        """Solves for every budget; the other rules too, where the optimal solver is asked for."""
        both = calibration.halves(run.logits, run.labels, args.rule, seed=args.seed)
        given = getattr(args, unit)
        budgets = given or calibration.sweep(run.costs, args.points)
        solutions = calibration.solve(names, both[0], run.costs, budgets, seed=args.seed)
        points = []
        for half in both:
            points += calibration.anytime(half, run.costs, args.rule)
            for rows in solutions.values():
                points += calibration.budgeted(half, rows, run.costs, args.rule)
        for rule in exits.RULES if rules and "optimal" in solutions else ():
            if rule != args.rule:
                halves = calibration.halves(run.logits, run.labels, rule, seed=args.seed)
                rows = calibration.solve(["optimal"], halves[0], run.costs, budgets)["optimal"]
                for half in halves:
                    points += calibration.budgeted(half, rows, run.costs, rule)
        return cls(run, unit, args.rule, both, solutions, points)

    @property
    def best(self) -> str:
        """The solver whose thresholds are recommended."""
        return list(self.solutions)[-1]

    def where(self, **wanted: Any) -> list[Point]:
        """The points with these attributes."""
        return [p for p in self.points if all(getattr(p, key) == value for key, value in wanted.items())]

    def as_json(self, args: argparse.Namespace) -> dict[str, Any]:
        """What `calibration.json` holds: the recommended thresholds on top, those of each solver below."""
        rows = self.solutions[self.best]
        return {
            "model": self.run.name,
            "step": self.run.step,
            "ema": args.ema,
            "data": self.run.data[0],
            "split": self.run.data[1],
            "images": {half.name: half.images for half in self.both},
            "rule": self.rule,
            "seed": args.seed,
            "solver": self.best,
            "unit": self.unit,
            "gmacs": self.run.gmacs.tolist(),
            "costs": self.run.costs.tolist(),
            "budgets": [s.budget for s in rows],
            "thresholds": [s.thresholds.tolist() for s in rows],
            "held_out": [p.accuracy for p in self.where(half=HELD_OUT, solver=self.best, rule=self.rule)],
            "solvers": calibration.as_json(self.solutions),
        }

    def write(
        self,
        out: epath.Path,
        args: argparse.Namespace,
        other: Result | None,
        cited: Sequence[published.Published],
        say: Any,
    ) -> None:
        """Writes the four files; without matplotlib, the two that need none."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "calibration.json").write_text(json.dumps(self.as_json(args), indent=2) + "\n")
        (out / "curves.csv").write_text(as_csv([self] if other is None else [self, other]))
        try:
            plot.save(draw_curves(self, other, cited), out / "curves.png")
            plot.save(draw_shares(self), out / "shares.png")
        except ModuleNotFoundError as error:
            say(f"no pictures: {error}")


def as_csv(results: Sequence[Result]) -> str:
    """All points, one per line."""
    exits_ = max(len(result.run.costs) for result in results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"share_{index}" for index in range(exits_))])
    for result in results:
        for p in result.points:
            gmacs = float(np.dot(p.shares, result.run.gmacs))
            row = [result.run.name, p.kind, p.solver or "", p.rule, p.half]
            row += [
                "" if p.budget is None else _digits(p.budget),
                _digits(p.cost),
                result.unit,
                _digits(gmacs),
            ]
            row += [_digits(value) for value in (p.accuracy, p.error, *p.shares)]
            writer.writerow(row + [""] * (exits_ - len(p.shares)))
    return text.getvalue()


def _digits(value: float) -> str:
    return f"{value:.9g}"


def draw_curves(result: Result, other: Result | None, cited: Sequence[published.Published]) -> Any:
    """Accuracy on the held-out half against average cost."""
    series = [_series("each exit alone", result.where(half=HELD_OUT, kind="anytime"), "anytime")]
    for solver in result.solutions:
        points = result.where(half=HELD_OUT, solver=solver, rule=result.rule)
        series.append(_series(f"{solver}, {result.rule}", points, "budgeted", band=solver == result.best))
    for rule in exits.RULES:
        points = result.where(half=HELD_OUT, rule=rule, kind="budgeted")
        if rule != result.rule and points:
            series.append(_series(f"optimal, {rule}", points, "rule"))
    if other is not None:
        points = other.where(half=HELD_OUT, kind="anytime")
        series.append(_series(f"{other.run.name}: each exit alone", points, "rival"))
        points = other.where(half=HELD_OUT, kind="budgeted")
        series.append(_series(f"{other.run.name}: {other.best}", points, "other"))
    for row in cited:
        cost, accuracy = np.array(row.points).T
        series.append(plot.Series(f"{row.name} (cited)", cost, accuracy / 100, "cited"))
    images = result.both[1].images
    return plot.curves(
        series,
        xlabel=f"average cost of an image ({UNITS[result.unit]})",
        title=f"{result.run.name} on {images} held-out images of {'/'.join(result.run.data)}",
    )


def _series(label: str, points: Sequence[Point], kind: str, *, band: bool = False) -> plot.Series:
    cost, accuracy, errors = np.array([(p.cost, p.accuracy, p.error) for p in points]).T
    return plot.Series(label, cost, accuracy, kind, errors if band else None)


def draw_shares(result: Result) -> Any:
    """Exit shares of the recommended thresholds on the held-out half, against the budget."""
    points = sorted(
        result.where(half=HELD_OUT, solver=result.best, rule=result.rule), key=lambda point: point.budget
    )
    return plot.shares(
        [p.budget for p in points],
        np.array([p.shares for p in points]),
        xlabel=f"average budget of an image ({UNITS[result.unit]})",
        title=f"{result.run.name}: where images leave ({result.best}, {result.rule})",
    )


def report(result: Result, other: Result | None = None) -> str:
    """The tables and the summary as text."""
    parts = [_table(result), _summary(result)]
    if other is not None:
        parts.append(_table(other))
    return "\n\n".join(filter(None, parts))


def _table(result: Result) -> str:
    run, unit = result.run, UNITS[result.unit]
    counts = " + ".join(f"{half.images} {half.name}" for half in result.both)
    head = (
        f"{run.name}, {result.rule} rule, {counts} images of {'/'.join(run.data)}; costs in {unit} per image"
    )
    rows = [["", "cost", "calibration", "held-out"]]
    pairs = [result.where(half=half, kind="anytime") for half in (CALIBRATION, HELD_OUT)]
    for index, (seen, unseen) in enumerate(zip(*pairs, strict=True)):
        rows.append([f"exit {index} alone", f"{seen.cost:.4g}", _percent(seen), _percent(unseen)])
    alone = cli.table(rows)
    rows = [list(HEADINGS)]
    for index in range(len(result.solutions[result.best])):
        for name, solutions in result.solutions.items():
            wanted = {"solver": name, "rule": result.rule}
            seen = result.where(half=CALIBRATION, **wanted)[index]
            unseen = result.where(half=HELD_OUT, **wanted)[index]
            shares = " ".join(f"{100 * share:3.0f}" for share in unseen.shares)
            costs = [f"{seen.cost:.4g}", f"{unseen.cost:.4g}"]
            effort = [str(solutions[index].evaluations), f"{solutions[index].seconds:.2f}"]
            budget = f"{seen.budget:.4g}"
            rows.append([budget, name, _percent(seen), _percent(unseen), *costs, shares, *effort])
    note = "exits: % of the held-out images that leave at each; top-1 in % with its standard error"
    return f"{head}\n\n{alone}\n\n{cli.table(rows)}\n{note}"


def _percent(point: Point) -> str:
    return f"{100 * point.accuracy:.2f} ({100 * point.error:.2f})"


def _summary(result: Result) -> str:
    """How the optimal solver compares with the two others; empty if it has none to compare with."""
    if "optimal" not in result.solutions:
        return ""
    lines = []
    for half in result.both:
        for name, solutions in result.solutions.items():
            if name == "optimal":
                continue
            found = calibration.compare(half, result.solutions["optimal"], solutions)
            lines.append(
                f"{half.name}: optimal is at or above {name} at {found.above} of {found.budgets} budgets, "
                f"by {100 * found.difference:+.2f} points on average (standard error {100 * found.error:.2f}); "
                f"at worst {found.shortfall:.2f} standard errors below"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
