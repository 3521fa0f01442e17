import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dyntoken.analysis import jaxpr
from dyntoken.nn import layers
from dyntoken.ops import backend
from dyntoken.ops.depthwise import depthwise


def _case(size, taps, channels=3, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (2, *size, channels), dtype),
        jax.random.normal(keys[1], (taps, taps, 1, channels)),
    )


def _with_gradients(platform, x, kernel, weight, **options):
    def loss(x, kernel):
        y = depthwise(x, kernel, **options)
        return (y.astype(jnp.float32) * weight).sum(), y

    with backend.trace_for(platform):
        (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)
    return y, *grads


def test_literal():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kernel = jnp.array([[0.0, 0, 0], [0, 1, 10], [0, 100, 0]]).reshape(3, 3, 1, 1)
    expected = [[310, 421, 502], [643, 754, 805], [76, 87, 8]]  # centre + 10 right + 100 below
    np.testing.assert_array_equal(depthwise(x, kernel, padding=1)[0, :, :, 0], expected)


@pytest.mark.parametrize(
    ("size", "taps", "stride", "padding"),
    [((6, 5), 3, 1, 1), ((8, 8), 7, 1, 3), ((8, 7), 3, 2, 1), ((6, 6), 2, 2, 0), ((7, 9), 3, 3, 0)],
)
def test_shift_and_add_equals_the_convolution_with_gradients(size, taps, stride, padding):
    x, kernel = _case(size, taps)
    out = tuple((side + 2 * padding - taps) // stride + 1 for side in size)
    weight = jax.random.normal(jax.random.key(1), (2, *out, 3))
    runs = [_with_gradients(p, x, kernel, weight, stride=stride, padding=padding) for p in ("cpu", "gpu")]
    assert runs[0][0].shape == (2, *out, 3)
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_bfloat16_adds_up_in_float32():
    x, kernel = _case((8, 8), 7, dtype=jnp.bfloat16)
    y = jax.jit(lambda x: depthwise(x, kernel, padding=3))(x)
    exact = jax.jit(lambda x: depthwise(x.astype(jnp.float32), kernel, padding=3))(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_gradients_of_replicated_filters_are_summed_over_devices():
    x, kernel = _case((4, 4), 3)
    loss = lambda kernel, x: (depthwise(x, kernel, padding=1) ** 2).sum()  # noqa: E731
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    np.testing.assert_allclose(jax.jit(shard)(kernel, x), jax.jit(jax.grad(loss))(kernel, x), rtol=1e-5)


def test_layer_has_the_parameters_of_a_grouped_convolution():
    layer = layers.DepthwiseConv(3, stride=2, padding=1)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 6, 6, 4)))
    assert jax.tree.map(lambda a: a.shape, variables["params"]) == {"kernel": (3, 3, 1, 4), "bias": (4,)}
    bare = layers.DepthwiseConv(3, use_bias=False)
    assert set(jax.eval_shape(bare.init, jax.random.key(0), jnp.zeros((1, 6, 6, 4)))["params"]) == {"kernel"}


def test_multiply_adds_are_counted_on_every_platform():
    x, kernel = _case((8, 7), 3)
    for platform in ("cpu", "gpu"):
        with backend.trace_for(platform):
            made = jax.make_jaxpr(lambda x, kernel: depthwise(x, kernel, stride=2, padding=1))(x, kernel)
        assert sum(op.macs for op in jaxpr.operations(made)) == 2 * 4 * 4 * 3 * 9


def test_errors():
    with pytest.raises(ValueError, match=r"must be \[kh, kw, 1, 3\]"):
        depthwise(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 1)))
    with pytest.raises(ValueError, match="too small for a"):
        depthwise(jnp.zeros((1, 2, 4, 3)), jnp.zeros((3, 3, 1, 3)))
