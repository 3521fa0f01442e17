"""Values that used to pass and fail (or lie) later: refused at once, by full key, wherever they come from."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken import create_model, train
from dyntoken.reducers.score import SCORERS, Scores, register_scorer
from dyntoken.train import settings
from tests.train.tiny import tiny_config

DTPS = "dtps_deit_tiny_patch8_16"
REFUSED = {
    "model__patch_size": (0, -4, (8, 0), 2.5, True),
    "model__heads": (0, -1, "2"),
    "model__depth": (0,),
    "model__dropout": (1.0, -0.1),
    "model__num_classes": (-1,),
    "model__dtype": ("int8", "float64", 7),
    "model__drop_path_rule": ("cosine",),
    "seed": (10**30, -1, 2**32, 0.5),
    "batch": (0, -16),
    "eval_epochs": (float("inf"), float("nan"), -1),
    "eval_steps": (-1,),
    "checkpoint_steps": (-1, 2.5),
    "keep_checkpoints": (0,),
    "steps": (1e21, 2**31, -1),
    "ema": (1.0, -0.5),
    "data__shards": (0,),
    "data__size": (0, (16, -1), (1, 2, 3)),
    "data__std": ((0.0,),),
    "data__eval__crop_pct": (1e-9, 0, 1.5),
    "data__eval__interpolation": ("nearest",),
    "data__augment__scale": ((0.0, 1.0), (0.5,)),
    "data__options__train": (0,),
    "mix__erase": (-1, 1.5),
    "mix__switch_prob": (5,),
    "mix__smoothing": (1.0,),
    "optim__lr": (float("nan"), -1e-3, "fast"),
    "optim__betas": ((0.9,), (0.9, 1.0)),
    "optim__clip": (0,),
    "optim__frozen": ("*",),  # no regular expression
    "optim__schedule": ("cosin",),
    "losses__ce__weight": (-1,),
    "profile": ({"start": 0}, {"steps": -1}),
    "keep_schedule": ({"end_epoch": 2, "levels": 1},),
    "evals": ({"v2": {"name": "fake", "eval": {"crop_pct": 3}}},),
}
CASES = [(key, value) for key, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES, ids=str)
def test_a_notebook_is_told_the_full_key_and_the_value(key, value, tmp_path):
    with pytest.raises(ValueError) as caught:
        train.run(tiny_config(**{key: value}), tmp_path / "run")
    message = str(caught.value)
    assert f"config.{key.replace('__', '.')}" in message and "\n" not in message
    shown = value if not isinstance(value, dict) else ""
    assert str(shown) in message or repr(shown) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"epochs": 1e21, "steps": 0}, {"epochs": 0.0, "steps": 0}])
def test_a_run_has_a_length_that_can_be_counted(changes):
    with pytest.raises(ValueError, match=r"config\.epochs"):
        train.build(tiny_config(**changes))


def test_what_fits_is_taken_and_has_its_type():
    given = tiny_config(
        batch=16.0,
        model__dtype="bf16",
        data__mean=np.array([0.5, 0.5, 0.5]),
        optim__betas=[0, 0.9],
        optim__frozen="pos_embed",
        optim__warmup_epochs=1,
        seed=np.int64(2**32 - 1),
    )
    found = settings.read(given)
    assert found.batch == 16 and isinstance(found.batch, int)
    assert found.data.mean == (0.5, 0.5, 0.5) and found.optim["betas"] == (0.0, 0.9)
    assert found.optim["frozen"] == ("pos_embed",) and isinstance(found.optim["warmup_epochs"], float)
    assert found.seed == 2**32 - 1 and found.plain["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim__lrr", "config.optim.lr"),
        ("lr", "config.optim.lr"),
        ("crop_pct", "config.data.eval.crop_pct"),
        ("model__nmae", "config.model.name"),
        ("data__augment__flipp", "config.data.augment.flip"),
        ("evals", "config.evals.v2.name"),
    ],
)
def test_an_unknown_key_is_answered_with_a_full_one(key, near):
    value = {"v2": {"nme": "fake"}} if key == "evals" else 1
    with pytest.raises(KeyError, match=rf"did you mean {re.escape(near)}[?,]"):
        settings.read(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (DTPS, {"num_classes": -1}, "num_classes is -1"),
        (DTPS, {"num_classes": 2.5}, "num_classes is 2.5"),
        (DTPS, {"form": "gater"}, "form is 'gater': did you mean gather"),
        ("dvt_dtps_deit_tiny", {"form": "masks"}, "form is 'masks': did you mean mask"),
        (DTPS, {"dtype": "int8"}, "dtype is 'int8': give float32 .*bf16"),
        (DTPS, {"dtype": None}, "dtype is None"),
        (DTPS, {"patch_size": 0}, "patch_size is 0"),
        ("deit_tiny_patch0_224", {}, "patch_size is 0"),
        ("swin_tiny_patch4_window0_224", {}, "window is 0"),
        ("psvit_b_0", {}, "points is 0"),
        (DTPS, {"heads": 0}, "heads is 0"),
        ("pvt_tiny", {"heads": (1, 2, 0, 8)}, "heads is"),
        ("multiexit_deit_tiny", {"exits": (3, "x")}, "exits is"),
        (DTPS, {"temperature": 0.0}, "temperature is 0.0"),
        ("deit_tiny_patch8_16", {"pool": "median"}, "pool is 'median'"),
        ("deit_tiny_patch8_16", {"class_token": False}, "pool='mean'"),
        ("deit_tiny_patch8_16", {"remat": "dots"}, "remat is 'dots': give True or False.*dots_saveable"),
    ],
)
def test_create_model_refuses_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize(
    "spelling", ["bf16", "bfloat16", jnp.bfloat16, np.dtype("bfloat16"), jnp.dtype("bfloat16")]
)
def test_a_compute_type_has_several_spellings(spelling):
    model = create_model(DTPS, dtype=spelling)
    assert model == create_model(DTPS, dtype="bfloat16")
    assert model.plain().dtype == jnp.bfloat16


@pytest.mark.parametrize("spelling", ["fp16", "fp32", "f32"])
def test_short_spellings_of_other_types(spelling):
    assert create_model(DTPS, dtype=spelling).plain().dtype.itemsize == int(spelling.strip("fp")) // 8


@pytest.fixture(scope="module")
def own_scorers():
    def key_norm(tokens, seen, draws, stage, **_):
        return Scores(rank=-jnp.linalg.norm(seen.keys.mean(axis=1)[:, tokens.prefix :], axis=-1))

    def norm(tokens, seen, draws, stage, **_):
        return Scores(rank=jnp.linalg.norm(tokens.patches, axis=-1))

    before = dict(SCORERS._rows)
    register_scorer("key_norm", key_norm, needs="keys")
    register_scorer("norm", norm)
    yield
    SCORERS._rows.clear()
    SCORERS._rows.update(before)


@pytest.mark.parametrize(
    ("name", "options", "fits"),
    [
        ("dtps_deit_tiny", {"score": "key_norm"}, True),  # its sites move into the blocks
        ("dvt_dynamicvit_deit_tiny", {"score": "key_norm"}, True),
        ("etps_deit_tiny", {"score": "key_norm"}, True),
        ("etps_pvt_tiny", {"score": "key_norm", "at": (2,)}, False),  # keys of a map are no tokens'
        ("etps_pvt_tiny", {"score": "key_norm", "at": (3,)}, True),  # no convolution makes them there
        ("topk_swin_tiny", {"score": "key_norm"}, False),
        ("dtps_deit_tiny", {"score": "norm"}, True),
        ("dynamicvit_convnext_tiny", {"score": "norm"}, True),
    ],
)
def test_an_own_scorer_is_refused_where_its_site_does_not_see_enough(own_scorers, name, options, fits):
    if fits:
        assert create_model(name, **options).sites()
        return
    with pytest.raises(ValueError, match="attention keys"):
        create_model(name, **options)


LONG = {"optim__warmup_epochs": 5, "optim__cooldown_epochs": 5, "profile": {"start": 99, "steps": 1}}
LONG |= {"keep_best": 2, "batch": 128}  # more than the 64 images of the training split


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim__warmup_epochs": 5}, "config.optim.warmup_epochs"),
        ({"optim__warmup_steps": 6}, "config.optim.warmup_steps"),
        ({"optim__cooldown_epochs": 5}, "config.optim.cooldown_epochs"),
        ({"profile": {"start": 99}}, "config.profile.start"),
    ],
)
def test_what_is_longer_than_the_run_is_named(changes, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        train.build(tiny_config(**changes))


def test_evaluation_has_no_length(tmp_path):
    train.run(tiny_config(steps=1), tmp_path, log=[].append)
    metrics = train.evaluate(tiny_config(steps=1, **LONG), tmp_path, log=[].append)
    assert metrics["count"] == 37
    with pytest.raises(ValueError):
        train.build(tiny_config(steps=1, **LONG))
