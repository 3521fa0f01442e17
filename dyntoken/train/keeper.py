"""Which checkpoints outlive the newest: the best, and what a rewind goes back to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dyntoken.train import hosts
from dyntoken.train.build import Run
from dyntoken.train.logging import finite
from dyntoken.weights import workdirs


class Keeper:
    """Decides by the run's own record of evaluations, the same on every process.

    Each checkpoint carries the scores so far, with its checksum: a record that
    is lost or damaged does not cost the best one.

    Orbax's `BestN` is not used: it ranks by a metrics file of each checkpoint
    that has no checksum (one flipped bit there and no checkpoint is found any
    more), and the last evaluation comes after the last checkpoint.
    """

    def __init__(self, run: Run):
        settings = run.settings
        self._metric, self._best, self._rewind = settings.best_metric, settings.keep_best, settings.rewind
        self._periods = [settings.checkpoint_steps] + [run.eval_every] * (self._best > 0)
        self._scores: dict[int, float] = {}

    def planned(self, step: int) -> bool:
        """Whether a run saves at a step even if nobody stops it.

        A rewind goes back to such a step only: what a signal saved is there in
        the one run and not in the other.
        """
        return any(period > 0 and step % period == 0 for period in self._periods)

    def read(self, rows: Iterable[Mapping[str, Any]], kept: Mapping[str, Any] | None = None) -> None:
        """Takes over what process 0 finds in the record of the run, and `meta` of the checkpoint it goes on from."""
        found = workdirs.kept_scores({"scores": kept or {}}, self._metric) | workdirs.scores(
            rows, self._metric
        )
        agreed = json.loads(hosts.of_first(json.dumps({str(step): score for step, score in found.items()})))
        self._scores = {int(step): score for step, score in agreed.items()}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if not self._scores:
            return {}
        values = {str(step): finite(score) for step, score in self._scores.items()}
        return {"scores": {"metric": self._metric, "values": values}}

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes an evaluation."""
        score = workdirs.score(self._metric, metrics)
        if score is not None:
            self._scores[step] = score

    def choose(self, steps: Iterable[int]) -> set[int]:
        """Those of some checkpoints that must stay, however many are newer."""
        steps = list(steps)
        ranked = workdirs.by_rank({step: self._scores[step] for step in steps if step in self._scores})
        kept = set(ranked[: self._best])
        targets = [step for step in steps if self.planned(step)]
        if self._rewind and targets:
            kept.add(max(targets))
        return kept
