"""Multiply-adds against the published tables and the official counters."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import dyntoken
from dyntoken import reducers
from dyntoken.analysis import macs

SITES = ((3, 6, 9), (3, 5, 7, 9), (2, 4, 6, 8))
TABLE = {  # DeiT-S, 224 pixels; GMACs at keep 0.7, then at keep 0.5, for each of SITES
    "dynamicvit": ((2.981, 2.696, 2.404), (2.229, 1.986, 1.631)),
    "dtps": ((2.992, 2.707, 2.415), (2.239, 1.996, 1.641)),
    "evit": ((3.029, 2.746, 2.462), (2.309, 2.073, 1.723)),
    "etps": ((3.008, 2.720, 2.431), (2.292, 2.055, 1.701)),
}
ROWS = [
    (method, keep, at, table[i][j])
    for method, table in TABLE.items()
    for i, keep in enumerate((0.7, 0.5))
    for j, at in enumerate(SITES)
]


@functools.cache
def counted(name, keep=None, at=None):
    options = {key: value for key, value in (("keep", keep), ("at", at)) if value is not None}
    return macs.count(dyntoken.create_model(name, **options))


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "gmacs"), [("tiny", 1.254), ("small", 4.599), ("base", 17.564)])
def test_dense_models_match_the_papers(size, gmacs):
    assert counted(f"deit_{size}_patch16_224").gmacs == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "keep", "at", "gmacs"), ROWS)
def test_reduced_models_match_the_table(method, keep, at, gmacs):
    assert counted(f"{method}_deit_small_patch16_224", keep, at).gmacs == pytest.approx(gmacs, abs=6e-4)


OFFICIAL = [  # conv and linear + matmul + bmm of fvcore on the official PyTorch models
    ("deit_small", None, 57802752, 4183415808 + 357663744),
    ("dynamicvit_deit_small", 0.7, 57802752, 2757469632 + 165625344),
    ("dynamicvit_deit_small", 0.5, 57802752, 2052060480 + 119197440),
    ("dynamicvit_deit_base", 0.7, 115605504, 11028945792 + 331250688),
    ("dynamicvit_deit_tiny", 0.7, 28901376, 689484000 + 82812672),
    ("dtps_deit_tiny", 0.7, 28901376, 689484000 + 82812672 + 5361408),
    ("dtps_deit_small", 0.7, 57802752, 2757469632 + 165625344 + 10722816),
    ("dtps_deit_small", 0.5, 57802752, 2052060480 + 119197440 + 9680640),
    ("evit_deit_small", 0.7, 57802752, 2776095744 + 195382272),
    ("evit_deit_small", 0.5, 57802752, 2101337088 + 149695488),
    ("topk_deit_small", 0.7, 57802752, 2746014720 + 193177344),
    ("topk_deit_small", 0.5, 57802752, 2075974656 + 148601088),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "keep", "conv", "dot"), OFFICIAL)
def test_official_counters_agree_exactly(name, keep, conv, dot):
    count = counted(f"{name}_patch16_224", keep, None if keep is None else (3, 6, 9))
    assert (count.conv, count.dot, count.total) == (conv, dot, conv + dot)


def test_parameters_of_the_published_models():
    assert counted("deit_tiny_patch16_224").params == 5_717_416
    assert counted("deit_small_patch16_224").params == 22_050_664
    assert counted("deit_base_patch16_224").params == 86_567_656
    assert counted("dynamicvit_deit_small_patch16_224", 0.7, (3, 6, 9)).params == 22_774_414


def test_tokens_of_a_reducer_before_the_block():
    count = counted("dtps_deit_small_patch16_224", 0.7, (3, 6, 9))
    assert count.tokens == (197,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    assert [block.tokens_out for block in count.by_block] == list(count.tokens)
    assert [stage.tokens for stage in count.stages] == [197, 138, 97, 68]
    assert [stage.blocks for stage in count.stages] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]


def test_tokens_of_a_reducer_inside_the_block():
    count = counted("evit_deit_small_patch16_224", 0.7, (3, 6, 9))
    assert count.tokens == (197,) * 4 + (140,) * 3 + (100,) * 3 + (72,) * 2  # with the fused token
    assert [block.tokens_out for block in count.by_block[2:5]] == [197, 140, 140]
    assert [stage.blocks for stage in count.stages] == [(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9), (9, 10, 11)]


def test_the_parts_add_up():
    count = counted("dtps_deit_small_patch16_224", 0.7, (3, 6, 9))
    stages = sum(stage.macs + stage.reducer for stage in count.stages)
    assert count.under("backbone/patch_embed").conv == 196 * 768 * 384
    assert count.under("head").dot == 384_000
    assert count.total == stages + count.under("backbone/patch_embed").total + count.under("head").total
    assert count.total == count.under("").total == sum(m.total for m in count.by_module.values())
    assert sum(block.macs.total for block in count.by_block) == sum(stage.macs for stage in count.stages)
    assert sum(block.params for block in count.by_block) == count.params_under("backbone/trunk") - 3 * 241_250


def test_a_block_and_a_reducer_cost_what_the_formula_says():
    count = counted("dtps_deit_small_patch16_224", 0.7, (3, 6, 9))
    d, t = 384, 138
    assert count.by_block[3].macs == macs.Macs(dot=12 * t * d * d + 2 * t * t * d)
    assert count.under("backbone/trunk/blocks_3/attn").dot == 4 * t * d * d + 2 * t * t * d
    predictor = 196 * (d * d + d * d // 2 + d * d // 8 + d // 2)
    assert count.stages[1].reducer == predictor + 2 * 59 * 137 * d  # 59 dropped, 137 kept


def test_the_form_asked_for_makes_no_difference():
    options = {"keep": 0.5, "at": (2, 4), "depth": 6}
    mask = macs.count(dyntoken.create_model("dtps_vit_mini_patch4_28", form="mask", **options))
    gather = macs.count(dyntoken.create_model("dtps_vit_mini_patch4_28", form="gather", **options))
    assert mask.total == gather.total
    assert mask.tokens == (50, 50, 25, 25, 13, 13)


@pytest.mark.parametrize("method", reducers.METHODS)
def test_every_method_is_counted(method):
    """Also one that only masks, which saves nothing."""
    sites = {"at": (1,)} if reducers.METHODS[method].plain.from_block is None else {}
    small = {"width": 16, "heads": 2, "depth": 3, "keep": 0.5, **sites}
    model = dyntoken.create_model(f"{method}_vit_mini_patch4_28", **small)
    count = macs.count(model)
    assert (method == "ltmp") == (count.tokens[-1] == 50)


def test_non_square_images_remat_and_bfloat16():
    plain = macs.count(
        dyntoken.create_model("deit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=0)
    )
    assert plain.image_shape == (32, 64, 3)
    assert plain.total == 8 * 768 * 192 + 12 * 9 * 192**2 + 2 * 81 * 192
    other = dyntoken.create_model(
        "deit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=0, remat=True, dtype="bfloat16"
    )
    assert macs.count(other).total == plain.total


class Foreign(nn.Module):
    """A module of another library: no input_shape, no Output, work that nobody reads."""

    @nn.compact
    def __call__(self, x):
        nn.Dense(1000, name="unread")(x)
        with jax.named_scope("resize"):
            x = jnp.einsum("yh,bhwc->bywc", jnp.ones((2, x.shape[1])), x)
        return nn.Dense(5, name="read")(x.reshape(x.shape[0], -1))


def test_a_foreign_module_resizing_and_dead_work():
    count = macs.count(Foreign(), (4, 3, 2))
    assert dict(count.by_module) == {"read": macs.Macs(dot=2 * 3 * 2 * 5)}
    assert (count.total, count.resize) == (60, 2 * 4 * 3 * 2)
    assert count.by_block == () and count.tokens == ()


def test_errors_say_what_to_give():
    with pytest.raises(ValueError, match="Foreign has no input_shape: give image_shape"):
        macs.count(Foreign())
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width, channels\), got \(4, 3\)"):
        macs.count(Foreign(), (4, 3))


def test_rows_of_a_summary():
    rows = {
        "backbone/patch_embed/proj": "backbone/patch_embed",
        "backbone/trunk/blocks_3/attn/qkv": "backbone/trunk/blocks_3",
        "backbone/stage_1/patch_embed/proj": "backbone/stage_1/patch_embed",
        "backbone/stage_1/trunk/reducer_0/predictor": "backbone/stage_1/trunk/reducer_0",
        "exit_1/backbone/patch_embed/proj": "exit_1/backbone/patch_embed",
        "head/cls": "head",
    }
    assert {path: macs.unit(path) for path in rows} == rows
