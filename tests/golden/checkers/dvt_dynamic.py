"""The released threshold search and early-exit evaluation: kind `dvt_dynamic`."""

from __future__ import annotations

import numpy as np

from dyntoken.eval import exits, solvers
from tests.golden.case import Case
from tests.golden.ledger import Ledger

SINGLE = 1e-6  # the reference computes shares, percentages and costs in float32


def check(case: Case, ledger: Ledger) -> None:
    """Every group: the plain run, ties, and few images; the confidence where logits are recorded."""
    for group in case.info["groups"]:
        _check_group(ledger, group)
    for part in ("calib", "val"):
        if ledger.holds(f"{part}_logits"):
            ours = exits.score("confidence", ledger.expected(f"{part}_logits"))
            ledger.close(f"{part} confidence", ours, SINGLE, ledger.expected(f"{part}_probs").max(-1))


def _check_group(ledger: Ledger, group: str) -> None:
    steps, costs = ledger.expected(group + "p"), ledger.expected("flops")
    calibration = _part(ledger, group + "calib")
    held_out = _part(ledger, group + "val")
    shares = [solvers.geometric_shares(step, len(costs)) for step in steps]
    found = solvers.geometric_sweep(calibration[1], steps)
    ledger.close(group + "exit_probs", np.stack(shares), SINGLE)
    ledger.equal(group + "thresholds", found)
    seen, curve = ([exits.evaluate(*half, row, costs) for row in found] for half in (calibration, held_out))
    alone = exits.anytime(held_out[0], costs)
    ledger.equal(group + "train_exit_counts", np.stack([point.counts for point in seen]))
    ledger.equal(group + "exit_counts", np.stack([point.counts for point in curve]))
    ledger.close(group + "accuracy", 100 * np.array([point.accuracy for point in curve]), SINGLE)
    ledger.close(group + "expected_flops", np.array([point.cost for point in curve]), SINGLE)
    ledger.close(group + "anytime_accuracy", 100 * np.array([point.accuracy for point in alone]), SINGLE)


def _part(ledger: Ledger, name: str) -> tuple[np.ndarray, np.ndarray]:
    # The recorded probabilities, not our softmax: the thresholds are among them, bit by bit.
    probs = ledger.expected(name + "_probs")
    return exits.correct_of(probs, ledger.expected(name + "_labels")), probs.max(axis=-1)
