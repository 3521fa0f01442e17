"""Normalisation, soft targets, mixup and CutMix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.device_augment import draw, mix, normalize, soft_targets


def batch(size=4, height=10, width=12):
    """Constant images 1, 2, 3, ... with labels 0, 1, 2, ..."""
    values = jnp.arange(1, size + 1, dtype=jnp.float32)[:, None, None, None]
    return jnp.broadcast_to(values, (size, height, width, 3)), jnp.arange(size, dtype=jnp.int32)


def test_normalize_literal():
    image = jnp.array([[[[0, 255]], [[51, 102]]]], jnp.uint8)
    out = normalize(image, mean=(0.5, 0.4), std=(0.25, 0.2))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[[[-2.0, 3.0]], [[-1.2, 0.0]]]], atol=1e-6)
    with pytest.raises(ValueError, match="2 channels but mean has 3"):
        normalize(image, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5))


def test_soft_targets_literal():
    np.testing.assert_allclose(
        soft_targets(jnp.array([2, 0]), 4, 0.1), [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    )
    np.testing.assert_array_equal(soft_targets(jnp.array([1]), 2), [[0.0, 1.0]])


@pytest.mark.parametrize("off", [{"mixup": 0.0, "cutmix": 0.0}, {"prob": 0.0}])
def test_off_leaves_even_an_odd_batch_alone(off):
    images, labels = batch(3)
    out, targets = mix(jax.random.key(0), images, labels, num_classes=5, **off)
    np.testing.assert_array_equal(out, images)
    np.testing.assert_allclose(targets, soft_targets(labels, 5, 0.1))


def test_mixup_blends_neighbours_by_the_lambda_of_the_targets():
    images, labels = batch(4)
    out, targets = mix(jax.random.key(3), images, labels, num_classes=4, cutmix=0.0, smoothing=0.0)
    lam = float(targets[0, 0])
    assert 0.02 < lam < 0.98
    np.testing.assert_allclose(targets[0], [lam, 1 - lam, 0, 0], atol=1e-6)
    np.testing.assert_allclose(targets[3], [0, 0, 1 - lam, lam], atol=1e-6)
    expected = [lam + 2 * (1 - lam), 2 * lam + (1 - lam), 3 * lam + 4 * (1 - lam), 4 * lam + 3 * (1 - lam)]
    for image, value in zip(out, expected, strict=True):
        np.testing.assert_allclose(image, value, rtol=1e-6)


def test_cutmix_pastes_one_box_and_lambda_is_its_true_area():
    images, labels = batch(4)
    paste = jax.jit(lambda key: mix(key, images, labels, num_classes=4, mixup=0.0, smoothing=0.0))
    mixed = 0
    for seed in range(12):
        out, targets = paste(jax.random.key(seed))
        pasted = np.asarray(out[0, :, :, 0]) == 2.0
        assert set(np.unique(out[:2])) <= {1.0, 2.0} and set(np.unique(out[2:])) <= {3.0, 4.0}
        for i, partner in enumerate((2.0, 1.0, 4.0, 3.0)):
            np.testing.assert_array_equal(np.asarray(out[i]) == partner, pasted[:, :, None].repeat(3, 2))
        np.testing.assert_array_equal(pasted, pasted.any(1)[:, None] & pasted.any(0)[None, :])
        assert float(targets[0, 0]) == pytest.approx(1 - pasted.mean(), abs=1e-6)
        assert float(targets[1, 0]) == pytest.approx(pasted.mean(), abs=1e-6)
        mixed += 0 < pasted.sum() < pasted.size
    assert mixed >= 6


def test_box_size_and_clipping_at_the_border():
    # so large an alpha pins lambda to 1/2: int(10 * sqrt(1/2)) = 7, so the box reaches 3 to either side
    keys = jax.random.split(jax.random.key(0), 300)
    weight, lam = jax.jit(jax.vmap(lambda key: draw(key, (10, 20), mixup=0.0, cutmix=1e7)))(keys)
    heights = np.asarray((weight == 0).any(2).sum(1))
    widths = np.asarray((weight == 0).any(1).sum(1))
    assert set(heights) == {3, 4, 5, 6}  # centre 0: rows 0 to 2
    assert set(widths) == {7, 8, 9, 10, 11, 12, 13, 14}  # int(20 * sqrt(1/2)) = 14
    np.testing.assert_allclose(lam, 1 - heights * widths / 200, atol=1e-6)


def test_draws_have_the_stated_distribution():
    keys = jax.random.split(jax.random.key(1), 4000)
    weight, lam = jax.jit(jax.vmap(lambda key: draw(key, (4, 4), mixup=0.8, cutmix=0.0, prob=0.75)))(keys)
    np.testing.assert_array_equal(weight.min((1, 2)), lam)
    np.testing.assert_array_equal(weight.max((1, 2)), lam)
    lam = np.asarray(lam)
    on = lam[lam != 1.0]
    assert len(on) / len(lam) == pytest.approx(0.75, abs=0.03)
    assert on.mean() == pytest.approx(0.5, abs=0.02)
    assert on.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.006)  # of Beta(0.8, 0.8)

    odd = jax.jit(jax.vmap(lambda key: draw(key, (1, 1), mixup=0.3, cutmix=0.0)[1]))(keys)
    assert float(odd.min()) >= 0 and float(odd.max()) <= 1
    assert float(odd.var()) == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.006)
    share = ((odd > 0.25) & (odd < 0.75)).mean()
    assert float(share) == pytest.approx(0.2343, abs=0.025)  # I_0.75(0.3, 0.3) - I_0.25(0.3, 0.3)

    weight, _ = jax.jit(jax.vmap(lambda key: draw(key, (32, 32), mixup=1.0, cutmix=1.0, switch_prob=0.25)))(
        keys
    )
    boxes = ((weight == 0) | (weight == 1)).all((1, 2))
    assert float(boxes.mean()) == pytest.approx(0.25, abs=0.03)


def test_result_does_not_depend_on_how_the_batch_is_split():
    images, labels = batch(8)
    key = jax.random.key(5)
    whole = mix(key, images, labels, num_classes=8)
    parts = [mix(key, images[i : i + 2], labels[i : i + 2], num_classes=8) for i in range(0, 8, 2)]
    for out, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(out, np.concatenate(pieces))


def test_jit_compiles_once_and_keeps_the_dtype():
    images, labels = batch(2)
    traces = []

    @jax.jit
    def step(key, images, labels):
        traces.append(1)
        return mix(key, images, labels, num_classes=2)

    for seed in range(4):
        out, targets = step(jax.random.key(seed), images.astype(jnp.bfloat16), labels)
    assert out.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
    np.testing.assert_allclose(targets.sum(1), 1.0, rtol=1e-6)
    assert len(traces) == 1


def test_bad_arguments():
    images, labels = batch(3)
    with pytest.raises(ValueError, match="even number of images, not 3"):
        mix(jax.random.key(0), images, labels, num_classes=3)
    for wrong in ({"mixup": -1.0}, {"cutmix": -0.1}, {"prob": 1.5}, {"switch_prob": -0.5}):
        with pytest.raises(ValueError, match=f"mix.{next(iter(wrong))} is -?[01]"):
            mix(jax.random.key(0), images, labels, num_classes=3, **wrong)
