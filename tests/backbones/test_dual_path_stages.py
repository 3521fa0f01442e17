"""What Swin and ConvNeXt share: DynamicViT where every cell stays on its grid."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dyntoken
from dyntoken import losses
from dyntoken.analysis import macs
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.models import pairings
from dyntoken.reducers import METHODS
from dyntoken.train import sharding as meshes
from tests.backbones import small

SHARED = {"num_classes": 5, "at": (0, 1), "keep": 0.6}  # 9 and 6 of 4 x 4 cells
IMAGES = np.random.default_rng(7).normal(size=(4, 32, 32, 3)).astype(np.float32)
RECORD = ("features", "blocks", "stages")
NAMES = small.names(DualPathStages)
SLOW_CONVNEXT, SLOW_SWIN = (
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith(slow) else name for name in NAMES]
    for slow in ("convnext", "swin")
)


def _model(arch, **changed):
    return dyntoken.create_model(f"dynamicvit_{arch}", **{**small.options(arch), **SHARED, **changed})


@functools.cache
def _variables(arch):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(arch).init(jax.random.key(0), IMAGES[:1]))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.2, s.shape), s.dtype), shapes)


@functools.cache
def _gathered(arch):
    model = _model(arch, form="gather")
    return jax.jit(lambda v: model.apply(v, IMAGES, record=RECORD))(_variables(arch))


def _rngs():
    return {"policy": jax.random.key(1), "dropout": jax.random.key(2)}


@pytest.mark.parametrize("arch", NAMES)
def test_both_forms_have_one_tree_and_the_same_logits(arch):
    trees = [
        jax.eval_shape(lambda f=form: _model(arch, form=f).init(jax.random.key(0), IMAGES[:1]))
        for form in ("gather", "mask")
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(*trees)
    gathered, mask = _gathered(arch), _model(arch, form="mask")
    run = jax.jit(lambda v, d: mask.apply(v, IMAGES, decisions=d, record=("blocks",)))
    imposed = run(_variables(arch), [r.decision for r in gathered.reductions])
    np.testing.assert_allclose(imposed.logits, gathered.logits, atol=1e-5)
    for ours, theirs in zip(imposed.records["blocks"], gathered.records["blocks"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    other = [jnp.roll(r.decision, 1, axis=1) for r in gathered.reductions]
    assert np.abs(run(_variables(arch), other).logits - gathered.logits).max() > 1e-3


@pytest.mark.parametrize("arch", NAMES)
def test_every_site_chooses_among_all_cells_and_none_leaves(arch):
    out = _gathered(arch)
    first, second = out.reductions
    assert [(r.count, r.ratio, r.grid) for r in out.reductions] == [(9, 0.6, (4, 4)), (6, 0.6 - 0.2, (4, 4))]
    assert [len(r.keep[0]) for r in out.reductions] == [9, 6]
    assert (first.decision.sum(axis=1) == 9).all() and (second.decision.sum(axis=1) == 6).all()
    assert np.isfinite(second.scores).all()  # not nested: what the first site dropped is ranked as well
    for r in out.reductions:
        np.testing.assert_array_equal(r.place, r.keep)
        kept = np.asarray(r.decision > 0.5)
        cells = np.broadcast_to(np.arange(16), kept.shape)
        np.testing.assert_array_equal(r.host, np.where(kept, cells, -1))
        np.testing.assert_array_equal(np.asarray(r.carrier) >= 0, kept)
        np.testing.assert_array_equal(np.asarray(r.remap) >= 0, kept)
    assert out.tokens.grid == (4, 4) and out.tokens.count == 16 and out.tokens.prefix == 1
    assert len(out.records["blocks"]) == 4 and len(out.records["stages"]) == 2


@functools.cache
def _trained(arch):
    """(loss and gradient of `(params, images, ids, target, teacher)`, the last four)."""
    model = _model(arch, drop_path=0.3)
    specs = {"keep_ratio": {"weight": 10.0}, "ce": {}, "token_distill": {"weight": 0.5}}
    teacher = jax.tree.map(jnp.zeros_like, _gathered(arch)).replace(reductions=())

    def loss(params, images, ids, target, teacher):
        out = model.apply({"params": params}, images, train=True, ids=ids, rngs=_rngs(), record=("features",))
        pairs = losses.Objective(specs).evaluate(out, {"target": target, "teacher": teacher})
        return losses.Objective(specs).total(pairs)

    run = jax.value_and_grad(loss)
    rows = (IMAGES, jnp.arange(4), jax.nn.one_hot(jnp.arange(4), 5), teacher)
    return run, rows, jax.jit(run)(_variables(arch)["params"], *rows)


@pytest.mark.parametrize("arch", SLOW_CONVNEXT)
def test_training_reaches_every_parameter(arch):
    _, _, (value, grads) = _trained(arch)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", NAMES)
def test_training_is_the_same_on_four_devices(arch):
    run, rows, (value, grads) = _trained(arch)

    def each(params, *rows):
        mine = run(jax.lax.pcast(params, "data", to="varying"), *rows)
        return jax.tree.map(lambda x: jax.lax.pmean(x, "data"), mine)

    mesh = meshes.data_mesh(jax.devices()[:4])
    split = jax.shard_map(each, mesh=mesh, in_specs=(P(), *[P("data")] * 4), out_specs=P())
    again, regrads = jax.jit(split)(_variables(arch)["params"], *rows)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    chex.assert_trees_all_close(regrads, grads, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", NAMES)
def test_random_scores_train_both_paths_in_gather_form(arch):
    model = _model(arch, score="random", remat=True, dtype="bfloat16", at=(1,), keep=0.4)
    grown = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES[:1]))["params"]["backbone"]["stage_2"]
    assert not [name for name in grown if name.startswith("reducer")]
    names = set(grown["blocks_1"]) - set(grown["blocks_0"])
    assert names and all(
        name.startswith("fast") for name in names
    )  # blocks ahead of the sites have no such path

    def loss(params):
        out = model.apply({"params": params}, IMAGES, train=True, rngs=_rngs(), record=("features",))
        return (out.logits**2).sum(), out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(_variables(arch)["params"])
    # The weights of a model whose first site lies earlier serve: the first block's fast path is not read.
    assert value.dtype == jnp.float32 and out.tokens.x.dtype == jnp.bfloat16
    assert out.reductions[0].scores.dtype == jnp.float32 and out.reductions[0].keep.shape == (4, 6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads["backbone"]["stage_2"]["blocks_1"]):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("arch", SLOW_SWIN)
def test_one_compilation_and_other_keeps_for_the_same_weights(arch):
    run = jax.jit(lambda m, v, x: m.apply(v, x).logits, static_argnums=0)
    first = run(_model(arch), _variables(arch), IMAGES)
    np.testing.assert_allclose(first, _gathered(arch).logits, atol=1e-6)
    run(_model(arch), _variables(arch), IMAGES + 1)
    assert run._cache_size() == 1
    assert [site.reducer["keep"] for site in _model(arch).clone(keep=(16, 1)).sites()] == [16, 1]


def test_noise_decides_in_training():
    model, n = _model("convnext_tiny"), (4, 16, 2)
    noise = [jnp.zeros(n).at[:, :3, 0].set(50.0).at[:, 3:, 1].set(50.0), jnp.zeros(n).at[..., 1].set(50.0)]
    out = jax.jit(lambda v: model.apply(v, IMAGES, train=True, noise=noise, record=("blocks",)))(
        _variables("convnext_tiny")
    )
    assert [r.decision.sum(axis=1).tolist() for r in out.reductions] == [[3.0] * 4, [0.0] * 4]
    slow, fast = out.records["blocks"][-1]
    assert np.isfinite(out.logits).all() and slow.shape == fast.shape == (4, 16, 16)


@pytest.mark.parametrize("arch", NAMES)
def test_only_what_drops_fits(arch):
    found = pairings(arch)
    assert [name for name in METHODS if found[name] is None] == ["dynamicvit", "static"]
    assert "stay on the grid" in found["dtps"] and "class token" in found["evit"]
    with pytest.raises(ValueError, match="nothing to fuse or merge; dynamicvit, static work there"):
        dyntoken.create_model(f"dtps_{arch}")
    with pytest.raises(ValueError, match="stay on the grid"):
        _model(arch, fuse="squeeze")
    with pytest.raises(ValueError, match="whose token grid can be chosen"):
        dyntoken.create_model(f"dvt_{arch}")
    with pytest.raises(ValueError, match="blocks of one width"):
        dyntoken.create_model(f"multiexit_{arch}")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 36}, r"must be a multiple of \(8, 8\); the nearest that fits is \(32, 32\)"),
        ({"keep": 0.2}, "keep=0.2 falls by 0.2 from site to site, to 0 at site 1: give more than 0.2"),
        ({"keep": 0.05, "at": (1,)}, "leaves 0 of 16"),
        ({"at": (1, 3)}, "between 0 and 1"),
        ({"depths": (1, 1)}, "block indices|one entry for each"),
        ({"depths": (1, 0, 3)}, "depths is .1, 0, 3.*at least 1"),
    ],
)
@pytest.mark.parametrize("arch", NAMES)
def test_errors(arch, options, message):
    with pytest.raises(ValueError, match=message):
        _model(arch, **options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"takes images \[B, 32, 32, 3\]"):
        _model("convnext_tiny").apply(_variables("convnext_tiny"), IMAGES[:, :24])


@pytest.mark.parametrize("arch", NAMES)
def test_rows_of_the_slow_path_are_counted(arch):
    found = macs.count(_model(arch))
    rows = [(block.tokens, block.tokens_out) for block in found.by_block][2:]
    assert rows == ([(16, 9), (16, 6)] if arch.startswith("swin") else [(9, 9), (6, 6)])  # attention sees all
    spared = macs.count(_model(arch).clone(keep=(8, 6))).total
    width = _model(arch).plain().widths[2]
    assert found.total - spared == (8 - 1) * width**2  # one cell through the MLP, not the linear layer


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("swin_tiny", 4.491),
        ("swin_small", 8.741),
        ("swin_base", 15.431),
        ("convnext_tiny", 4.456),
        ("convnext_small", 8.684),
        ("convnext_base", 15.355),
    ],
)
def test_multiply_adds_of_the_dense_models(name, gmacs):
    assert macs.count(dyntoken.create_model(name)).gmacs == pytest.approx(gmacs, abs=0.0005)


def test_default_sites_and_rates():
    expected = {
        "swin_tiny": (1, 2, 3),
        "swin_small": (2, 4, 6),
        "swin_base": (2, 4, 6),
        "convnext_tiny": (1, 2, 3),
        "convnext_small": (3, 6, 9),
        "convnext_base": (3, 6, 9),
    }
    for arch, at in expected.items():
        model = dyntoken.create_model(f"dynamicvit_{arch}")
        assert model.at == at
        counts = [site.reducer["keep"] for site in model.sites()]
        assert counts == [137, 97, 58]  # int(196 * (0.7 - 0.2)) is 97 in double precision, as official
