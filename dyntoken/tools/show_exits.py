"""Contact sheets of images by exit.

Sheets of images by the exit they take, and by the first exit that is right:
which images of each class are easy, and which are hard.

Of a trained run: --workdir=DIR [SPLIT]; its thresholds are those that
tools.thresholds found, at the budget nearest to --budget. Of any weights:
NAME --weights=FILE --thresholds=0.9,0.8 DATA[:SPLIT].

Writes exits_taken.png and first_right.png, and with the thresholds of
tools.thresholds shares.png: the share of the images that leave at each exit,
against the budget.

examples:
  python -m dyntoken.tools.show_exits --workdir=runs/dvt_demo
  python -m dyntoken.tools.show_exits --workdir=runs/dvt_demo --thresholds=0.9,0.8 'test[:500]'
  python -m dyntoken.tools.show_exits dvt_deit_small --weights=dvt.npz --thresholds=0.9,0.8 imagenet2012:validation
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import data, paths
from dyntoken.analysis import contact_sheet, exit_plots, figures
from dyntoken.device_augment import normalize
from dyntoken.eval import exits
from dyntoken.eval.logits import collect, make_logits_step
from dyntoken.preprocessing import preprocess
from dyntoken.tools import cli
from dyntoken.tools.thresholds import UNITS, read
from dyntoken.train import sharding as meshes
from dyntoken.weights import load_whole, prepared

CLASSES = 12  # of more classes, columns are just examples
COLUMNS = 10
BATCH = 64


def arguments(parser: cli.Parser) -> None:
    """The options."""
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
    parser.add_argument("--budget", type=float, help="which of tools.thresholds' (default: the middle one)")
    parser.add_argument("--examples", type=cli.positive, default=2, help="rows per exit (default: 2)")
    parser.add_argument("--out", type=Path, help="folder (default: shown, or WORKDIR/shown)")
    cli.add_model_options(parser)


@dataclasses.dataclass(frozen=True)
class Split:
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the sheets; returns where they are, and how many images leave at each exit and are right."""
    stored = _stored(args)
    split = _of_run(args) if args.workdir else _of_weights(args)
    count = len(split.logits)
    limits, how = choose(args, stored, count)
    rule, seed = (stored["rule"], stored["seed"]) if stored else (args.rule or "confidence", 0)
    scores = exits.score(rule, split.logits, seed=seed)
    correct = exits.correct_of(split.logits, split.labels)
    taken = exits.exit_of(scores, limits)
    pictures = {
        "exits_taken": taken_sheet(split, taken, scores, correct, f"{how}, {rule} rule", args.examples),
        "first_right": first_right_sheet(split, scores, correct, args.examples),
    }
    if stored:
        order = np.argsort(stored["budgets"], kind="stable")
        leave = [exits.exit_of(scores, stored["thresholds"][index]) for index in order]
        pictures["shares"] = exit_plots.shares(
            np.array(stored["budgets"])[order],
            np.array([np.bincount(row, minlength=count) / len(row) for row in leave]),
            xlabel=f"average budget of an image ({UNITS[stored['unit']]})",
            title=f"{split.title}: where images leave ({rule} rule)",
        )
    out = epath.Path(args.out or (paths.resolve(args.workdir) / "shown" if args.workdir else "shown"))
    for name, figure in pictures.items():
        figures.save(figure, out / f"{name}.png")
    right = np.take_along_axis(correct, taken[None], axis=0)[0]
    return {
        "pictures": [str(out / f"{name}.png") for name in pictures],
        "images": len(taken),
        "leave": np.bincount(taken, minlength=count).tolist(),
        "right": np.bincount(taken[right], minlength=count).tolist(),
    }


def report(result: dict[str, Any]) -> str:
    """Where the sheets are, and a line for each exit."""
    lines, images = list(result["pictures"]), result["images"]
    for exit_, (leave, right) in enumerate(zip(result["leave"], result["right"], strict=True)):
        top1 = f", {100 * right / leave:.1f} % of them right" if leave else ""
        lines.append(f"exit {exit_}: {100 * leave / images:.1f} % of {images} images{top1}")
    return "\n".join(lines)


def _stored(args: argparse.Namespace) -> dict[str, Any] | None:
    """What tools.thresholds found for the workdir; None where the thresholds are given."""
    if args.thresholds is not None:
        if args.budget is not None:
            raise ValueError("--thresholds and --budget both say where to leave: give one of them")
        return None
    if args.rule is not None:
        raise ValueError("--rule belongs to --thresholds; tools.thresholds' thresholds have their own")
    path = paths.resolve(args.workdir or ".") / "budget" / "calibration.json"
    if not args.workdir or not path.exists():
        command = f"python -m dyntoken.tools.thresholds --workdir={args.workdir}"
        remedy = f"run {command} first, or " if args.workdir else ""
        raise ValueError(f"no thresholds: {remedy}give --thresholds=0.9,0.8 (one per exit)")
    return json.loads(path.read_text())


