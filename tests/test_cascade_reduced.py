"""DVT with a reduction method in every exit: what is handed on, and to whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs
from dyntoken.reducers import METHODS
from dyntoken.registry import UnknownNameError
from dyntoken.types import Upstream

TINY = {"img_size": 12, "width": 8, "depth": 2, "heads": 2, "num_classes": 3, "exits": (3, 4)}
REDUCED = {**TINY, "keep": 0.6, "at": (0, 1)}
IMAGES = np.random.default_rng(7).normal(size=(2, 12, 12, 3)).astype(np.float32)
RECORD = ("blocks", "relations", "context", "maps")
QUICK = ("dtps", "evit")
BODY = dyntoken.create_model("deit_tiny", img_size=12, patch_size=4, width=8, depth=2, heads=2).plain()
ABLE = [name for name, row in METHODS.items() if row.refusal(BODY, REDUCED["at"]) is None]
TWO_FORMS = [name for name in ABLE if len(METHODS[name].plain.forms) == 2]
METHOD_CASES = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in TWO_FORMS]
ONE_QUICK = [pytest.param(m, marks=() if m == "dtps" else pytest.mark.slow) for m in ABLE]


@functools.cache
def _model(method, **more):
    return dyntoken.create_model(f"dvt_{method}_deit_tiny", **REDUCED, **more)


@functools.cache
def _variables(method):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    shapes = jax.eval_shape(_model(method).init, jax.random.key(0), IMAGES[:1])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


@functools.cache
def _forms(method):
    """(gather, mask) with what is kept by each form's own choice."""

    def both(variables, images):
        runs = (_model(method).clone(form=form) for form in ("gather", "mask"))
        return [run.apply(variables, images, record=RECORD) for run in runs]

    return jax.jit(both)(_variables(method), IMAGES)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHOD_CASES)
def test_both_forms_agree(method):
    gather, mask = _forms(method)
    np.testing.assert_allclose(mask.logits, gather.logits, atol=1e-4)
    fused = method == "evit"
    for g, m in zip(gather.reductions, mask.reductions, strict=True):
        np.testing.assert_array_equal(g.decision.sum(axis=1), m.decision.sum(axis=1))
        assert g.count == m.count
    assert [r.grid for r in gather.reductions] == [(3, 3), (3, 3), (4, 4), (4, 4)]
    counts = {"dtps": [5, 3, 9, 5], "dynamicvit": [5, 3, 9, 5], "evit": [7, 6, 11, 8], "spvit": [6, 5, 10, 7]}
    assert [r.count for r in gather.reductions] == counts.get(method, [6, 4, 10, 6])
    assert gather.reductions[0].place.shape[1] == gather.reductions[0].count >= 5 + fused


