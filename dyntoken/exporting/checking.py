"""Whether exported programs answer as the model does."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dyntoken import paths
from dyntoken.exporting import folder as folders
from dyntoken.exporting.programs import KEEP, LOGITS, programs
from dyntoken.models import Model
from dyntoken.ops import backend
from dyntoken.preprocessing import Preprocess
from dyntoken.weights import flat_variables

RUNTIMES = ("onnxruntime", "openvino")  # what runs a .onnx here, where it is installed
TOLERANCE = 1e-4
TIED = 1e-5  # scores closer than this, relative to their range, are equal for float32
Step = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
Reference = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checked:
    """One comparison with the model.

    Attributes:
      file: the programs, with `*` for the exits of a model that has some.
      how: what ran them: "jax", "onnxruntime", "openvino", or "operators on the cpu":
        the same operations, where the program's own platform is not at hand.
      batch: images.
      error: largest difference of a logit, relative to the largest logit or 1.
      sets: every kept set is the model's.
      ties: images of which a site kept another row of equal score; they are not
        compared any further.
    """

    file: str
    how: str
    batch: int
    error: float
    sets: bool
    ties: int = 0

    @property
    def agrees(self) -> bool:
        """Within the tolerance, the kept sets included, and most images are compared."""
        return bool(self.error <= TOLERANCE and self.sets and 2 * self.ties < self.batch + 1)


def check(
    path: Any, model: Model, variables: Any, *, batches: Sequence[int] = (1, 7, 32), seed: int = 0
) -> list[Checked]:
    """Runs every program of an export beside the model, on noise.

    Args:
      path: what `export` wrote.
      model, variables: what was exported.
      batches: numbers of images, each of which every program runs.
      seed: of the noise.

    Raises:
      ValueError: no export there.
      ImportError: a .onnx, and none of `RUNTIMES` is installed.
    """
    folder = paths.resolve(path)
    about = folders.read_about(folder)
    how = Preprocess(**about["preprocess"]) if about["normalise"] else None
    images, normal = _noise(model, sum(batches), seed, how)
    # Images do not see each other: one compilation answers for all batches.
    whole = jax.tree.map(np.asarray, jax.jit(functools.partial(_reference, model))(variables, normal))
    ends = np.cumsum(batches).tolist()
    cuts = [slice(end - batch, end) for end, batch in zip(ends, batches, strict=True)]
    cases = [
        (images[cut], {k: v[..., cut, :] if k == LOGITS else v[cut] for k, v in whole.items()})
        for cut in cuts
    ]
    return [
        compare(file, runtime, folders.run_all(about, step, images), reference)
        for file, runtime, step in _runs(folder, about, model, variables, how)
        for images, reference in cases
    ]


def _noise(model: Model, batch: int, seed: int, how: Preprocess | None) -> tuple[Any, Any]:
    """Images as the programs and as the model take them."""
    rng = np.random.default_rng((seed, batch))
    if how is None:
        images = rng.standard_normal((batch, *model.input_shape), np.float32)
        return images, jnp.asarray(images)
    pixels = rng.integers(0, 256, (batch, *model.input_shape), np.uint8)
    return pixels, how(pixels)


def _reference(model: Model, variables: Any, images: Any) -> dict[str, Any]:
    out = model.apply(variables, images)
    found = {LOGITS: out.logits}
    for number, site in enumerate(out.reductions):
        if site.keep is not None:
            found |= {f"{KEEP}{number}": site.keep, f"scores_{number}": site.scores}
    return found


def compare(file: str, how: str, got: Mapping[str, Any], reference: Reference) -> Checked:
    """Outputs of `folders.run_all` against the model's, see `Checked`."""
    logits, want = np.asarray(got[LOGITS], np.float64), reference[LOGITS].astype(np.float64)
    batch = want.shape[-2]
    names = sorted((name for name in reference if name.startswith(KEEP)), key=lambda n: int(n[len(KEEP) :]))
    tied, sets = np.zeros(batch, bool), logits.shape == want.shape
    for name in names:
        rows, own = np.asarray(got[name]), reference[name]
        scores = reference[f"scores_{name[len(KEEP) :]}"]
        for image in np.flatnonzero(~tied):
            other = np.setxor1d(rows[image], own[image])
            if len(other) or len(rows[image]) != len(own[image]):
                alike = len(rows[image]) == len(own[image]) and _tied(scores[image], other)
                tied[image], sets = alike, sets and alike
    if logits.shape != want.shape:
        return Checked(file, how, batch, float("inf"), False)
    apart = np.abs(logits - want)[..., ~tied, :]
    error = float(apart.max(initial=0.0) / max(1.0, np.abs(want).max()))
    return Checked(file, how, batch, error if error == error else float("inf"), bool(sets), int(tied.sum()))


def _tied(scores: np.ndarray, rows: np.ndarray) -> bool:
    finite = scores[np.isfinite(scores)]
    return bool(np.ptp(scores[rows]) <= TIED * max(np.ptp(finite), np.abs(finite).max()))


def _runs(
    folder: epath.Path, about: Mapping[str, Any], model: Model, variables: Any, how: Preprocess | None
) -> Iterator[tuple[str, str, Step]]:
    """What is to be run: its name, by what, and how one program of it is."""
    parts = about["programs"]
    stem = parts[0]["name"] if len(parts) == 1 else "exit_*"
    here = folders.this_platform()
    for platform in parts[0]["jax"]:
        if platform == here:
            yield f"{stem}.{platform}.jax", "jax", folders.load_export(folder, platform).step
        else:
            step = _operators(model, variables, how, folders.PLATFORMS[platform])
            yield f"{stem}.{platform}.jax", "operators on the cpu", step
    if parts[0]["onnx"]:
        there = [name for name in RUNTIMES if importlib.util.find_spec(name)]
        if not there:
            raise ImportError("checking ONNX needs onnxruntime or openvino: pip install 'dyntoken[export]'")
        for name in there:
            yield f"{stem}.onnx", name, onnx_step(folder, about, name)


def _operators(model: Model, variables: Any, how: Preprocess | None, platform: str) -> Step:
    """The programs as they are traced for a platform, compiled for this one."""
    weights = flat_variables(variables)
    runs = [jax.jit(part.run) for part in programs(model, weights, how)]

    def step(inputs: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        with backend.trace_for(platform):
            return runs[index](weights, dict(inputs))

    return step


def onnx_step(folder: epath.Path, about: Mapping[str, Any], runtime: str) -> Step:
    """Runs the .onnx files of a folder with one of `RUNTIMES`."""
    runs = [
        opened((folder / part["onnx"]).read_bytes(), part["outputs"], runtime) for part in about["programs"]
    ]
    return lambda inputs, index: runs[index]({name: np.asarray(value) for name, value in inputs.items()})


def opened(
    content: bytes, outputs: Iterable[str], runtime: str
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A .onnx file in one of `RUNTIMES`, as a function from arrays to arrays, both by name."""
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime](content, set(outputs))


def _onnxruntime(content: bytes, wanted: set[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _openvino(content: bytes, wanted: set[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    sys.modules.setdefault("openvino_telemetry", None)  # it would start a process, which jax's threads forbid
    import openvino

    core = openvino.Core()
    # float32, also where the processor has shorter types: kept sets are compared.
    model = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # An output also bears the names of the nodes that were merged into it.
    names = [next(iter(output.names & wanted)) for output in model.outputs]
    # Its own copies: the next call writes into the same memory.
    return lambda inputs: {n: np.array(v) for n, v in zip(names, model(inputs).values(), strict=True)}
