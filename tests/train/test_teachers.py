"""Training in gather form under the loop, a teacher in half precision, and one on the model's own weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses, train
from dyntoken.train.build import build
from dyntoken.train.step import gradient
from tests.train.tiny import DENSE, DTPS, SMALL, tiny_config

MODEL = {"name": DTPS, **SMALL, "depth": 2, "at": (1,), "keep": 0.5, "form": "gather"}
MCTF = {"name": "mctf_deit_tiny_patch4_16", **SMALL, "depth": 2}  # 16 patches; 10 rows are left at least
PAPER = {"ce": {}, "teacher_ce": {}, "consistency": {"weight": 3.0, "confidence": 0.0}}


@pytest.mark.thorough
def test_a_run_in_gather_form_trains_its_predictor(tmp_path):
    config = tiny_config(model={**MODEL, "patch_size": 4}, steps=2, mix={})
    start = train.build(config).model
    result = train.run(config, tmp_path, log=lambda line: None)
    fresh = train.state.init_variables(start, (16, 16, 3), config.get("seed", 0))["params"]
    old, new = (p["backbone"]["trunk"]["reducer_0"]["predictor"] for p in (fresh, result.state.params))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))


def test_its_keep_rate_may_fall():
    run = build(tiny_config(model=MODEL | {"patch_size": 4}, keep_schedule={"end_epoch": 1, "levels": 2}))
    assert [phase.counts for phase in run.phases] == [(16,), (8,)]


def _gradient(model, teacher, objective, **options):
    images = jax.random.normal(jax.random.key(0), (4, *model.input_shape))
    batch = {"image": images, "label": jnp.arange(4), "mask": jnp.ones(4), "id": jnp.arange(4)}
    variables = model.init(jax.random.key(1), images)
    variables = jax.tree.map(lambda p: 10 * p if p.ndim > 1 else p, variables)
    of_teacher = {} if options else jax.tree.map(jnp.copy, teacher.init(jax.random.key(2), images))
    run = jax.jit(
        lambda v, t: gradient(
            jnp.int32(0),
            v,
            t,
            batch,
            model=model,
            teacher=teacher,
            objective=losses.Objective(objective),
            augment=lambda key, images, labels, ids: (images, jax.nn.one_hot(labels, 7)),
            seed=0,
            **options,
        )
    )
    return run(variables, of_teacher), variables, batch


@pytest.mark.thorough
def test_a_teacher_in_half_precision_teaches_the_same():
    size = {"num_classes": 7, "img_size": 16, **SMALL}
    model = dyntoken.create_model(DENSE, **size)
    found = [
        _gradient(
            model, dyntoken.create_model(DENSE, **size, dtype=dtype), {"logit_kl": {}, "token_distill": {}}
        )
        for dtype in ("float32", "bfloat16")
    ]
    (whole, _, _), (half, _, _) = found
    for name in ("logit_kl", "token_distill"):
        assert whole.sums[name] != half.sums[name] and half.sums[name].dtype == jnp.float32
        np.testing.assert_allclose(half.sums[name], whole.sums[name], rtol=0.03)


@pytest.mark.thorough
def test_a_teacher_on_the_same_weights_learns_by_its_own_loss():
    size = {"num_classes": 7, "img_size": 16}
    model, teacher = (dyntoken.create_model(**MCTF, **size, r=r) for r in (4, 1))
    (result, variables, batch) = _gradient(model, teacher, PAPER, self_teaching=True)
    target = jax.nn.one_hot(batch["label"], 7)

    def paper(params):
        options = {"train": True, "record": ("features",), "rngs": {"policy": jax.random.key(0)}}
        ours, theirs = (m.apply({"params": params}, batch["image"], **options) for m in (model, teacher))
        both = sum(-(target * jax.nn.log_softmax(out.logits)).sum(axis=-1).mean() for out in (ours, theirs))
        aim = jax.lax.stop_gradient(theirs.tokens.x[:, 0])
        return both + 3 * jnp.square(aim - ours.tokens.x[:, 0]).mean()

    total, grads = jax.jit(jax.value_and_grad(paper))(variables["params"])
    np.testing.assert_allclose(result.total, total, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(result.grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_who_may_teach_itself():
    teacher = {**MCTF, "r": 1, "weights": "self"}
    run = build(tiny_config(model={**MCTF, "r": 4}, teacher=teacher, losses=PAPER))
    assert run.abstract_teacher == {} and [s.reducer["keep"] for s in run.teacher.sites()] == [15]
    with pytest.raises(ValueError, match="are not those of config\\.model"):
        build(tiny_config(model={**MCTF, "r": 4}, teacher={**teacher, "width": 16}, losses=PAPER))
