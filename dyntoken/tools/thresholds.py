"""Exit thresholds under a budget.

Finds one threshold per exit of a trained model, so that an image costs a given
budget on average and as many images as possible are classified correctly.

The split (by default the run's evaluation split) is halved: images of even
index calibrate the thresholds, images of odd index judge them. Another split
calibrates on other images, e.g. --split='train[:10000]'; it is evaluated
without augmentation.

Writes calibration.json, curves.csv, curves.png and shares.png into
WORKDIR/budget.

examples:
  python -m dyntoken.tools.thresholds --workdir=runs/dvt_demo
  python -m dyntoken.tools.thresholds --workdir=runs/dvt_demo --gmacs=0.01,0.02 --solver=optimal
  python -m dyntoken.tools.thresholds --workdir=runs/dvt_demo --ms=5 --rule=margin
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import paths
from dyntoken.analysis import exit_plots, figures, literature, macs, timing
from dyntoken.eval import calibration, exits
from dyntoken.eval.calibration import CALIBRATION, HELD_OUT, Half
from dyntoken.eval.exits import Operating
from dyntoken.eval.logits import collect, make_logits_step
from dyntoken.eval.solvers import SOLVERS
from dyntoken.tools import cli
from dyntoken.train.evaluate import Opened, open_workdir

Result = dict[str, Any]
UNITS = {"gmacs": "GMACs", "ms": "ms"}
BEST = [*SOLVERS][-1]
COLUMNS = (
    *("model", "kind", "solver", "rule", "half", "budget", "cost", "unit"),
    *("gmacs", "accuracy", "standard_error"),
)
HEADINGS = (
    *("budget", "solver", "calibration", "held-out", "cost", "held-out cost"),
    *("exits", "evaluations", "seconds"),
)


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("--workdir", required=True, help="of a trained model with exits")
    asked = parser.add_mutually_exclusive_group()
    for unit, what in (("gmacs", "1e9 multiply-adds (0.01,0.02)"), ("ms", "measured ms per image")):
        text = f"average budgets in {what}; without numbers, a sweep"
        asked.add_argument(f"--{unit}", type=cli.floats, nargs="?", const=(), help=text)
    parser.add_argument("--rule", default="confidence", help=f"exit rule: {', '.join(exits.RULES)}")
    parser.add_argument("--solver", default="all", help=f"all, or one of {', '.join(SOLVERS)}")
    parser.add_argument("--split", help="split to read, halved by even and odd index (default: the run's)")
    parser.add_argument("--points", type=cli.positive, default=20, help="budgets of a sweep (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the genetic search and of the random rule")
    parser.add_argument("--ema", action="store_true", help="take the weight average")
    parser.add_argument("--vs", metavar="WORKDIR", help="another model with exits, drawn beside this one")
    parser.add_argument("--published", action="store_true", help="draw the papers' curves too (ImageNet)")


def measure(args: argparse.Namespace) -> Result:
    """Solves for every budget and writes the files.

    Returns:
      what `calibration.json` holds: the recommended thresholds on top, those of
      each solver under "solvers", every point of the curves under "points".
    """
    exits.RULES[args.rule]  # a wrong name must not show up after the inference
    names = list(SOLVERS) if args.solver == "all" else [args.solver]
    for name in names:
        SOLVERS[name]
    unit = "gmacs" if args.ms is None else "ms"
    run = load(args.workdir, args, unit)
    cited = literature.rows(run["data"]) if args.published else {}
    if cited and unit == "ms":
        raise ValueError("the published curves are in GMACs: leave --ms or --published out")
    rival = load(args.vs, args, unit) if args.vs else None
    seen, here = (of and f"{of['data']}/{of['split']}" for of in (rival, run))
    if rival and seen != here:
        raise ValueError(f"--vs saw {seen}, this run {here}: give --split")
    others = [rule for rule in exits.RULES if rule != args.rule and BEST in names]
    result = solve(run, names, getattr(args, unit), others, args)
    if rival is not None:  # a sweep of its own: its exits cost something else
        result["vs"] = solve(rival, names[-1:], None, [], args)
    write(paths.resolve(args.workdir) / "budget", result, cited)
    return result


def read(workdir: str, split: str | None, ema: bool) -> tuple[Opened, np.ndarray, np.ndarray]:
    """A run, and its logits `[E, N, K]` and labels `[N]` of a split (by default its evaluation split).

    Raises:
      ValueError: no run there, or a model without exits.
    """
    told = lambda line: print(line, file=sys.stderr)  # noqa: E731
    opened = open_workdir(workdir, split=split, ema=ema, log=told)
    step = make_logits_step(opened.run.model, opened.run.mesh, prepare=opened.run.prepare)
    return opened, *collect(step, opened.variables, opened.batches())


def load(workdir: str, args: argparse.Namespace, unit: str) -> Result:
    """What a run says about the split, and the costs of its exits."""
    opened, logits, labels = read(workdir, args.split, args.ema)
    plan, model, data = opened.run, opened.run.model, opened.run.settings.data
    gmacs = costs = macs.gmacs(model)
    if unit == "ms":
        # On one device: the variables lie on all of them.
        variables = jax.device_put(jax.device_get(opened.variables), jax.devices()[0])
        images = plan.prepare(next(plan.eval_batches())["image"])
        costs = (1e3 * np.asarray(timing.exit_times(model, variables, images))).tolist()
    facts = {"model": plan.settings.model["name"], "step": opened.step, "ema": args.ema}
    facts |= {"data": data.name, "split": str(data.eval_split), "unit": unit, "gmacs": gmacs, "costs": costs}
    return facts | {"logits": logits, "labels": labels}


def solve(
    run: Result, names: Sequence[str], budgets: Sequence[float] | None, others: Sequence[str], args: Any
) -> Result:
    """Thresholds of one model for every budget; of the `others` among the rules those of the best solver."""
    facts = {key: value for key, value in run.items() if key not in ("logits", "labels")}
    if not budgets:
        if args.points < 2:
            raise ValueError(f"a sweep has two ends: points must be at least 2, got {args.points}")
        budgets = np.linspace(run["costs"][0], run["costs"][-1], args.points)
    points, comparisons, images = [], [], {}
    for rule in (args.rule, *others):
        own = rule == args.rule
        both = calibration.halves(run["logits"], run["labels"], rule, seed=args.seed)
        found = calibration.solve(names if own else [BEST], both[0], run["costs"], budgets, seed=args.seed)
        for half in both:
            here = exits.anytime(half.correct, run["costs"]) if own else []
            here += [half.judge(point, run["costs"]) for point in itertools.chain(*found.values())]
            points += [_as_row(point, rule, half, facts) for point in here]
        if own:
            solutions, images = found, {half.name: half.images for half in both}
            for half, name in itertools.product(both, [*found][:-1]):
                pair = calibration.compare(half, found[BEST], found[name])
                comparisons.append({"half": half.name, "solver": name, **pair})
    best = list(solutions)[-1]
    return {
        **facts,
        "images": images,
        "rule": args.rule,
        "seed": args.seed,
        "solver": best,
        "budgets": [point.budget for point in solutions[best]],
        "thresholds": [point.thresholds.tolist() for point in solutions[best]],
        "held_out": [row["accuracy"] for row in _of(points, half=HELD_OUT, solver=best, rule=args.rule)],
        "solvers": {name: [_plain(point) for point in rows] for name, rows in solutions.items()},
        "comparisons": comparisons,
        "points": points,
    }


def _plain(point: Operating) -> dict[str, Any]:
    return {key: np.asarray(value).tolist() for key, value in vars(point).items() if key != "solver"}


def _as_row(point: Operating, rule: str, half: Half, facts: Result) -> dict[str, Any]:
    return {
        "model": facts["model"],
        "kind": "anytime" if point.solver is None else "budgeted",
        "solver": point.solver,
        "rule": rule,
        "half": half.name,
        "budget": point.budget,
        "cost": point.cost,
        "unit": facts["unit"],
        "gmacs": float(np.dot(point.shares, facts["gmacs"])),
        "accuracy": point.accuracy,
        "standard_error": point.error,
        "shares": point.shares.tolist(),
    }


def _of(points: Sequence[Result], **wanted: Any) -> list[Result]:
    """The points with these values."""
    return [row for row in points if all(row[key] == value for key, value in wanted.items())]


def write(out: epath.Path, result: Result, cited: literature.Curves) -> None:
    """Writes the four files; without matplotlib, the two that need none."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "curves.csv").write_text(as_csv([*result["points"], *result.get("vs", {}).get("points", ())]))
    try:
        figures.save(draw_curves(result, cited), out / "curves.png")
        figures.save(draw_shares(result), out / "shares.png")
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    print(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}", file=sys.stderr)


