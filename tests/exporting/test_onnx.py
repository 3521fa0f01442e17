"""ONNX files answer as the models do, in every runtime there is, for any batch."""

import ctypes
import gc
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import exporting
from dyntoken.exporting import checking as checks
from dyntoken.exporting import onnx_program
from dyntoken.exporting.programs import Program
from dyntoken.ops import backend, merge, select
from dyntoken.reducers import METHODS
from tests.backbones import small as backbones
from tests.exporting.small import MODELS, VIT, model_of, variables_of

HERE = [name for name in checks.RUNTIMES if importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or not HERE, reason="needs onnx and onnxruntime (extra [export])"
)
DEFAULT = (*MODELS, "swin_tiny_patch4_window7_224", "dynamicvit_cvt_13")
OTHERS = [f"dynamicvit_{name}" if name != "t2t_vit_7" else name for name in backbones.names(object)]
OTHERS = [name for name in OTHERS if name not in DEFAULT and "deit" not in name]


@needs_onnx
@pytest.mark.parametrize("name", [*DEFAULT, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_file_agrees_in_every_runtime(name, tmp_path):
    import onnx

    model = model_of(name)
    variables = variables_of(model)
    dyntoken.export(model, variables, tmp_path, formats=("onnx",))
    for file in tmp_path.glob("*.onnx"):
        read = onnx.load(file)
        onnx.checker.check_model(read, full_check=True)
        assert read.graph.output[0].name == "logits"
        names = [node.name for node in read.graph.node]
        assert all(names) and len(set(names)) == len(names)  # which converters to float16 build on
    found = exporting.check(tmp_path, model, variables)
    assert {(one.how, one.batch) for one in found} == {(how, batch) for how in HERE for batch in (1, 7, 32)}
    assert not exporting.disagreements(found), found
    assert sum(one.ties for one in found) <= 4, found


QUICK = ("tome", "kmedoids", "ltmp")


@needs_onnx
@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method_agrees_in_every_runtime(method, tmp_path):
    sites = (1,) if method in QUICK else (1, 2)
    model = dyntoken.create_model(
        f"{method}_deit_tiny_patch16_224", **{**VIT, "depth": len(sites) + 1, "at": sites}
    )
    variables = variables_of(model)
    dyntoken.export(model, variables, tmp_path, platforms=("cpu",), formats=("jax", "onnx"))
    found = exporting.check(tmp_path, model, variables)
    assert {one.how for one in found} == {"jax", *HERE}
    assert not exporting.disagreements(found), found
    assert sum(one.ties for one in found) <= 4, found


def _file(function, **inputs):
    """`function` of arrays by name, each `[b, ...]`, as a program and its ONNX file."""
    (batch,) = jax.export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in inputs.items()}
    run = lambda weights, arrays: {"y": function(**arrays)}  # noqa: E731
    with backend.trace_for("onnx"):
        part = Program("part", run, shapes, jax.eval_shape(run, {}, shapes))
    return onnx_program.to_onnx(part, {})


EVEN, ODD = np.arange(0, 40, 2), np.arange(1, 40, 2)


@pytest.mark.thorough
@needs_onnx
@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (select.order, (40,)),
        (select.ranks, (40,)),
        (lambda scores: merge.one_way(scores, EVEN, ODD, 7).remap, (20, 20)),
        (lambda scores: merge.both_ways(scores, EVEN, ODD, 7).remap, (20, 20)),
        (lambda scores: scores.argmin(axis=1), (20, 20)),
        (lambda scores: scores.argmax(axis=2), (20, 20)),
    ],
    ids=("order", "ranks", "one_way", "both_ways", "argmin", "argmax"),
)
def test_equal_scores_are_told_apart_alike(runtime, function, shape):
    """A runtime's own TopK need not: OpenVINO 2026.4 takes other rows than ONNX says."""
    run = checks.opened(_file(function, scores=(shape, jnp.float32)), {"y"}, runtime)
    for batch in (1, 7, 32):
        some = np.random.default_rng(batch).integers(0, 3, (batch, *shape)).astype(np.float32)
        zeros = np.where(some > 1, 0.0, -0.0).astype(np.float32)
        for scores in (
            some,
            zeros,
            np.ones_like(some),
            np.where(some > 1, np.inf, -np.inf).astype(np.float32),
        ):
            np.testing.assert_array_equal(run({"scores": scores})["y"], function(jnp.asarray(scores)))


