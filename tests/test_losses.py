"""Losses against hand-computed numbers, at the points where they could break."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken import losses
from dyntoken.registry import UnknownNameError
from dyntoken.types import Output
from tests.made_outputs import LN3, NAN, one, rows, site


def test_ce_literal_and_padding_without_effect():
    logits = jnp.array([[0.0, LN3], [LN3, 0.0], [NAN, NAN]])
    batch = {"target": jnp.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), "mask": jnp.array([1.0, 1.0, 0.0])}
    total, count = one("ce", Output(logits=logits), batch)
    assert count == 2
    assert total == pytest.approx(np.log(4.0) + 0.5 * np.log(4.0) + 0.5 * np.log(4.0 / 3.0), abs=1e-6)

    grad = jax.grad(lambda x: losses.Objective([("ce", {})]).evaluate(Output(logits=x), batch)["ce"][0])(
        logits
    )
    np.testing.assert_allclose(grad, [[0.25 - 1.0, 0.75], [0.75 - 0.5, 0.25 - 0.5], [0.0, 0.0]], atol=1e-6)


def test_ce_of_two_heads_is_the_mean_of_their_losses():
    heads = jnp.array([[[0.0, LN3]], [[LN3, 0.0]]])
    output = Output(logits=heads.mean(0), heads=heads)
    total, count = one("ce", output, {"target": jnp.array([[1.0, 0.0]])})
    assert (total, count) == (pytest.approx(0.5 * (np.log(4.0) + np.log(4.0 / 3.0)), abs=1e-6), 1)
    assert abs(total - np.log(2.0)) > 0.1  # what the mean logits would cost


def test_ce_refuses_integer_labels():
    with pytest.raises(ValueError, match=r"soft targets are \[batch, num_classes\]"):
        one("ce", Output(logits=jnp.zeros((2, 3))), {"target": jnp.zeros((2,), jnp.int32)})


def test_keep_ratio_literal():
    first, second = [[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]
    output = Output(logits=jnp.zeros((2, 1)), reductions=(site(first, 0.5), site(second, 0.25)))
    batch = {"mask": jnp.ones(2)}
    assert one("keep_ratio", output, batch) == (pytest.approx((0.0625 + 0.0625) / 2), 2)
    assert one("keep_ratio", output, batch, divisor=3) == (pytest.approx(0.125 / 3), 2)
    # over the batch: shares 0.375 and 0.125, each off by 0.125
    assert one("keep_ratio", output, batch, divisor=1, dynamic=True) == (pytest.approx(2 * 2 * 0.125**2), 2)
    masked = {"mask": jnp.array([0.0, 1.0])}
    assert one("keep_ratio", output, masked, divisor=1) == (pytest.approx(0.125), 1)
    assert one("keep_ratio", output, masked, divisor=1, dynamic=True) == (pytest.approx(0.125), 1)


def test_keep_ratio_gradient_reaches_decisions():
    def loss(decision):
        reduction = site([[0, 0, 0, 0], [0, 0, 0, 0]]).replace(decision=decision)
        output = Output(logits=jnp.zeros((2, 1)), reductions=(reduction,))
        pairs = losses.Objective([("keep_ratio", {})]).evaluate(output, {"mask": jnp.ones(2)})
        return losses.Objective([("keep_ratio", {})]).total(pairs)

    grad = jax.grad(loss)(jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(grad, [[0.0625] * 4, [-0.0625] * 4], atol=1e-7)  # 2 (share - 1/2) / 4 / 2


@pytest.mark.parametrize("divisor", [0, -1])
def test_keep_ratio_errors(divisor):
    with pytest.raises(ValueError, match="no reduction site"):
        one("keep_ratio", Output(logits=jnp.zeros((1, 1))), {})
    output = Output(logits=jnp.zeros((1, 1)), reductions=(site([[1, 0]]),))
    with pytest.raises(ValueError, match=f"loss 'keep_ratio': divisor is {divisor}: give a number above 0"):
        one("keep_ratio", output, {}, divisor=divisor)


def test_logit_kl_literal_and_direction():
    teacher = Output(logits=jnp.array([[LN3, 0.0], [LN3, 0.0], [NAN, 0.0]]))
    student = jnp.array([[0.0, 0.0], [LN3, 0.0], [0.0, NAN]])
    batch = {"teacher": teacher, "mask": jnp.array([1.0, 1.0, 0.0])}
    total, count = one("logit_kl", Output(logits=student), batch)
    assert count == 2
    assert total == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)

    def loss(logits, teacher_logits):
        given = {**batch, "teacher": Output(logits=teacher_logits)}
        return losses.Objective([("logit_kl", {})]).evaluate(Output(logits=logits), given)["logit_kl"][0]

    grad, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher.logits)
    np.testing.assert_allclose(grad, [[0.5 - 0.75, 0.5 - 0.25], [0.0, 0.0], [0.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(to_teacher, 0.0)


def test_token_distill_in_mask_form_counts_living_tokens():
    x = [[[0.0, 0.0], [LN3, 0.0], [NAN, 7.0]], [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]]
    aim = [[[LN3, 0.0], [LN3, 0.0], [0.0, 0.0]], [[2.0, 4.0], [5.0, 5.0], [5.0, 5.0]]]
    decision = [[1, 1, 0], [1, 0, 0]]
    batch = {"teacher": Output(logits=jnp.zeros((2, 2)), tokens=rows(aim)), "mask": jnp.ones(2)}
    by_site = Output(logits=jnp.zeros((2, 2)), tokens=rows(x), reductions=(site(decision, count=2),))
    by_alive = Output(logits=jnp.zeros((2, 2)), tokens=rows(x, alive=decision))
    for output in (by_site, by_alive):
        total, count = one("token_distill", output, batch)
        assert (total, count) == (pytest.approx(LN3**2 / 2 + (1 + 9) / 2, abs=1e-5), 3)
        total, count = one("token_distill", output, batch, variant="kl")
        kl_second = np.sum(
            np.exp([2.0, 4.0])
            / np.exp([2.0, 4.0]).sum()
            * np.log(2 * np.exp([2.0, 4.0]) / np.exp([2.0, 4.0]).sum())
        )
        kl_first = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
        assert (total, count) == (pytest.approx(kl_first + kl_second, abs=1e-5), 3)
        padded = {**batch, "mask": jnp.array([0.0, 1.0])}
        assert one("token_distill", output, padded) == (pytest.approx(5.0), 1)


def test_token_distill_in_gather_form_looks_up_places_and_skips_the_fused_token():
    x = [[[1.0, 1.0], [2.0, 2.0], [50.0, 50.0]]]
    aim = [[[0.0, 0.0], [2.0, 2.0], [3.0, 3.0], [4.0, 5.0]]]
    tokens = rows(x, place=[[3, 1, -1]]).replace(grid=(2, 2))
    # 4 rows came in, 3 left: the decision is about the incoming rows and no guide to these
    output = Output(logits=jnp.zeros((1, 2)), tokens=tokens, reductions=(site([[0, 1, 0, 1]], count=3),))
    batch = {"teacher": Output(logits=jnp.zeros((1, 2)), tokens=rows(aim))}
    assert one("token_distill", output, batch) == (pytest.approx((9 + 16) / 2), 2)


def test_token_distill_in_gather_form_with_as_many_rows_as_before():
    # EViT drops one token and appends one: the site saw 3 rows and returns 3
    tokens = rows([[[1.0], [2.0], [50.0]]], place=[[2, 0, -1]])
    output = Output(logits=jnp.zeros((1, 1)), tokens=tokens, reductions=(site([[1, 0, 1]], count=3),))
    batch = {"teacher": Output(logits=jnp.zeros((1, 1)), tokens=rows([[[0.0], [0.0], [0.0]]]))}
    assert one("token_distill", output, batch) == (5.0, 2)


@pytest.mark.parametrize("variant", ["mse", "kl"])
def test_nothing_alive_is_zero_with_finite_gradients(variant):
    aim = rows(np.ones((2, 3, 4)))
    batch = {
        "teacher": Output(logits=jnp.ones((2, 4)), tokens=aim),
        "target": jnp.ones((2, 4)),
        "mask": jnp.zeros(2),
    }
    specs = [
        ("ce", {}),
        ("keep_ratio", {"dynamic": True}),
        ("logit_kl", {}),
        ("token_distill", {"variant": variant}),
    ]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def grad_and_pairs(x, logits, decision, batch):
        output = Output(logits=logits, tokens=rows(x), reductions=(site(decision, count=1),))
        pairs = losses.Objective(specs).evaluate(output, batch)
        return losses.Objective(specs).total(pairs), pairs

    point = (jnp.full((2, 3, 4), 2.0), jnp.ones((2, 4)), jnp.zeros((2, 3)))
    grads, pairs = grad_and_pairs(*point, batch)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)
    assert {key: (float(s), float(c)) for key, (s, c) in pairs.items()} == dict.fromkeys(pairs, (0.0, 0.0))

    grads, pairs = grad_and_pairs(*point, {**batch, "mask": jnp.ones(2)})
    assert tuple(map(float, pairs["token_distill"])) == (0.0, 0.0)
    np.testing.assert_array_equal(grads[0], 0.0)
    assert float(jnp.abs(grads[2]).sum()) > 0  # the ratio loss still pulls decisions up


def test_counts_carry_no_gradient():
    def counts(decision):
        output = Output(logits=jnp.zeros((1, 1)), tokens=rows([[[1.0], [2.0]]], alive=[[1, 1]]))
        output = output.replace(tokens=output.tokens.replace(alive=decision))
        batch = {"teacher": Output(logits=jnp.zeros((1, 1)), tokens=rows([[[0.0], [0.0]]]))}
        total, count = losses.Objective([("token_distill", {})]).evaluate(output, batch)["token_distill"]
        return total + count

    np.testing.assert_array_equal(jax.grad(counts)(jnp.array([[1.0, 1.0]])), 0.0)


def test_total_of_shards_with_global_counts_is_the_total_of_the_batch():
    rng = np.random.default_rng(0)
    data = {
        "decision": (rng.random((4, 3)) > 0.4).astype(np.float32),
        "x": rng.normal(size=(4, 3, 5)),
        "aim": rng.normal(size=(4, 3, 5)),
        "logits": rng.normal(size=(4, 6)),
        "teacher": rng.normal(size=(4, 6)),
        "target": rng.dirichlet(np.ones(6), 4),
        "mask": np.array([1.0, 1.0, 1.0, 0.0]),
    }
    specs = {
        "ce": {},
        "keep_ratio": {"weight": 2.0},
        "logit_kl": {"weight": 0.5},
        "token_distill": {"weight": 0.5, "variant": "kl"},
    }

    @jax.jit
    def of(d):
        sites = (site(d["decision"], 0.7, count=2),)
        output = Output(logits=d["logits"], tokens=rows(d["x"]), reductions=sites)
        teacher = Output(logits=d["teacher"], tokens=rows(d["aim"]))
        return losses.Objective(specs).evaluate(
            output, {"target": d["target"], "teacher": teacher, "mask": d["mask"]}
        )

    def pairs(part):
        return of({name: value[part].astype(np.float32) for name, value in data.items()})

    whole, first, second = pairs(slice(None)), pairs(slice(0, 2)), pairs(slice(2, 4))
    shares = [
        losses.Objective(specs).total({key: (part[key][0], first[key][1] + second[key][1]) for key in whole})
        for part in (first, second)
    ]
    assert float(sum(shares)) == pytest.approx(float(losses.Objective(specs).total(whole)), rel=1e-6)


def test_weights_and_one_loss_twice():
    output = Output(logits=jnp.zeros((2, 1)), reductions=(site([[1, 1], [0, 0]]),))
    specs = [
        ("keep_ratio", {"weight": 2.0, "divisor": 3}),
        ("keep_ratio#batch", {"dynamic": True, "weight": 5}),
    ]
    objective = losses.Objective(specs)
    pairs = objective.evaluate(output, {})
    assert {term.key: term.weight for term in objective.terms} == {
        "keep_ratio": 2.0,
        "keep_ratio#batch": 5.0,
    }
    assert float(pairs["keep_ratio"][0]) == pytest.approx(0.5 / 3)
    assert float(pairs["keep_ratio#batch"][0]) == 0.0
    assert float(losses.Objective(specs).total(pairs)) == pytest.approx(2.0 * 0.25 / 3)


def test_what_losses_need():
    assert losses.Objective([("ce", {}), ("keep_ratio", {})]).needs == {"decision"}
    assert losses.Objective([("ce", {}), ("logit_kl", {})]).needs == {"teacher"}
    assert losses.Objective({"token_distill#a": {"variant": "kl"}}).needs == {"teacher", "features"}


def test_every_listed_loss_imports():
    assert all(callable(losses.LOSSES[name]) for name in losses.LOSSES)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([("logit_k", {})], "unknown loss 'logit_k': did you mean logit_kl"),
        (
            [("keep_ratio", {"devisor": 3})],
            "unknown option 'devisor' of loss 'keep_ratio': did you mean divisor",
        ),
        ([("ce", {"batch": 3})], "unknown option 'batch'"),
        ([("ce", {}), ("ce", {})], "listed twice"),
        ([], "no loss given"),
    ],
)
def test_bad_lists_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        losses.Objective(specs)


@pytest.mark.parametrize("name", ["etps_deit_tiny_patch8_16", "deit_tiny_patch8_16"])
def test_a_run_refuses_a_loss_about_no_decision(name):
    """Unless its weight is 0, or the run only evaluates (older ones may have had it)."""
    from dyntoken import train
    from tests.train.tiny import DTPS, tiny_config

    config = tiny_config(model__name=name, model__depth=2, losses__keep_ratio={"weight": 2.0})
    with pytest.raises(
        ValueError, match=r"decision that is learnt.*--config.losses.keep_ratio.weight=0"
    ) as error:
        train.build(config)
    assert "\n" not in str(error.value)
    train.build(config, training=False)
    config.losses.keep_ratio.weight = 0.0
    train.build(config)
    train.build(tiny_config(model__name=DTPS, model__depth=2, losses__keep_ratio={"weight": 2.0}))


def test_missing_teacher_or_features_is_one_clear_error():
    output = Output(logits=jnp.zeros((1, 2)), tokens=rows([[[1.0], [2.0]]]))
    for name in ("logit_kl", "token_distill"):
        with pytest.raises(ValueError, match=f"loss '{name}' needs a teacher"):
            one(name, output, {"mask": jnp.ones(1)})
    dense = Output(logits=jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"needs the teacher's final tokens.*features"):
        one("token_distill", output, {"teacher": dense})
    with pytest.raises(ValueError, match=r"needs the student's final tokens"):
        one("token_distill", dense, {"teacher": output})


def test_teachers_that_do_not_fit_are_refused():
    output = Output(logits=jnp.zeros((1, 2)), tokens=rows([[[1.0], [2.0]]]))
    with pytest.raises(ValueError, match="same classes"):
        one("logit_kl", output, {"teacher": Output(logits=jnp.zeros((1, 3)))})
    for x, message in (([[[1.0]]], "same patch grid"), ([[[1.0, 1.0], [2.0, 2.0]]], "same width")):
        with pytest.raises(ValueError, match=message):
            one("token_distill", output, {"teacher": output.replace(tokens=rows(x))})
    with pytest.raises(UnknownNameError, match="loss 'token_distill': variant is 'l1': known: kl, mse"):
        one("token_distill", output, {"teacher": output}, variant="l1")
    with pytest.raises(ValueError, match="mask of shape"):
        one("logit_kl", output, {"teacher": output, "mask": jnp.ones(3)})