def choose(args: argparse.Namespace, stored: dict[str, Any] | None, count: int) -> tuple[np.ndarray, str]:
    """Thresholds `[E]` and where they come from, in words."""
    if stored is None:
        limits = (*args.thresholds, exits.ALWAYS) if len(args.thresholds) == count - 1 else args.thresholds
        return np.array(limits), "thresholds " + ", ".join(f"{value:g}" for value in limits[: count - 1])
    budgets = np.array(stored["budgets"])
    order = np.argsort(budgets)
    near = order[len(order) // 2] if args.budget is None else np.argmin(np.abs(budgets - args.budget))
    return np.array(stored["thresholds"][near]), f"budget {budgets[near]:.3g} {UNITS[stored['unit']]}"


def _of_run(args: argparse.Namespace) -> Split:
    if args.weights or len(args.words) > 1 or cli.overrides(args):
        raise ValueError("--workdir knows its model, weights and data: add a split at most")
    opened, logits, labels = read(args.workdir, args.words[0] if args.words else None, args.ema)
    plan = opened.run
    title = f"{plan.settings.model['name']}, {plan.settings.data.name}/{plan.settings.data.eval_split}"
    return Split(title, labels, logits, plan.info.class_names, plan.eval_batches)


def _of_weights(args: argparse.Namespace) -> Split:
    if len(args.words) != 2 or not args.weights:
        raise ValueError("give --workdir=DIR, or NAME --weights=FILE DATA[:SPLIT]")
    args.name, text = args.words
    model = prepared(cli.build(args), args.weights)
    name, _, split = text.partition(":")
    facts = data.info(name)
    height, width, channels = model.input_shape
    if facts.channels != channels:
        raise ValueError(f"{name} has {facts.channels} channels, the model takes {channels}")
    split = split or ("test" if "test" in facts.splits else "validation")
    mesh = meshes.data_mesh(jax.devices()[:1])

    how = preprocess(model, None if model.prepared else name)
    reading = {"crop_pct": how.crop_pct, "interpolation": how.interpolation}

    def batches():
        return data.eval_batches(name, split=split, batch=BATCH, shards=1, size=(height, width), **reading)

    step = make_logits_step(model, mesh, prepare=lambda images: normalize(images, how.mean, how.std))
    variables, _ = load_whole(model, args.weights)
    logits, labels = collect(step, variables, (meshes.place(batch, mesh) for batch in batches()))
    return Split(f"{args.name}, {name}/{split}", labels, logits, facts.class_names, batches)


def taken_sheet(
    split: Split, taken: np.ndarray, scores: np.ndarray, correct: np.ndarray, how: str, examples: int
) -> Any:
    """Images by the exit they take: of the first exit the surest, of the others the least sure before it.

    Args:
      taken: exit of each image, `[N]`.
      scores, correct: `[E, N]`.
      how: what the exits follow from, in words.
      examples: lines per exit.
    """
    groups = []
    for exit_ in range(len(scores)):
        here = np.flatnonzero(taken == exit_)
        order = here[np.argsort(-scores[0, here] if exit_ == 0 else scores[exit_ - 1, here], kind="stable")]
        top1 = f"\n{100 * correct[exit_, here].mean():.1f} % right" if len(here) else ""
        label = f"leave at exit {exit_}\n{100 * len(here) / len(taken):.1f} % of images{top1}"
        groups.append((label, order, exit_))
    note = "Green: right, with its score at that exit. Red: wrong, with what that exit says."
    title = f"{split.title}: images by exit ({how})"
    return _draw(split, groups, scores, correct, examples, title=title, note=note)


def first_right_sheet(split: Split, scores: np.ndarray, correct: np.ndarray, examples: int) -> Any:
    """Images by the first exit that is right, whatever the thresholds: the surest there; last, those never right."""
    count = len(scores)
    first = np.where(correct.any(axis=0), correct.argmax(axis=0), count)
    groups = []
    for exit_ in range(count + 1):
        here = np.flatnonzero(first == exit_)
        order = here[np.argsort(-scores[min(exit_, count - 1), here], kind="stable")]
        what = f"first right at exit {exit_}" if exit_ < count else "never right"
        label = f"{what}\n{100 * len(here) / len(first):.1f} % of images"
        groups.append((label, order, 0 if exit_ < count else count - 1))
    note = "Green: right at exit 1, with its score. Red: what exit 1 says; if never right, what the last exit says."
    title = f"{split.title}: easy images above, hard ones below"
    return _draw(split, groups, scores, correct, examples, title=title, note=note)


def _draw(
    split: Split,
    groups: list[tuple[str, np.ndarray, int]],
    scores: np.ndarray,
    correct: np.ndarray,
    examples: int,
    **text: str,
) -> Any:
    """The figure of (label, images, the best example first, exit whose answer is the caption) groups."""
    by_class = 0 < len(split.names) <= CLASSES
    columns = len(split.names) if by_class else COLUMNS
    chosen = []  # per group, image numbers [lines, columns]; -1 leaves a place empty
    for _, order, _ in groups:
        lines = np.full((examples, columns), -1)
        if by_class:
            for label in range(columns):
                mine = order[split.labels[order] == label][:examples]
                lines[: len(mine), label] = mine
        else:
            lines.flat[: len(order)] = order[: lines.size]
        chosen.append(lines[: max(1, int((lines >= 0).any(axis=1).sum()))])
    images = split.images(int(i) for lines in chosen for i in lines.ravel() if i >= 0)

    def cell(image: int, exit_: int) -> contact_sheet.Cell | None:
        if image < 0:
            return None
        answer, right = int(split.logits[exit_, image].argmax()), bool(correct[exit_, image])
        named = split.names[answer] if answer < len(split.names) else f"class {answer}"
        caption = f"{scores[exit_, image]:.3f}" if right and by_class else named
        return contact_sheet.Cell(images[image], caption, right)

    drawn = [
        contact_sheet.Group(label, [[cell(int(image), exit_) for image in line] for line in lines])
        for (label, _, exit_), lines in zip(groups, chosen, strict=True)
    ]
    return contact_sheet.sheet(drawn, columns=split.names if by_class else (), **text)


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
