"""Our variables and models in other libraries' hands: jax.tree, optax, orbax, Flax NNX."""

import flax.nnx as nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.exporting.small import model_of, noise, variables_of

NAME = "dtps_deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def made():
    """Model, variables, images and the logits they give."""
    model = model_of(NAME)
    variables, images = variables_of(model), jnp.asarray(noise(model, 2))
    return model, variables, images, jax.jit(model.apply)(variables, images).logits


@pytest.mark.thorough
def test_variables_are_plain_nested_dicts(made, tmp_path):
    _, variables, *_ = made
    kinds = {type(node) for node in _nodes(variables)}
    assert kinds == {dict} and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    labels = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), variables["params"])
    decays = jax.tree.map(lambda name: "bias" not in name, labels)
    optimizer = optax.chain(optax.masked(optax.add_decayed_weights(0.1), decays), optax.adam(1e-3))
    state = optimizer.init(variables["params"])
    updates, _ = optimizer.update(variables["params"], state, variables["params"])
    moved = optax.apply_updates(variables["params"], updates)
    assert jax.tree.structure(moved) == jax.tree.structure(variables["params"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        _same(
            checkpointer.restore(tmp_path / "variables", jax.tree.map(jnp.zeros_like, variables)), variables
        )
    content = flax.serialization.to_bytes(variables)
    _same(flax.serialization.from_bytes(variables, content), variables)


def _nodes(tree):
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif not hasattr(tree, "shape"):
        yield tree


def _same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.thorough
def test_a_model_is_an_nnx_module_by_its_bridge(made):
    model, variables, images, want = made
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images)
    nnx.update(module, variables["params"])
    out = nnx.jit(lambda module, images: module(images))(module, images)
    np.testing.assert_allclose(out.logits, want, atol=1e-5)
    assert out.reductions[0].keep.shape == (2, 11)


def test_an_output_is_a_pytree(made):
    """It passes through whatever maps over functions."""
    model, variables, images, want = made
    each = jax.jit(jax.vmap(lambda image: model.apply(variables, image[None])))(images)
    np.testing.assert_allclose(each.logits[:, 0], want, atol=1e-5)
    assert each.reductions[0].grid == (4, 4) and each.reductions[0].keep.shape == (2, 1, 11)