class SignalStack(ctypes.Structure):
    """`stack_t` of signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def of_this_thread(cls):
        found = cls()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.address, found.flags, found.size


@needs_onnx
@pytest.mark.skipif(sys.platform != "linux", reason="stack_t is that of Linux")
@pytest.mark.parametrize("runtime", HERE)
def test_the_stack_for_signals_stays(runtime):
    """Several models at once took it from this thread, in OpenVINO 2026.4, and gave a freed one back."""
    file = _file(lambda x: jnp.tanh(x), x=((3,), jnp.float32))
    before = SignalStack.of_this_thread()
    first = checks.opened(file, {"y"}, runtime)
    second = checks.opened(file, {"y"}, runtime)
    ones = {"x": np.ones((2, 3), np.float32)}
    np.testing.assert_allclose(first(ones)["y"], second(ones)["y"])
    del first
    gc.collect()
    del second
    gc.collect()
    assert SignalStack.of_this_thread() == before


@needs_onnx
@pytest.mark.parametrize("runtime", HERE)
def test_operators(runtime):
    """OpenVINO 2026.4 got `inverse` wrong from two images on, before sums of integers went by way of floats."""
    ints, floats = jnp.int32, jnp.float32
    cases = {
        "inverse": (lambda rows: select.inverse(rows, 16), {"rows": ((5,), ints)}),
        "take": (select.take, {"x": ((16, 8), floats), "rows": ((5,), ints)}),
        "zero": (
            lambda x, rows: select.gather_or_zero(x, rows - 1),
            {"x": ((16, 8), floats), "rows": ((5,), ints)},
        ),
        "maps": (select.read_maps, {"x": ((2, 16, 16), floats), "rows": ((5,), ints)}),
        "lookup": (
            lambda table, rows: select.lookup(table, rows - 1),
            {"table": ((16,), ints), "rows": ((5,), ints)},
        ),
        "mask": (lambda rows: select.mask_of(rows, 16), {"rows": ((5,), ints)}),
        "ones": (
            lambda x: jnp.ones((x.shape[0], 3)) * x[:, 1:4] + x.argmax(axis=1)[:, None],
            {"x": ((6,), floats)},
        ),
        "counts": (lambda rows: jnp.cumsum(rows > 7, axis=1, dtype=ints) - 1, {"rows": ((16,), ints)}),
        "sums": (lambda x: jax.lax.cumsum(x, axis=1, reverse=True), {"x": ((6,), floats)}),
        "finite": (lambda x: jnp.isfinite(jnp.log(x)), {"x": ((6,), floats)}),
        "expm1": (lambda x: jnp.expm1(x * 1e-4) * 1e4, {"x": ((6,), floats)}),
    }
    for name, (function, inputs) in cases.items():
        run = checks.opened(_file(function, **inputs), {"y"}, runtime)
        for batch in (1, 7):
            rng = np.random.default_rng(batch)
            arrays = {
                key: rng.standard_normal((batch, *shape), np.float32)
                if dtype == floats
                else rng.permuted(np.tile(np.arange(16, dtype=np.int32), (batch, 1)), axis=1)[:, : shape[0]]
                for key, (shape, dtype) in inputs.items()
            }
            want = function(**{key: jnp.asarray(value) for key, value in arrays.items()})
            np.testing.assert_allclose(run(arrays)["y"], want, atol=1e-6, err_msg=f"{name}, batch {batch}")


@needs_onnx
def test_loops_are_unrolled(tmp_path):
    options = {**MODELS["deit_tiny_patch16_224"], "depth": 3, "scan": True}
    model = dyntoken.create_model("deit_tiny_patch16_224", **options)
    variables = variables_of(model)
    dyntoken.export(model, variables, tmp_path, formats=("onnx",))
    assert not exporting.disagreements(exporting.check(tmp_path, model, variables, batches=(1, 3)))

    def back(x):
        return jax.lax.scan(lambda c, row: (c + row, c * row), x[:, 0], x.swapaxes(0, 1), reverse=True)[
            1
        ].swapaxes(0, 1)

    x = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
    for runtime in HERE:
        got = checks.opened(_file(back, x=((4, 3), jnp.float32)), {"y"}, runtime)({"x": x})["y"]
        np.testing.assert_allclose(got, back(x), atol=1e-6)


@needs_onnx
def test_what_has_no_node_is_named(tmp_path):
    model = model_of("deit_tiny_patch16_224")
    half = dyntoken.create_model("deit_tiny_patch16_224", **MODELS["deit_tiny_patch16_224"], dtype="bfloat16")
    with pytest.raises(ValueError, match="float32 models, this one computes in bfloat16"):
        dyntoken.export(half, variables_of(model), tmp_path / "none", formats=("onnx",))
    drawn = dyntoken.create_model("topk_deit_tiny_patch16_224", **{**VIT, "at": (1,)}, score="random")
    with pytest.raises(ValueError, match=r"ONNX cannot draw .* export it as jax"):
        dyntoken.export(drawn, variables_of(drawn), tmp_path / "none", formats=("onnx",))
    with pytest.raises(
        ValueError, match="no ONNX node for the operation 'sort' of this model: export it as jax"
    ):
        _file(lambda x: jnp.sort(x, axis=1), x=((4,), jnp.float32))
    assert not (tmp_path / "none").exists()


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    model = model_of("deit_tiny_patch16_224")
    with pytest.raises(ImportError, match="pip install onnx"):
        dyntoken.export(model, variables_of(model), tmp_path / "none", formats=("onnx",))