def as_csv(points: Sequence[Result]) -> str:
    """All points, one per line."""
    count = max(len(row["shares"]) for row in points)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"share_{index}" for index in range(count))])
    for row in points:
        cells = [*(row[key] for key in COLUMNS), *row["shares"], *[""] * (count - len(row["shares"]))]
        writer.writerow(["" if c is None else f"{c:.9g}" if isinstance(c, float) else c for c in cells])
    return text.getvalue()


def draw_curves(result: Result, cited: literature.Curves) -> Any:
    """Accuracy on the held-out half against average cost."""
    points = _of(result["points"], half=HELD_OUT)
    series = [_series("each exit alone", _of(points, kind="anytime"), "anytime")]
    for name in result["solvers"]:
        mine = _of(points, solver=name, rule=result["rule"])
        series.append(_series(f"{name}, {result['rule']}", mine, "budgeted", band=name == result["solver"]))
    for rule in {row["rule"]: None for row in points if row["rule"] != result["rule"]}:
        series.append(_series(f"{BEST}, {rule}", _of(points, rule=rule), "rule"))
    if rival := result.get("vs"):
        points = _of(rival["points"], half=HELD_OUT)
        series.append(_series(f"{rival['model']}: each exit alone", _of(points, kind="anytime"), "rival"))
        series.append(_series(f"{rival['model']}: {rival['solver']}", _of(points, kind="budgeted"), "other"))
    for name, curve in cited.items():
        cost, accuracy = np.array(curve).T
        series.append(exit_plots.Series(f"{name} (cited)", cost, accuracy / 100, "cited"))
    return exit_plots.curves(
        series,
        xlabel=f"average cost of an image ({UNITS[result['unit']]})",
        title=f"{result['model']} on {result['images'][HELD_OUT]} held-out images of "
        f"{result['data']}/{result['split']}",
    )


