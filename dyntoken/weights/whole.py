"""Weights for a result: what would be freshly initialised is refused, since its figures mean nothing."""

from __future__ import annotations

import logging
from typing import Any

from dyntoken.models import Model
from dyntoken.weights.errors import WeightsError
from dyntoken.weights.load import Report, load_weights

_log = logging.getLogger("dyntoken.weights")


def load_whole(model: Model, source: Any, **options: Any) -> tuple[Any, Report]:
    """As `load_weights`, variables and report, of a source that holds every array of the model.

    Raises:
      WeightsError: for one that does not.
    """
    variables, report = load_weights(model, source, return_report=True, **options)
    if report.missing:
        more = ", ..." if len(report.missing) > 3 else ""
        raise WeightsError(
            f"{report.origin}: holds no values for {len(report.missing)} of the model's arrays "
            f"({', '.join(report.missing[:3])}{more}), and freshly initialised ones tell nothing: "
            "train first and name the workdir, or give weights of this very model"
        )
    if report.unexpected or report.resized:
        _log.warning("%s", report)
    return variables, report
