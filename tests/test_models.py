"""The product: every method in both forms on one small DeiT; and create_model itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import dyntoken
from dyntoken.ops import select
from dyntoken.reducers import FUSERS, METHODS, SCORERS
from dyntoken.registry import UnknownNameError

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
AT, KEEP = (1, 2), 0.6
RNGS = {"policy": 1, "dropout": 2}
USED = {rule for row in METHODS.values() for _, rule in row.options}
TWO_FORMS = [name for name, row in METHODS.items() if len(row.plain.forms) == 2]
COMBINATIONS = [
    *METHODS,
    *(f"dtps+{fuse}" for fuse in FUSERS if fuse not in USED),
    *(f"dynamicvit+{score}" for score in SCORERS if score not in USED),
    "etps+one_token",
    "evit+shuffled",
    "dtps+distilled",
]
MASKABLE = [case for case in COMBINATIONS if case not in METHODS or case in TWO_FORMS]
# Reducers of their own share the code around them: of the clustering ones, and of those that merge, two stand for all
# by default.
MORE = ("kmedoids", "patchmerger", "sinkhorn", "diffrate", "pitome", "tofu")


def _quick(cases):
    return [pytest.param(c, marks=pytest.mark.slow) if c in MORE else c for c in cases]


@functools.cache
def _model(case, form="auto"):
    method, _, change = case.partition("+")
    changed = {}
    if change in FUSERS:
        changed["fuse"] = change
    elif change in SCORERS or change == "shuffled":
        changed["score"] = change
    base = "deit_tiny_distilled_patch16_224" if change == "distilled" else "deit_tiny_patch16_224"
    return dyntoken.create_model(f"{method}_{base}", **SMALL, at=AT, keep=KEEP, form=form, **changed)


@functools.cache
def _images(batch=4):
    return jax.random.normal(jax.random.key(7), (batch, 16, 16, 3))


@functools.cache
def _variables(case):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), _shapes(_model(case))
    )


def _rngs():
    return {name: jax.random.key(seed) for name, seed in RNGS.items()}


@functools.cache
def _evaluated(case, form):
    model = _model(case, form)
    return jax.jit(lambda v, x: model.apply(v, x, record=("features",)))(_variables(case), _images())


def _shapes(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))


@pytest.mark.thorough
@pytest.mark.parametrize("case", COMBINATIONS)
def test_both_forms_have_one_tree(case):
    trees = [_shapes(_model(case, form)) for form in ("auto", *_declared(_model(case)).forms)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*trees)
    assert jax.tree.structure(trees[0]) == jax.tree.structure(_variables(case))


def _imposed(case, gathered):
    """Gather's kept sets as masks over the rows of the mask form."""
    cells = _model(case).plain().grid[0] ** 2
    model, decisions, columns = _model(case), [], np.arange(cells)
    places = np.broadcast_to(columns, (len(_images()), cells))
    for stage, r in enumerate(gathered.reductions):
        before = places
        kept = np.take_along_axis(
            places, np.asarray(r.keep), axis=1
        )  # cells, or -s for the slot of stage s - 1
        kept = np.where(np.asarray(r.keep) >= 0, kept, kept[:, :1])  # where fewer stay, the first once more
        n = cells + (stage if _declared(model).adds_row else 0)
        mask = np.zeros((len(kept), n), np.float32)
        for row, cell, chosen in zip(mask, before, np.asarray(r.decision), strict=True):
            row[np.where(cell >= 0, cell, cells - cell - 2)[chosen > 0.5]] = 1.0
        decisions.append(jnp.asarray(mask))
        places = kept
        if _declared(model).adds_row:
            places = np.concatenate([places, np.full((len(kept), 1), -2 - stage)], axis=1)
        if _declared(model).returns:  # in the order of their scores
            places = np.take_along_axis(before, np.asarray(select.order(r.scores)), axis=1)
    return decisions


def _declared(model):
    return model.sites()[0].reducer(parent=None)


@pytest.mark.parametrize("case", _quick(MASKABLE))
def test_mask_form_with_gathers_kept_set_equals_gather(case):
    gathered = _evaluated(case, "gather")
    model = _model(case, "mask")
    if not _declared(model).takes_decision:
        with pytest.raises(ValueError, match="no decision on single rows"):
            model.apply(_variables(case), _images(), decisions=[jnp.ones((4, 16))] * 2)
        return
    decisions = _imposed(case, gathered)
    masked = jax.jit(lambda v, x, d: model.apply(v, x, decisions=d))(_variables(case), _images(), decisions)
    np.testing.assert_allclose(masked.logits, gathered.logits, atol=1e-5)
    for g, m in zip(gathered.reductions, masked.reductions, strict=True):
        np.testing.assert_array_equal(g.decision.sum(axis=1), m.decision.sum(axis=1))
        assert (g.count, g.ratio) == (m.count, m.ratio)


