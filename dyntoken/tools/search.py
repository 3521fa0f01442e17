"""A keep schedule for a checkpoint: which blocks reduce and how many patches they leave, within a budget.

Measures how far single reductions move the model's answers from the dense ones on unlabelled
pictures, and what they cost on this machine (--latency) or in multiply-adds (--gmacs); a solver
puts sites together; the best few are measured. Half of the pictures choose, the other half judges
what was chosen beside the uniform schedule (the method's own sites, one keep rate) of equal cost.

examples:
  python -m dyntoken.tools.search dinov2_small --data=cifar10 --img_size=112 --images=512 --latency=0.6
  python -m dyntoken.tools.search pretrained:vit_mini_patch4_28 --data=fashion_mnist_mini --method=etps --gmacs=0.6
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dyntoken.tools import calibrate, cli

if TYPE_CHECKING:
    import numpy as np

    from dyntoken.models import Model

TRIES = (1.0, 0.97, 0.94, 0.9)  # of the budget, for the solver: a prediction may be too low


def arguments(parser: cli.Parser) -> None:
    """The options."""
    calibrate.add(parser)
    parser.add_argument("--method", default="etps", help="method, as in tools.sweep (default etps)")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--latency", type=float, help="share of the dense model's time, measured here (0.6)")
    group.add_argument("--gmacs", type=float, help="share of its multiply-adds (0.6)")
    parser.add_argument(
        "--levels",
        type=cli.floats,
        default=(0.85, 0.7, 0.55, 0.4, 0.25),
        help="shares of the patches to choose from (default 0.85,0.7,0.55,0.4,0.25)",
    )
    parser.add_argument("--sites", type=cli.positive, default=4, help="at most so many sites (default 4)")
    parser.add_argument("--pairs", type=cli.positive, default=7, help="timed pairs (default 7)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates, solves, measures."""
    import numpy as np

    from dyntoken.analysis import schedule_search as schedules
    from dyntoken.models import reduced

    budget = args.latency or args.gmacs
    if not 0 < budget < 1:
        raise cli.UsageError("the budget is a share of the dense model's cost, between 0 and 1")
    dense, variables = calibrate.load(args)
    method, options = calibrate.method_of(args.method)
    if extra := calibrate.fresh(reduced(dense, method, **options), dense):
        raise ValueError(
            f"method {args.method!r} has parameters of its own ({extra[0]}, ...): train it first"
        )
    judge = calibrate.Judge(args, dense, variables)
    half = np.arange(len(judge.pictures)) % 2 == 0
    body = dense.plain()
    inside = reduced(dense, method, **options).sites()[0].inside
    patches = int(np.prod(body.grid))
    counts = sorted({max(1, int(patches * level)) for level in args.levels} - {patches}, reverse=True)

    def make(at: tuple[int, ...], keep: tuple[int, ...]) -> Model:
        return reduced(dense, method, at=at, keep=keep, **options)

    blocks = [block for block in range(1, body.depth) if _takes(make, block, counts[-1])]
    if not blocks:
        raise ValueError(f"method {args.method!r} takes no single block of {dense.arch} as its site")
    cost = Costs(calibrate.Clock(args, dense, variables), args)
    totals = {count: cost(make((blocks[0],), (count,))) for count in counts}
    costs = schedules.block_costs(body.depth, blocks[0], inside, totals, patches)
    errors = {}
    for block in blocks:
        for count in counts:
            errors[block, count] = _moved(judge, make((block,), (count,)), half)
        said = ", ".join(f"{count}: {errors[block, count]:.4f}" for count in counts)
        print(f"block {block}: moved by patches left {said}", file=sys.stderr, flush=True)
    plans = dict.fromkeys(
        (found.at, found.keep)
        for share in TRIES
        if (found := schedules.search(body.depth, inside, errors, costs, budget * share, sites=args.sites))
        and found.at
    )
    if not plans:
        raise ValueError(
            f"no schedule of these levels costs {budget} of the dense model: give lower --levels"
        )
    rows = [_row(judge, cost, make(*plan), half, "searched") for plan in plans]
    sites = reduced(dense, method, **options).at
    even = _uniform(
        lambda rate: reduced(dense, method, at=sites, keep=rate, **options), cost, budget, body.depth
    )
    rows.append(_row(judge, cost, even, half, "uniform"))
    fits = [row for row in rows if row["chosen_by"] == "searched" and row["cost"] <= budget * 1.02]
    best = min(fits or rows[:-1], key=lambda row: row["moved"])
    best["best"] = True
    chosen = f"method={method!r}, at={tuple(best['at'])}, keep={tuple(best['keep'])}"
    call = f"dyntoken.load_pretrained({args.source!r}, {chosen})"
    gain = best["agrees"] - rows[-1]["agrees"]
    return {"model": dense.arch, "budget": budget, "rows": rows, "call": call, "gain": gain}