def _series(label: str, points: Sequence[Result], kind: str, *, band: bool = False) -> exit_plots.Series:
    cost, accuracy, errors = ([p[key] for p in points] for key in ("cost", "accuracy", "standard_error"))
    return exit_plots.Series(label, cost, accuracy, kind, errors if band else None)


def draw_shares(result: Result) -> Any:
    """Exit shares of the recommended thresholds on the held-out half, against the budget."""
    points = _of(result["points"], half=HELD_OUT, solver=result["solver"], rule=result["rule"])
    points = sorted(points, key=lambda row: row["budget"])
    return exit_plots.shares(
        [row["budget"] for row in points],
        np.array([row["shares"] for row in points]),
        xlabel=f"average budget of an image ({UNITS[result['unit']]})",
        title=f"{result['model']}: where images leave ({result['solver']}, {result['rule']})",
    )


def report(result: Result) -> str:
    """The tables, and how the best solver compares with the others."""
    lines = [
        f"{row['half']}: {BEST} is at or above {row['solver']} at {row['above']} of {row['budgets']} budgets, "
        f"by {100 * row['difference']:+.2f} points on average (standard error {100 * row['error']:.2f}); "
        f"at worst {row['shortfall']:.2f} standard errors below"
        for row in result["comparisons"]
    ]
    parts = [_table(result), "\n".join(lines), _table(result["vs"]) if "vs" in result else ""]
    return "\n\n".join(filter(None, parts))


def _table(result: Result) -> str:
    images = " + ".join(f"{count} {half}" for half, count in result["images"].items())
    head = (
        f"{result['model']}, {result['rule']} rule, {images} images of {result['data']}/{result['split']}; "
        f"costs in {UNITS[result['unit']]} per image"
    )
    seen, unseen = (_of(result["points"], half=half, rule=result["rule"]) for half in (CALIBRATION, HELD_OUT))
    count = len(result["costs"])
    alone = [["", "cost", "calibration", "held-out"]]
    for index, (one, other) in enumerate(zip(seen[:count], unseen[:count], strict=True)):
        alone.append([f"exit {index} alone", f"{one['cost']:.4g}", _percent(one), _percent(other)])
    solved = itertools.chain(*result["solvers"].values())
    rows = []
    for one, other, found in zip(seen[count:], unseen[count:], solved, strict=True):
        shares = " ".join(f"{100 * share:3.0f}" for share in other["shares"])
        cells = [f"{one['budget']:.4g}", one["solver"], _percent(one), _percent(other)]
        cells += [f"{one['cost']:.4g}", f"{other['cost']:.4g}", shares]
        rows.append([*cells, str(found["evaluations"]), f"{found['seconds']:.2f}"])
    each = len(result["budgets"])
    rows = [row for index in range(each) for row in rows[index::each]]  # by budget, not by solver
    note = "exits: % of the held-out images that leave at each; top-1 in % with its standard error"
    return f"{head}\n\n{cli.table(alone)}\n\n{cli.table([list(HEADINGS), *rows])}\n{note}"


def _percent(row: Result) -> str:
    return f"{100 * row['accuracy']:.2f} ({100 * row['standard_error']:.2f})"


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
