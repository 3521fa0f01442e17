"""Contact sheets of images by exit: `python -m dyntoken.tools.show --exits ...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import data, paths
from dyntoken.analysis import plot, sheet
from dyntoken.eval import collect, exits
from dyntoken.mix import normalize
from dyntoken.tools import cli
from dyntoken.tools.budget import UNITS
from dyntoken.train import sharding as meshes
from dyntoken.train.evaluate import open_workdir
from dyntoken.weights.whole import load_whole

TEXT = """\
Sheets of images by the exit they take, and by the first exit that is right:
which images of each class are easy, and which are hard.

Of a trained run: --exits --workdir=DIR [SPLIT]; its thresholds are those that
tools.budget found, at the budget nearest to --budget. Of any weights:
--exits NAME --weights=FILE --thresholds=0.9,0.8 DATA[:SPLIT].

Writes exits_taken.png and first_right.png, and with the thresholds of
tools.budget shares.png: the share of the images that leave at each exit,
against the budget."""
EXAMPLES = """\
  python -m dyntoken.tools.show --exits --workdir=runs/dvt_demo
  python -m dyntoken.tools.show --exits --workdir=runs/dvt_demo --thresholds=0.9,0.8 'test[:500]'
  python -m dyntoken.tools.show --exits dvt_deit_small --weights=dvt.npz --thresholds=0.9,0.8 imagenet2012:validation"""
CLASSES = 12  # of more classes, columns are just examples
COLUMNS = 10
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Seen:
    """A split, and what every exit says about its images.

    Attributes:
      title: model and split.
      labels: `[N]`.
      logits: `[E, N, K]`.
      names: of the classes.
      batches: reads the split once more, in the same order.
    """

    title: str
    labels: np.ndarray
    logits: np.ndarray
    names: tuple[str, ...]
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.names[label] if label < len(self.names) else f"class {label}"

    def images(self, wanted: Iterable[int]) -> dict[int, np.ndarray]:
        """The images of these numbers, uint8 `[H, W, C]`; the split need not fit into memory."""
        wanted, found, start = set(wanted), {}, 0
        for batch in self.batches():
            rows = np.flatnonzero(batch["mask"] > 0)
            found.update({start + n: batch["image"][r] for n, r in enumerate(rows) if start + n in wanted})
            start += len(rows)
            if len(found) == len(wanted):
                break
        return found


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `tools.budget` stored: a rule, and thresholds `[M, E]` of budgets `[M]` in `unit`."""

    rule: str
    seed: int
    unit: str
    budgets: np.ndarray
    thresholds: np.ndarray


