"""Losses of models with exits: logits [E, B, K]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken import losses
from dyntoken.registry import UnknownNameError
from dyntoken.types import Output
from tests.made_outputs import LN3, NAN, one, rows, site

EXITS = np.array(
    [[[0.0, LN3], [LN3, 0.0]], [[LN3, 0.0], [LN3, 0.0]], [[0.0, 0.0], [2 * LN3, 0.0]]], np.float32
)
PAIRS = {"target": jnp.array([[1.0, 0.0], [0.5, 0.5]])}


def per_exit(name, output, batch, **options):
    """Sums by exit, count, and the loss as the total has it."""
    specs = {name: options}
    pairs = losses.Objective(specs).evaluate(output, batch)
    total, count = pairs[name]
    return np.asarray(total), float(count), float(losses.Objective(specs).total(pairs))


def test_ce_of_exits_is_one_sum_each_and_their_weighted_total():
    output = Output(logits=jnp.asarray(EXITS))
    ln4, ln2, ln43 = np.log(4.0), np.log(2.0), np.log(4 / 3)
    mixed = 0.5 * ln4 + 0.5 * ln43
    expected = [ln4 + mixed, ln43 + mixed, ln2 + 0.5 * np.log(10.0) + 0.5 * np.log(10 / 9)]
    sums, count, total = per_exit("ce", output, PAIRS)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    assert count == 2 and total == pytest.approx(sum(expected) / 2, rel=1e-6)  # CE1 + CE2 + CE3, as DVT
    _, _, total = per_exit("ce", output, PAIRS, weights=(0.5, 0.0, 2.0), weight=3.0)
    assert total == pytest.approx(3 * (0.5 * expected[0] + 2 * expected[2]) / 2, rel=1e-6)
    sums, count, _ = per_exit("ce", output, {**PAIRS, "mask": jnp.array([1.0, 0.0])})
    np.testing.assert_allclose(sums, [ln4, ln43, ln2], rtol=1e-6)
    assert count == 1


def test_weights_of_exits_scale_gradients():
    def total(logits):
        specs = {"ce": {"weights": [1.0, 0.0, 0.5]}}
        return (objective := losses.Objective(specs)).total(objective.evaluate(Output(logits=logits), PAIRS))

    grad = jax.grad(total)(jnp.asarray(EXITS))
    np.testing.assert_allclose(grad[0], [[-0.375, 0.375], [0.125, -0.125]], atol=1e-6)
    assert not np.asarray(grad[1]).any()
    np.testing.assert_allclose(grad[2], [[-0.125, 0.125], [0.1, -0.1]], atol=1e-6)


def test_metrics_of_exits_are_reported_beside_their_total():
    specs = {"ce": {"weights": (1.0, 1.0, 2.0)}, "keep_ratio": {}}
    output = Output(logits=jnp.asarray(EXITS), reductions=(site([[1, 0], [1, 1]]), site([[1, 1], [0, 0]])))
    pairs = losses.Objective(specs).evaluate(output, PAIRS)
    rows = losses.Objective(specs).metrics(pairs)
    assert set(rows) == {"ce", "ce_per_exit", "keep_ratio"}
    sums = pairs["ce"][0]
    np.testing.assert_allclose(rows["ce_per_exit"][0], sums)
    assert float(rows["ce"][0]) == pytest.approx(float(sums[0] + sums[1] + 2 * sums[2]))
    assert float(rows["keep_ratio"][0]) == pytest.approx((0.25 + 0.25 + 0.25) / 2)  # all sites of all exits
    plain = losses.Objective({"ce": {}}).evaluate(Output(logits=jnp.asarray(EXITS[0])), PAIRS)
    assert set(losses.Objective({"ce": {}}).metrics(plain)) == {"ce"}


def test_exit_kl_literal_and_no_gradient_into_the_last_exit():
    logits = jnp.array([[[0.0, 0.0]], [[0.0, LN3]], [[LN3, 0.0]]])  # last: (3/4, 1/4)
    output = Output(logits=logits)
    expected = [0.75 * np.log(1.5) + 0.25 * np.log(0.5), 0.5 * LN3]
    sums, count, total = per_exit("exit_kl", output, {})
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    assert count == 1 and total == pytest.approx(sum(expected), rel=1e-6)
    _, _, total = per_exit("exit_kl", output, {}, weights=(0.0, 2.0))
    assert total == pytest.approx(2 * expected[1], rel=1e-6)
    soft, _, _ = per_exit("exit_kl", Output(logits=2 * logits), {}, temperature=2.0)
    np.testing.assert_allclose(soft, 4 * np.array(expected), rtol=1e-6)

    grad = jax.grad(
        lambda x: losses.Objective({"exit_kl": {}}).evaluate(Output(logits=x), {})["exit_kl"][0].sum()
    )(logits)
    np.testing.assert_allclose(grad[0], [[-0.25, 0.25]], atol=1e-6)
    np.testing.assert_allclose(grad[1], [[-0.5, 0.5]], atol=1e-6)
    assert not np.asarray(grad[2]).any()


def test_exit_kl_ignores_padding():
    logits = jnp.array([[[0.0, 0.0], [NAN, 1.0]], [[LN3, 0.0], [NAN, NAN]]])
    batch = {"mask": jnp.array([1.0, 0.0])}
    value = lambda x: losses.Objective({"exit_kl": {}}).evaluate(Output(logits=x), batch)["exit_kl"][0].sum()  # noqa: E731
    assert float(value(logits)) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)
    assert np.isfinite(jax.grad(value)(logits)).all()


def test_a_dense_teacher_teaches_every_exit():
    batch = {"teacher": Output(logits=jnp.array([[LN3, 0.0], [LN3, 0.0]]))}
    sums, count, total = per_exit("logit_kl", Output(logits=jnp.asarray(EXITS)), batch, weights=(1, 1, 0))
    np.testing.assert_allclose(sums[:2], [0.5 * LN3, 0.0], atol=1e-6)
    assert count == 2 and total == pytest.approx(0.25 * LN3, rel=1e-5)


@pytest.mark.parametrize(
    ("specs", "exits", "message"),
    [
        ({"ce": {"weights": (1, 1)}}, 3, r"loss 'ce' has 2 weights for 3 terms: give one for each exit"),
        (
            {"exit_kl": {"weights": (1, 1, 1)}},
            3,
            r"3 weights for 2 terms: give one for each exit but the last",
        ),
        ({"ce": {"weights": (1,)}}, 0, r"weights is for a model with exits, this one has none"),
        ({"ce": {}, "exit_kl": {}}, 0, r"'exit_kl' needs a model with at least two exits"),
        ({"exit_kl": {}}, 1, r"'exit_kl' needs a model with at least two exits"),
        ({"token_distill": {}}, 2, r"'token_distill' compares the final tokens of one network"),
    ],
)
def test_losses_that_do_not_fit_the_exits(specs, exits, message):
    with pytest.raises(ValueError, match=message) as caught:
        losses.Objective(specs).check(exits)
    assert "\n" not in str(caught.value)
    fits = {"ce": {"weights": (1,) * exits} if exits else {}, "keep_ratio": {}, "logit_kl": {}}
    losses.Objective(fits).check(exits)


def test_wrong_calls_on_exits_are_one_clear_error():
    output = Output(logits=jnp.asarray(EXITS), tokens=(rows(np.zeros((2, 4, 3))),) * 3)
    with pytest.raises(ValueError, match=r"'ce' has 2 weights for 3 terms"):
        per_exit("ce", output, PAIRS, weights=(1, 1))
    with pytest.raises(ValueError, match=r"use logit_kl or exit_kl instead"):
        one("token_distill", output, {"teacher": Output(logits=jnp.zeros((2, 2)), tokens=output.tokens[0])})
    with pytest.raises(ValueError, match=r"loss 'exit_kl': temperature is 0: give a number above 0"):
        per_exit("exit_kl", output, {}, temperature=0)
    with pytest.raises(ValueError, match=r"at least two exits"):
        per_exit("exit_kl", Output(logits=jnp.zeros((2, 2))), {})
    with pytest.raises(UnknownNameError, match=r"unknown option 'weights' of loss 'keep_ratio'"):
        losses.Objective({"keep_ratio": {"weights": (1, 1)}})
