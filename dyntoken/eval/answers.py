"""What a model answers to each image of a split: its surest classes, the exit, and how far its confidence is right."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.eval.logits import Batch, Step, means, on_host, one_behind, right

TOP = 5
BINS = 15  # of the calibration error, as Guo et al., ICML 2017, have them


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of N images, in the order of the evaluation.

    Attributes:
      name: `[N]` of text, the file or record, or the number where an image has no other name.
      label: int `[N]`.
      top: int `[N, 5]` (fewer where there are fewer classes), the surest classes first.
      prob: `[N, 5]`, their probabilities.
      confidence: `[N, E]`, the largest probability at each exit; one exit without exits.
      right: bool `[N, E]`, whether that class is right.
      exit: int `[N]`, the first exit whose class is the last one's.
    """

    name: np.ndarray
    label: np.ndarray
    top: np.ndarray
    prob: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    exit: np.ndarray

    @property
    def exits(self) -> int:
        """How many exits the model has, 1 without."""
        return self.confidence.shape[1]

    def calibration(self) -> dict[str, Any]:
        """`ece`, of a model with exits that of the last, and then `ece_per_exit`."""
        errors = [calibration_error(*pair) for pair in zip(self.confidence.T, self.right.T, strict=True)]
        return {"ece": errors[-1]} | ({"ece_per_exit": errors} if len(errors) > 1 else {})

    def confusion(self, classes: int) -> np.ndarray:
        """`[classes, classes]` counts: rows are labels, columns answers."""
        found = np.zeros((classes, classes), np.int64)
        np.add.at(found, (self.label, self.top[:, 0]), 1)
        return found


def rows(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """What is kept of the logits `[b, K]` or `[E, b, K]` of a batch; `b` leads in all of it."""
    every = logits if logits.ndim == 3 else logits[None]
    probs = jax.nn.softmax(every.astype(jnp.float32))
    guess = jnp.argmax(every, -1)  # [E, b]
    prob, top = jax.lax.top_k(probs[-1], min(TOP, probs.shape[-1]))
    same = (guess == guess[-1:]).astype(jnp.int32)
    return {
        "label": batch["label"],
        "mask": batch["mask"],
        "top": top,
        "prob": prob,
        "confidence": probs.max(-1).T,
        "right": right(batch, guess).T,
        "exit": jnp.argmax(same, 0),
    }


def collect(step: Step, variables: Any, batches: Iterable[Batch], names: Sequence[np.ndarray]) -> Any:
    """Runs a compiled evaluation step that returns rows over device batches, as many on every process.

    Args:
      names: bytes `[b]` of each batch, filled while the batches are taken; empty where they have none.

    Returns:
      The metrics as `classify` has them, with `ece`, and the `Answers`, in every process.

    Raises:
      ValueError: if there is no example.
    """
    found: list[dict[str, np.ndarray]] = []

    def sums() -> Any:
        for totals, of_images in one_behind(step(variables, batch) for batch in batches):
            found.append({name: on_host(value) for name, value in of_images.items()})
            yield totals

    metrics = means(sums())
    whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    real = whole.pop("mask") > 0
    total = len(real)
    known = np.concatenate(names) if names else np.arange(total).astype(np.bytes_)
    if len(known) != total:  # several processes: each knows the names of its own rows alone
        known = np.arange(total).astype(np.bytes_)
    text = np.array([name.decode(errors="replace") for name in known.tolist()], object)
    answers = Answers(name=text[real], **{name: value[real] for name, value in whole.items()})
    return metrics | answers.calibration(), answers


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal width, by their counts.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2. A bin holds its upper edge.

    Args:
      confidence: `[N]` in [0, 1]; right: bool `[N]`.
    """
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, confidence.astype(np.float64) - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def predictions_csv(answers: Answers, names: Sequence[str]) -> str:
    """A line per image: file, label, class and probability of the surest, the exit and each exit's confidence."""
    exits = range(answers.exits) if answers.exits > 1 else ()
    places = range(1, answers.top.shape[1] + 1)
    header = ["file", "label", "right"]
    header += [f"{what}_{place}" for place in places for what in ("class", "probability")]
    header += ["exit"] * bool(exits) + [f"confidence_exit_{number}" for number in exits]
    spelt = spell(names)
    lines = [header]
    for n in range(len(answers.label)):
        best = zip(answers.top[n].tolist(), answers.prob[n].tolist(), strict=True)
        line = [answers.name[n], spelt(answers.label[n]), int(answers.right[n, -1])]
        line += [word for number, prob in best for word in (spelt(number), f"{prob:.4f}")]
        if exits:
            line += [answers.exit[n], *(f"{value:.4f}" for value in answers.confidence[n].tolist())]
        lines.append(line)
    return _csv(lines)


def classes_csv(answers: Answers, names: Sequence[str], classes: int) -> str:
    """A line per class that the split has: images, accuracy, and what it is taken for most often otherwise."""
    confusion, spelt = answers.confusion(classes), spell(names)
    lines: list[list[Any]] = [["class", "images", "accuracy", "mean_confidence", "taken_for", "times"]]
    for number in range(classes):
        mine = answers.label == number
        if not mine.any():
            continue
        wrong = np.where(np.arange(classes) == number, 0, confusion[number])
        times = int(wrong.max())
        other = [spelt(int(wrong.argmax())), times] if times else ["", 0]
        share, sure = answers.right[mine, -1].mean(), answers.confidence[mine, -1].mean()
        lines.append([spelt(number), int(mine.sum()), f"{share:.4f}", f"{sure:.4f}", *other])
    return _csv(lines)


def spell(names: Sequence[str]) -> Any:
    """From a class's number to its name, the number itself where there is none."""
    return lambda number: names[number] if number < len(names) else str(number)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