@pytest.mark.thorough
@pytest.mark.parametrize("case", _quick(TWO_FORMS))
def test_mask_form_chooses_what_gather_chooses(case):
    gathered, masked = _evaluated(case, "gather"), _evaluated(case, "mask")
    np.testing.assert_allclose(masked.logits, gathered.logits, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("case", _quick(COMBINATIONS))
def test_tokens_keep_their_address(case):
    out = _evaluated(case, "auto")
    tokens, cells = out.tokens, 16
    carrier, place = np.asarray(tokens.carrier), np.asarray(tokens.place)
    np.testing.assert_array_equal(tokens.size, select.sizes(tokens.carrier, tokens.count))
    np.testing.assert_array_equal(np.asarray(tokens.size).sum(axis=1), (carrier >= 0).sum(axis=1))
    for b in range(len(carrier)):
        for row, cell in enumerate(place[b]):
            if cell >= 0 and (tokens.alive is None or tokens.alive[b, row] > 0.5):
                assert carrier[b, cell] == row  # a kept patch carries itself
    declared = _declared(_model(case))
    merges = (declared.merges or declared.adds_row or declared.returns) and not declared.drops
    assert ((carrier >= 0).sum(axis=1) == cells).all() == merges
    for r in out.reductions:
        assert r.place.shape[1] == r.count
        assert r.keep is None or r.keep.shape[1] == r.count - int(declared.adds_row)


@pytest.mark.thorough
@pytest.mark.parametrize("case", _quick(COMBINATIONS))
def test_training_gradients_are_finite_and_reach_every_parameter(case):
    model, variables = _model(case), _variables(case)

    def loss(params):
        out = model.apply({"params": params}, _images(), train=True, rngs=_rngs())
        return (jax.nn.log_softmax(out.logits) ** 2).sum() + sum(
            (r.decision.mean() - 0.5) ** 2 for r in out.reductions
        )

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        if _declared(model).gates and _declared(model).learns:
            continue  # every image may leave a branch out
        # DPC-KNN's weights are shares of their cluster: the bias of their logarithm cancels but for rounding.
        silent = case == "dpcknn" and jax.tree_util.keystr(path).endswith("['score']['bias']")
        assert silent or float(jnp.abs(leaf).max()) > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.thorough
@pytest.mark.parametrize("case", _quick([*METHODS]))
def test_one_compilation_per_shape_and_every_transform(case):
    model, variables = _model(case), _variables(case)
    forward = jax.jit(lambda v, x: model.apply(v, x).logits)
    expected = forward(variables, _images())
    forward(variables, _images() + 1)
    assert forward._cache_size() == 1
    images = _images()[:, None]  # four examples of batch 1
    apply = lambda x: model.apply(variables, x).logits  # noqa: E731
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=spec)
    for run in (jax.jit(jax.vmap(apply)), jax.pmap(apply)):
        np.testing.assert_allclose(run(images)[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(sharded)(_images()), expected, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["dtps", "evit"])
def test_bfloat16_and_remat(case):
    method = f"{case}_deit_tiny_patch16_224"
    model = dyntoken.create_model(
        method, **SMALL, at=AT, keep=KEEP, dtype="bfloat16", remat=True, drop_path=0.2
    )
    loss = lambda v: model.apply(v, _images(), train=True, rngs=_rngs()).logits.sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(_variables(case))
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    out = jax.eval_shape(lambda v: model.apply(v, _images(), record=("features",)), _variables(case))
    assert out.tokens.x.dtype == jnp.bfloat16 and out.reductions[0].scores.dtype == jnp.float32


def test_remat_does_not_change_the_draws():
    make = functools.partial(
        dyntoken.create_model,
        "dtps_deit_tiny_patch16_224",
        **SMALL,
        at=AT,
        keep=KEEP,
        dropout=0.3,
        drop_path=0.3,
    )
    logits = []
    for remat in (False, True):
        model = make(remat=remat)
        run = jax.jit(lambda v, model=model: model.apply(v, _images(), train=True, rngs=_rngs()).logits)
        logits.append(run(_variables("dtps")))
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_draws_follow_the_ids_not_the_batch():
    model, variables = _model("dynamicvit"), _variables("dynamicvit")
    run = jax.jit(lambda x, ids: model.apply(variables, x, train=True, ids=ids, rngs=_rngs()).logits)
    whole = run(_images(), jnp.arange(4))
    halves = [run(_images()[i : i + 2], jnp.arange(i, i + 2)) for i in (0, 2)]
    np.testing.assert_allclose(whole, jnp.concatenate(halves), rtol=1e-5)
    assert not np.allclose(whole, run(_images(), jnp.arange(4) + 4))


def test_another_keep_and_other_sites_for_the_same_weights():
    model = _model("evit")
    out = jax.jit(lambda v, x: model.clone(keep=(3, 2), at=(0, 2)).apply(v, x))(_variables("evit"), _images())
    assert [r.count for r in out.reductions] == [4, 3]


def test_clone_is_equal_by_value_so_it_costs_no_compilation():
    assert _model("dtps").clone() == _model("dtps") and hash(_model("dtps").clone()) == hash(_model("dtps"))


def test_parameter_counts_of_the_published_models():
    counts = {
        "deit_tiny_patch16_224": 5_717_416,
        "deit_small_patch16_224": 22_050_664,
        "deit_base_patch16_224": 86_567_656,
        "deit_small_distilled_patch16_224": 22_436_432,
        "dtps_deit_small_patch16_224": 22_774_414,
        "evit_deit_small_patch16_224": 22_050_664,
        "vit_mini_patch4_28": 322_762,
    }
    for name, expected in counts.items():
        model = dyntoken.create_model(name)
        images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected, name


def test_every_listed_model_builds():
    names = dyntoken.list_models()
    assert len(names) > 60 and names == sorted(names)
    for name in names:
        assert dyntoken.create_model(name).arch in name
    assert dyntoken.list_models("etps_deit_s*_patch16_224") == [
        "etps_deit_small_distilled_patch16_224",
        "etps_deit_small_patch16_224",
    ]


def test_other_shapes():
    model = dyntoken.create_model(
        "dtps_vit_tiny_patch16_224",
        **{**SMALL, "img_size": (16, 24), "num_classes": 0},
        in_chans=1,
        qk_scale=0.3,
        pool="mean",
        representation_size=7,
        layer_scale=0.1,
        class_token=False,
        keep=0.5,
    )
    images = jnp.ones((2, 16, 24, 1))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    out = jax.jit(model.apply)(variables, images)
    assert out.logits.shape == (2, 7) and out.reductions[0].carrier.shape == (2, 24)
    assert out.reductions[0].grid == (4, 6)


def test_an_all_dropped_sample_stays_finite():
    # The official predictor divides 0 by 0 here.
    model = _model("dtps")
    noise = [jnp.stack([jnp.full((4, 16), -50.0), jnp.full((4, 16), 50.0)], axis=-1)] * 2
    loss = lambda v: (model.apply(v, _images(), train=True, noise=noise).logits ** 2).sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(_variables("dtps"))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dtsp_deit_small_patch16_224", {}, "unknown method 'dtsp'.*dtps"),
        ("dtps_diet_small_patch16_224", {}, "unknown model.*dtps_deit_small_patch16_224"),
        ("dtps_deit_small_patch16_224", {"kepp": 0.5}, "unknown option 'kepp'.*keep"),
        ("deit_small_patch16_224", {"keep": 0.5}, "is dense and takes no 'keep'"),
        ("dtps_deit_small_patch16_224", {"fuse": "sqeeze"}, "unknown fuse 'sqeeze'.*squeeze"),
        ("dtps_deit_small_patch16_224", {"score": "entropy"}, "unknown score 'entropy'"),
        ("dtps_deit_small_patch16_224", {"at": (3, 12)}, "between 0 and 11"),
        ("dtps_deit_small_patch16_224", {"at": (6, 3)}, "increasing"),
        ("dtps_deit_small_patch16_224", {"keep": 1e-9}, "leaves 0 of 196"),
        (
            "evit_deit_small_patch16_224",
            {"class_token": False, "pool": "mean"},
            "class token, and there is none; dynamicvit, dtps, .*work there",
        ),
        ("deit_small_patch16_224", {"img_size": 225}, "not divisible by patch_size"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        model = dyntoken.create_model(name, **options)
        model.init(jax.random.key(0), jnp.zeros((1, 225, 225, 3)))


@pytest.mark.thorough
def test_bad_calls_say_what_to_do():
    model, variables = _model("dynamicvit"), _variables("dynamicvit")
    with pytest.raises(ValueError, match=r"takes images \[B, 16, 16, 3\]"):
        model.apply(variables, jnp.zeros((1, 16, 20, 3)))
    with pytest.raises(ValueError, match=r"pass rngs=\{'policy': key\}"):
        model.apply(variables, _images(), train=True)
    with pytest.raises(ValueError, match="noise has 1 entries for 2 sites"):
        model.apply(variables, _images(), train=True, noise=[jnp.zeros((4, 16, 2))])
    with pytest.raises(UnknownNameError, match=r"unknown record 'featuers'.*features"):
        model.apply(variables, _images(), record=("featuers",))


def test_a_dense_model_is_reduced_as_by_name():
    small = {"width": 16, "depth": 4, "heads": 2, "num_classes": 5}
    dense = dyntoken.create_model("deit_tiny_patch16_224", **small)
    options = {"keep": 0.5, "at": (1, 3), "fuse": "mean"}
    assert dyntoken.reduced(dense, "etps", **options) == dyntoken.create_model(
        "etps_deit_tiny_patch16_224", **small, **options
    )
    assert dyntoken.reduced(dense, "evit") == dyntoken.create_model("evit_deit_tiny_patch16_224", **small)
    with pytest.raises(ValueError, match="only a dense model"):
        dyntoken.reduced(dyntoken.reduced(dense, "evit"), "etps")
    with pytest.raises(ValueError, match="keep"):
        dyntoken.reduced(dense, "evit", kep=0.5)