@pytest.mark.parametrize("method", ONE_QUICK)
def test_with_nothing_dropped_it_is_the_unreduced_cascade(method):
    if METHODS[method].plain.mixes or METHODS[method].plain.bounded:
        pytest.skip("it mixes or drops rows even so")
    dense = dyntoken.create_model("dvt_deit_tiny", **TINY)
    everything = _model(method).clone(keep=1.0)  # rows are still put in the order of their scores

    def both(variables, images):
        return [m.apply(variables, images).logits for m in (everything, dense)]

    found, expected = jax.jit(both)(_variables(method), IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def _one_hot(rows, n):
    """S `[B, 1 + N0, 1 + n]` of carriers, class row first."""
    out = np.zeros((len(rows), 1 + rows.shape[1], 1 + n))
    out[:, 0, 0] = 1
    for b, row in enumerate(np.asarray(rows)):
        for patch, at in enumerate(row):
            if at >= 0:
                out[b, 1 + patch, 1 + at] = 1
    return out


@pytest.mark.parametrize("method", METHOD_CASES)
def test_the_next_exit_reads_through_the_carriers(method):
    out, _ = _forms(method)
    bound = _model(method).bind(_variables(method))
    inside = METHODS[method].inside
    carriers = [r.carrier for r in out.reductions[:2]]
    # Sites at 0 and 1. A site before a block is ahead of its attention, one inside is not.
    seen = [None, carriers[0]] if inside else carriers
    whole = []
    for relation, rows in zip(out.records["relations"][0], seen, strict=True):
        relation = np.asarray(relation)
        if rows is not None:
            s = _one_hot(rows, relation.shape[-1] - 1)[:, None]
            relation = s @ relation @ s.swapaxes(2, 3)
        whole.append(jnp.asarray(relation, jnp.float32))
    expected = bound.reuse_1.maps(whole, [None, None])
    for one, other in zip(out.records["maps"][1], expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    last = np.asarray(out.records["blocks"][0][-1])
    spread = jnp.asarray(_one_hot(carriers[1], last.shape[1] - 1) @ last, jnp.float32)
    for one, other in zip(out.records["context"][1], bound.reuse_1.contexts([spread], [None]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    if method == "topk":
        assert (carriers[1] < 0).any()


def test_steps_equal_the_whole_and_hand_on_rows_of_the_batch():
    whole, _ = _forms("dtps")
    model = _model("dtps")
    first = jax.jit(lambda v, x: model.apply(v, x, index=0, method="step"))
    logits, upstream = first(_variables("dtps"), IMAGES)
    np.testing.assert_allclose(logits, whole.logits[0], atol=1e-5)
    assert isinstance(upstream, Upstream) and all(len(leaf) == 2 for leaf in jax.tree.leaves(upstream))
    np.testing.assert_array_equal(upstream.feature_rows[0], whole.reductions[1].carrier)
    swapped = jax.tree.map(lambda a: a[::-1], upstream)
    step = jax.jit(lambda v, x, u: model.apply(v, x, u, index=1, method="step")[0])
    found = step(_variables("dtps"), IMAGES[::-1], swapped)
    np.testing.assert_allclose(found[::-1], whole.logits[1], atol=1e-5)
    shapes = jax.eval_shape(lambda v, x: model.apply(v, x, upto=0), _variables("dtps"), IMAGES)
    assert shapes.logits.shape == (1, 2, 3) and len(shapes.reductions) == 2


def test_dropped_zero_hands_on_only_patches_that_survived():
    whole, _ = _forms("dtps")
    model = _model("dtps", dropped="zero")

    def handed(variables, images):
        upstream = model.apply(variables, images, index=0, method="step")[1]
        return upstream.feature_rows, upstream.relation_rows

    (rows,), relation_rows = jax.jit(handed)(_variables("dtps"), IMAGES)
    carrier, place = (np.asarray(a) for a in (whole.reductions[1].carrier, whole.reductions[1].place))
    rows = np.asarray(rows)
    assert (carrier >= 0).all() and ((rows >= 0).sum(axis=1) == 3).all()
    for b in range(2):
        for patch in range(9):
            assert rows[b, patch] == (carrier[b, patch] if place[b, carrier[b, patch]] == patch else -1)
    assert [r.shape for r in relation_rows] == [(2, 9), (2, 9)]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ONE_QUICK)
def test_training_form_trains(method):
    model, params = _model(method), _variables(method)["params"]

    @jax.jit
    def step(params):
        def loss(params):
            out = model.apply({"params": params}, IMAGES, train=True, rngs={"policy": jax.random.key(1)})
            kept = sum(((r.decision.mean() - r.ratio) ** 2 for r in out.reductions), jnp.zeros(()))
            return (jax.nn.log_softmax(out.logits) ** 2).mean() + kept

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), grads

    once, grads = step(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), key
        silent = key.startswith("reuse_1/context_1/") or key.endswith("relation/fc2/bias")
        assert silent or float(jnp.abs(leaf).max()) > 0, f"no gradient reaches {key}"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(once)))