def main(argv: Sequence[str]) -> int:
    """Writes the sheets; returns the exit status."""
    args = _parser().parse_intermixed_args(argv)  # NAME --weights=FILE DATA
    found = _calibration(args)
    seen = _of_run(args) if args.workdir else _of_weights(args)
    count = len(seen.logits)
    limits, how = _thresholds(args, found, count)
    rule, seed = (args.rule or "confidence", 0) if found is None else (found.rule, found.seed)
    scores = exits.score(rule, seen.logits, seed=seed)
    correct = exits.correct_of(seen.logits, seen.labels)
    taken = exits.exit_of(scores, limits)
    out = args.out or (paths.resolve(args.workdir) / "shown" if args.workdir else Path("shown"))
    pictures = {
        "exits_taken": taken_sheet(seen, taken, scores, correct, f"{how}, {rule} rule", args.examples),
        "first_right": first_right_sheet(seen, scores, correct, args.examples),
    }
    if found is not None:
        order = np.argsort(found.budgets, kind="stable")
        parts = np.array([_shares(exits.exit_of(scores, found.thresholds[i]), count) for i in order])
        pictures["shares"] = plot.shares(
            found.budgets[order],
            parts,
            xlabel=f"average budget of an image ({UNITS[found.unit]})",
            title=f"{seen.title}: where images leave ({rule} rule)",
        )
    for name, figure in pictures.items():
        plot.save(figure, epath.Path(out) / f"{name}.png")
        print(epath.Path(out) / f"{name}.png")
    right = np.take_along_axis(correct, taken[None], axis=0)[0]
    for exit_, share in enumerate(_shares(taken, count)):
        top1 = f", {100 * right[taken == exit_].mean():.1f} % of them right" if share else ""
        print(f"exit {exit_}: {100 * share:.1f} % of {len(taken)} images{top1}")
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser("show", TEXT, EXAMPLES)
    parser.add_argument("--exits", action="store_true", required=True, help="these sheets")
    parser.add_argument("words", metavar="NAME, DATA[:SPLIT], SPLIT", nargs="*", help="see above")
    parser.add_argument("--workdir", help="of a trained run")
    parser.add_argument("--ema", action="store_true", help="take the run's weight average")
    parser.add_argument("--weights", help=".safetensors, .npz, .pth, pretrained:NAME, or hf:org/name")
    parser.add_argument(
        "--thresholds",
        type=cli.floats,
        help="one per exit; the last may be left out (0.9,0.8): it takes the rest",
    )
    parser.add_argument("--rule", help=f"exit rule of --thresholds: {', '.join(exits.RULES)}")
    parser.add_argument("--budget", type=float, help="which of tools.budget's (default: the middle one)")
    parser.add_argument("--examples", type=cli.positive, default=2, help="rows per exit (default: 2)")
    parser.add_argument("--out", type=Path, help="folder (default: shown, or WORKDIR/shown)")
    cli.add_model_options(parser)
    return parser


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """Of the workdir; None where the thresholds are given."""
    if args.thresholds is not None:
        if args.budget is not None:
            raise ValueError("--thresholds and --budget both say where to leave: give one of them")
        return None
    if args.rule is not None:
        raise ValueError("--rule belongs to --thresholds; tools.budget's thresholds have their own")
    path = paths.resolve(args.workdir or ".") / "budget" / "calibration.json"
    if not args.workdir or not path.exists():
        remedy = (
            f"run python -m dyntoken.tools.budget --workdir={args.workdir} first, or " if args.workdir else ""
        )
        raise ValueError(f"no thresholds: {remedy}give --thresholds=0.9,0.8 (one per exit)")
    held = json.loads(path.read_text())
    numbers = (np.array(held[key], np.float64) for key in ("budgets", "thresholds"))
    return Calibration(held["rule"], held["seed"], held["unit"], *numbers)