def _takes(make: Any, block: int, count: int) -> bool:
    try:
        make((block,), (count,)).sites()
    except ValueError:
        return False
    return True


class Costs:
    """Cost of a model as a share of the dense one's, by the clock or by multiply-adds."""

    def __init__(self, clock: calibrate.Clock, args: argparse.Namespace):
        self.clock, self.pairs, self.timed = clock, args.pairs, args.latency is not None

    def __call__(self, model: Model) -> float:
        from dyntoken.analysis import macs

        if self.timed:
            return 1 / self.clock.speed(model, self.pairs)[0]
        return macs.count(model).gmacs / macs.count(self.clock.dense).gmacs


def _moved(
    judge: calibrate.Judge, model: Model, part: np.ndarray, features: np.ndarray | None = None
) -> float:
    """How far a model's answers are from the dense ones: 1 - cosine, mean over pictures."""
    import numpy as np

    found = judge.encode(model, judge.pictures[part]) if features is None else features[part]
    dense = judge.features[part]
    length = np.linalg.norm(found, axis=1) * np.linalg.norm(dense, axis=1)
    return float(1 - ((found * dense).sum(axis=1) / np.maximum(length, 1e-12)).mean())


def _row(judge: calibrate.Judge, cost: Costs, model: Model, half: np.ndarray, by: str) -> dict[str, Any]:
    """What a schedule costs and does: `moved` on the half that chooses, `agrees` on the other."""
    features = judge.encode(model)
    answers = judge.classify(features)
    keep = [site.reducer["keep"] for site in model.sites()]
    agrees = float((answers == judge.answers)[~half].mean())
    right = float((answers == judge.labels)[~half].mean())
    shown = {"chosen_by": by, "at": list(model.at), "keep": keep, "cost": cost(model)}
    return {
        **shown,
        "moved": _moved(judge, model, half, features),
        "agrees": agrees,
        "accuracy": right,
        "best": False,
    }


def _uniform(make: Any, cost: Costs, budget: float, depth: int) -> Model:
    """The model of one keep rate, over the method's own sites, that costs the budget; by bisection."""
    low, high = 0.05, 0.99
    for _ in range(6):
        rate = (low + high) / 2
        try:
            dear = cost(make(rate)) > budget
        except ValueError:  # leaves no token
            dear = False
        low, high = (low, rate) if dear else (rate, high)
    return make(low)


def report(found: dict[str, Any]) -> str:
    """The frontier and the call."""
    rows = [["chosen by", "sites", "patches left", "cost", "moved", "agrees", "accuracy"]]
    for row in found["rows"]:
        mark = " (best)" if row["best"] else ""
        numbers = (
            f"{row['cost']:.3f}",
            f"{row['moved']:.4f}",
            f"{100 * row['agrees']:.2f}",
            f"{100 * row['accuracy']:.2f}",
        )
        at, keep = ("-".join(map(str, row[key])) for key in ("at", "keep"))
        rows.append([row["chosen_by"] + mark, at, keep, *numbers])
    gain = 100 * found["gain"]
    words = f"{gain:.2f} points better than" if gain > 0 else f"no better ({gain:.2f} points) than"
    return (
        f"{found['model']}, at {found['budget']:g} of the dense cost; moved: 1 - cosine to the dense answers on the "
        f"half that chose; agrees, accuracy: on the other half\n\n{cli.table(rows)}\n\n"
        f"The search agrees with the dense model {words} the uniform schedule.\n{found['call']}"
    )


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