def test_exits_have_their_own_draws():
    options = {**REDUCED, "at": 0, "score": "random"}
    model = dyntoken.create_model("dvt_dynamicvit_deit_tiny", **options)
    run = jax.jit(
        lambda v, x: [r.scores for r in model.apply(v, x, rngs={"policy": jax.random.key(1)}).reductions]
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    first, second = run(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes), IMAGES)
    assert first.shape == (2, 9) and second.shape == (2, 16)
    assert not np.isclose(first, second[:, :9]).any()


def test_multiply_adds_per_exit_are_fewer():
    dense = dyntoken.create_model("dvt_deit_tiny", **TINY)
    costs = [[macs.count(m, upto=i).total for i in range(2)] for m in (dense, _model("dtps"))]
    assert costs[1][0] < costs[0][0] and costs[1][1] - costs[1][0] < costs[0][1] - costs[0][0]


def test_keep_and_at_per_exit():
    make = functools.partial(dyntoken.create_model, "dvt_dtps_deit_tiny", **TINY)
    counts = lambda model: [site.reducer["keep"] for site in model.sites()]  # noqa: E731
    assert counts(make(at=(0, 1), keep=(0.9, 4))) == [8, 4, 14, 4]
    model = make(at=((0, 1), (1,)), keep=((8, 7), (6,)))
    assert counts(model) == [8, 7, 6] and [site.at for site in model.sites()] == [0, 1, 1]
    assert model.at == ((0, 1), (1,)) and model.method == "dvt_dtps"
    assert counts(make(at=((), 1), keep=0.5)) == [8]  # the first exit stays whole
    assert counts(model.clone(keep=((3, 2), 0.25))) == [3, 2, 4]
    assert dyntoken.create_model("dvt_evit_t2t_vit_12").at == (3, 6, 9)
    assert dyntoken.list_models("dvt_*ps_deit_s*") == ["dvt_dtps_deit_small", "dvt_etps_deit_small"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dvt_dtps_deit_tiny", {"keep": ((8, 7),)}, "has 1 entries for 2 exits: give one per exit"),
        ("dvt_dtps_deit_tiny", {"at": ((0,), (1,), (1,))}, "at=.* has 3 entries for 2 exits"),
        ("dvt_dtps_deit_tiny", {"keep": (0.9, 0.8, 0.7)}, "exit 0: keep=.* has 3 entries for 2 sites"),
        ("dvt_dtps_deit_tiny", {"keep": (12, 9)}, "exit 0: keep=.* leaves 12 of 9 tokens"),
        ("dvt_dtps_deit_tiny", {"at": (0, 2)}, "exit 0: at=.* between 0 and 1"),
        ("dvt_dtps_deit_tiny", {"dropped": "mean"}, "dropped is 'mean': known: host, zero"),
        ("dvt_dtps_deit_tiny", {"fuse": "sqeeze"}, "unknown fuse 'sqeeze'.*squeeze"),
        ("dvt_dtps_deit_tiny", {"depth": (2, 3)}, "the exits of a cascade share one backbone"),
        ("dvt_evit_deit_tiny", {"class_token": False, "pool": "mean"}, r"dynamicvit, dtps.* work there"),
        ("dvt_dtsp_deit_tiny", {}, "unknown method 'dtsp'.*dtps"),
        ("dvt_deit_tiny", {}, "dvt_deit_tiny is dense and takes no 'keep'.*dvt_dtps_deit_tiny"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model(name, **{**REDUCED, **options})


def test_bad_calls_say_what_to_do():
    model, variables = _model("dtps"), _variables("dtps")
    with pytest.raises(ValueError, match="noise has 2 entries for 4 sites, exit after exit"):
        model.apply(variables, IMAGES, noise=[jnp.zeros((2, 9, 2))] * 2)
    with pytest.raises(ValueError, match="decisions has 1 entries for 2 sites"):
        model.apply(variables, IMAGES, index=0, decisions=[jnp.zeros((2, 9))], method="step")
    with pytest.raises(UnknownNameError, match=r"unknown record 'stage'.*stages"):
        model.apply(variables, IMAGES, record=("stage",))