def _thresholds(args: argparse.Namespace, found: Calibration | None, count: int) -> tuple[np.ndarray, str]:
    """Thresholds `[E]` and where they come from, in words."""
    if found is None:
        limits = (*args.thresholds, exits.ALWAYS) if len(args.thresholds) == count - 1 else args.thresholds
        return np.array(limits), "thresholds " + ", ".join(f"{value:g}" for value in limits[: count - 1])
    order = np.argsort(found.budgets)
    middle = order[len(order) // 2]
    index = middle if args.budget is None else int(np.argmin(np.abs(found.budgets - args.budget)))
    return found.thresholds[index], f"budget {found.budgets[index]:.3g} {UNITS[found.unit]}"


def _of_run(args: argparse.Namespace) -> Seen:
    if args.weights or len(args.words) > 1 or cli.overrides(args):
        raise ValueError("--workdir knows its model, weights and data: add a split at most")
    opened = open_workdir(args.workdir, split=args.words[0] if args.words else None, ema=args.ema, log=print)
    plan = opened.run
    title = f"{plan.settings.model['name']}, {plan.settings.data.name}/{plan.settings.data.eval_split}"
    step = collect.make_step(plan.model, plan.mesh, prepare=plan.prepare)
    logits, labels = collect.collect(step, opened.variables, opened.batches())
    return Seen(title, labels, logits, plan.info.class_names, plan.eval_batches)


def _of_weights(args: argparse.Namespace) -> Seen:
    if len(args.words) != 2 or not args.weights:
        raise ValueError("give --workdir=DIR, or NAME --weights=FILE DATA[:SPLIT]")
    args.name, text = args.words
    model = cli.build(args)
    name, _, split = text.partition(":")
    facts = data.info(name)
    height, width, channels = model.input_shape
    if facts.channels != channels:
        raise ValueError(f"{name} has {facts.channels} channels, the model takes {channels}")
    split = split or ("test" if "test" in facts.splits else "validation")
    mesh = meshes.data_mesh(jax.devices()[:1])

    def batches():
        return data.eval_batches(name, split=split, batch=BATCH, shards=1, size=(height, width))

    step = collect.make_step(model, mesh, prepare=lambda images: normalize(images, facts.mean, facts.std))
    variables, _ = load_whole(model, args.weights)
    logits, labels = collect.collect(step, variables, (meshes.place(batch, mesh) for batch in batches()))
    return Seen(f"{args.name}, {name}/{split}", labels, logits, facts.class_names, batches)


def _shares(taken: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(taken, minlength=count) / len(taken)


def taken_sheet(
    seen: Seen, taken: np.ndarray, scores: np.ndarray, correct: np.ndarray, how: str, examples: int
) -> Any:
    """Images by the exit they take: of the first exit the surest, of the others the least sure before it.

    Args:
      seen: the split.
      taken: exit of each image, `[N]`.
      scores, correct: `[E, N]`.
      how: what the exits follow from, in words.
      examples: lines per exit.
    """
    groups = []
    for exit_ in range(len(scores)):
        here = np.flatnonzero(taken == exit_)
        order = here[np.argsort(-scores[0, here] if exit_ == 0 else scores[exit_ - 1, here], kind="stable")]
        share = 100 * len(here) / len(taken)
        top1 = f"\n{100 * correct[exit_, here].mean():.1f} % right" if len(here) else ""
        groups.append(
            (f"leave at exit {exit_}\n{share:.1f} % of images{top1}", order, np.full(len(here), exit_))
        )
    note = "Green: right, with its score at that exit. Red: wrong, with what that exit says."
    return _draw(seen, groups, scores, correct, f"{seen.title}: images by exit ({how})", note, examples)


def first_right_sheet(seen: Seen, scores: np.ndarray, correct: np.ndarray, examples: int) -> Any:
    """Images by the first exit that is right, whatever the thresholds: the surest there; last, those never right."""
    count = len(scores)
    first = np.where(correct.any(axis=0), correct.argmax(axis=0), count)
    groups = []
    for exit_ in range(count + 1):
        here = np.flatnonzero(first == exit_)
        order = here[np.argsort(-scores[min(exit_, count - 1), here], kind="stable")]
        what = f"first right at exit {exit_}" if exit_ < count else "never right"
        said = np.full(len(here), 0 if exit_ < count else count - 1)
        groups.append((f"{what}\n{100 * len(here) / len(first):.1f} % of images", order, said))
    note = "Green: right at exit 1, with its score. Red: what exit 1 says; if never right, what the last exit says."
    return _draw(
        seen, groups, scores, correct, f"{seen.title}: easy images above, hard ones below", note, examples
    )


def _draw(
    seen: Seen,
    groups: Sequence[tuple[str, np.ndarray, np.ndarray]],
    scores: np.ndarray,
    correct: np.ndarray,
    title: str,
    note: str,
    examples: int,
) -> Any:
    """The figure of (label, images in order of interest, exit whose word is told) groups."""
    by_class = len(seen.names) and len(seen.names) <= CLASSES
    columns = len(seen.names) if by_class else COLUMNS
    chosen = []
    for _, order, _ in groups:
        lines = np.full((examples, columns), -1)
        if by_class:
            for label in range(columns):
                mine = order[seen.labels[order] == label][:examples]
                lines[: len(mine), label] = mine
        else:
            lines.flat[: len(order)] = order[: lines.size]
        chosen.append(lines[: max(1, int((lines >= 0).any(axis=1).sum()))])
    images = seen.images(int(i) for lines in chosen for i in lines.ravel() if i >= 0)
    drawn = []
    for (label, _, said), lines in zip(groups, chosen, strict=True):
        exit_ = int(said[0]) if len(said) else 0
        drawn.append(
            sheet.Group(
                label,
                [
                    [_cell(seen, images, int(i), exit_, scores, correct, bool(by_class)) for i in line]
                    for line in lines
                ],
            )
        )
    return sheet.sheet(drawn, columns=seen.names if by_class else (), title=title, note=note)


def _cell(
    seen: Seen,
    images: Mapping[int, np.ndarray],
    image: int,
    exit_: int,
    scores: np.ndarray,
    correct: np.ndarray,
    by_class: bool,
) -> sheet.Cell | None:
    if image < 0:
        return None
    right = bool(correct[exit_, image])
    said = seen.name(int(seen.logits[exit_, image].argmax()))
    caption = said if not right or not by_class else f"{scores[exit_, image]:.3f}"
    return sheet.Cell(images[image], caption, right)
