"""What an evaluation leaves for people: predictions, accuracy by class, the confusion matrix.

    predictions.csv   a line per image
    classes.csv       a line per class
    confusion.png     who is taken for whom, and accuracy against confidence

A further evaluation set has its label in front: `real_predictions.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from dyntoken import paths
from dyntoken.analysis import confusion, figures
from dyntoken.eval.answers import Answers, classes_csv, predictions_csv
from dyntoken.train.build import Run


def write(out: Any, run: Run, found: Mapping[str, Answers], log: Callable[[str], None]) -> None:
    """Writes the files of every set into a folder, made if absent; what cannot be written is said.

    Process 0 alone writes. Without matplotlib there is no picture.
    """
    if jax.process_index() != 0:
        return
    folder = paths.resolve(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for label, answers in found.items():
            prefix = f"{label}_" if label else ""
            info = run.eval_sets[label].info
            names, classes = info.class_names, info.num_classes
            paths.atomic_write(folder / f"{prefix}predictions.csv", predictions_csv(answers, names))
            paths.atomic_write(folder / f"{prefix}classes.csv", classes_csv(answers, names, classes))
            title = (
                f"{run.settings.model['name']}, {info.name}: {100 * answers.right[:, -1].mean():.2f} % right"
            )
            title += f", calibration error {100 * answers.calibration()['ece']:.2f} %"
            sure, right = answers.confidence[:, -1], answers.right[:, -1]
            try:
                picture = confusion.picture(answers.confusion(classes), names, sure, right, title=title)
            except ModuleNotFoundError as error:
                log(f"no {prefix}confusion.png: {error}")
                continue
            figures.save(picture, folder / f"{prefix}confusion.png")
    except OSError as error:
        log(f"predictions are not written: {error}")
        return
    log(f"predictions, accuracy by class and the confusion matrix: {folder}")
