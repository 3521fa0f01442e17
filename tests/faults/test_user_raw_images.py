"""Raw pixels where normalised images belong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dyntoken

TINY = {"img_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 2, "num_classes": 3}
CASCADE = {"img_size": 8, "width": 8, "depth": 1, "heads": 2, "num_classes": 3, "exits": (1, 2)}
MODELS = {
    "plain": lambda: dyntoken.create_model("deit_tiny", **TINY),
    "cascade": lambda: dyntoken.create_model("dvt_deit_tiny", **CASCADE),
    "multiexit": lambda: dyntoken.create_model(
        "multiexit_deit_tiny", **{**TINY, "depth": 2, "exits": (0, 1)}
    ),
}
RAW = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
GOOD = (RAW / 64 - 2).astype(np.float32)


@pytest.fixture(params=MODELS, scope="module")
def made(request):
    model = MODELS[request.param]()
    return model, jax.jit(model.init)(jax.random.key(0), GOOD)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, bool])
def test_whole_numbers_are_an_error_that_names_the_way(made, dtype):
    model, variables = made
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises(ValueError, match=r"dyntoken\.preprocess") as error:
            apply(variables, RAW.astype(dtype))
        assert np.dtype(dtype).name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, jnp.asarray, lambda x: np.float32(-x)])
def test_floats_of_0_to_255_are_warned_of(made, kind):
    model, variables = made
    with pytest.warns(UserWarning, match=r"dyntoken\.preprocess"):
        model.apply(variables, jnp.asarray(kind(RAW), jnp.float32))


def test_the_warning_comes_once():
    model = MODELS["plain"]()
    variables = jax.jit(model.init)(jax.random.key(0), GOOD)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            model.apply(variables, RAW.astype(np.float32))
    assert len(seen) == 1


def test_nothing_is_said_of_normalised_images_nor_inside_jit(made):
    model, variables = made
    model.apply(variables, GOOD)
    jax.jit(model.apply)(variables, RAW.astype(np.float32))
    # Constant images inside a transformation: values, but nothing may be computed with them.
    jax.jit(lambda v: model.apply(v, GOOD).logits.sum())(variables)


@pytest.mark.parametrize(("channels", "shape"), [(3, (9, 8)), (3, (9, 8, 1)), (3, (9, 8, 4)), (1, (9, 8, 3))])
def test_images_of_other_channels_are_told_the_way(channels, shape):
    preprocess = dyntoken.preprocess(dyntoken.create_model("deit_tiny", **{**TINY, "in_chans": channels}))
    mode = {3: "RGB", 1: "L"}[channels]
    with pytest.raises(ValueError, match=rf'\.convert\("{mode}"\)') as error:
        preprocess(np.zeros(shape, np.uint8))
    assert str(shape) in str(error.value) and "\n" not in str(error.value)
    image = np.asarray(Image.new("P", (8, 9)).convert(mode))
    assert preprocess(image if channels == 3 else image[..., None]).shape == (8, 8, channels)
