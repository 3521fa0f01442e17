"""Whether exported programs answer as the model does."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, cast

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
from dyntoken.types import Output
from dyntoken.weights import flat_variables

RUNTIMES = ("onnxruntime", "openvino")  # what runs a .onnx here, where it is installed
ELSEWHERE = "its operators, here"
TOLERANCE = 1e-4
TIED = 1e-4  # scores closer than this, relative to the largest, are equal after some blocks in float32
NEAR = 1e-2  # a choice between equals moves logits by no more
Step = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
Reference = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checked:
    """One comparison with the model.

    Attributes:
      file: the programs, with `*` for the exits of a model that has some.
      how: what ran them: "jax", "onnxruntime", "openvino", or `ELSEWHERE`: the same
        operations here, where the program's own platform is not at hand.
      batch: images.
      error: largest difference of a logit, relative to the largest logit or 1.
      sets: every kept set is the model's.
      ties: images of a reduced model on which a choice fell the other way since both
        were equal to the accuracy of float32: a site kept another row of equal score, or
        the logits are off by more than `TOLERANCE` and less than `NEAR`. They do not
        count in `error`.
    """

    file: str
    how: str
    batch: int
    error: float
    sets: bool
    ties: int = 0

    @property
    def agrees(self) -> bool:
        """Within the tolerance, kept sets included, as far as images were compared."""
        return bool(self.error <= TOLERANCE and self.sets)


def disagreements(found: Sequence[Checked]) -> list[str]:
    """What of `check`'s rows speaks against an export, a line each.

    Besides rows that do not agree these are programs with ties in more than a
    quarter of their images.
    """
    lines = [
        f"{one.file} by {one.how} at batch {one.batch} does not agree with the model"
        for one in found
        if not one.agrees
    ]
    for file, how in dict.fromkeys((one.file, one.how) for one in found):
        rows = [one for one in found if (one.file, one.how) == (file, how)]
        ties, images = sum(one.ties for one in rows), sum(one.batch for one in rows)
        if 4 * ties > images:
            lines.append(
                f"{file} by {how}: ties in {ties} of {images} images are too many to compare it: give trained weights"
            )
    return lines


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
    how = folders.preprocess_of(about) if about["normalise"] else None
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
        for file, runtime, step in runners(folder, model, variables)
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
    out = cast(Output, model.apply(variables, images))
    found: dict[str, Any] = {LOGITS: out.logits}
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
    kept: list[np.ndarray] = []
    for name in names:
        both = np.asarray(got[name]), reference[name]
        scores = reference[f"scores_{name[len(KEEP) :]}"]
        if both[0].shape != both[1].shape:
            return Checked(file, how, batch, float("inf"), False)
        addresses = _addresses(kept, scores)
        kept = [np.take_along_axis(cells, rows, axis=1) for cells, rows in zip(addresses, both, strict=True)]
        for image in np.flatnonzero(~tied):
            other = np.setxor1d(kept[0][image], kept[1][image])
            if len(other):
                rows = np.flatnonzero(np.isin(addresses[1][image], other))
                alike = len(rows) > 0 and _tied(scores[image], rows)
                tied[image], sets = alike, sets and alike
    if logits.shape != want.shape:
        return Checked(file, how, batch, float("inf"), False)
    apart = np.abs(logits - want).max(axis=-1) / max(1.0, np.abs(want).max())
    apart = np.where(np.isnan(apart), np.inf, apart).reshape(-1, batch).max(axis=0)
    if names:  # a dropped row may have gone to another host that is as near
        tied |= (apart > TOLERANCE) & (apart <= NEAR)
    return Checked(file, how, batch, float(apart[~tied].max(initial=0.0)), bool(sets), int(tied.sum()))


def _addresses(kept: Any, scores: np.ndarray) -> list[np.ndarray]:
    """The cells of the rows that enter a site, of either side: where equal scores swapped, row numbers mean others.

    They are the rows that the site before kept, and its fused one (-1); or a whole grid again.
    """
    batch, count = scores.shape
    new = count - kept[0].shape[1] if kept else -1
    if new not in (0, 1):
        return [np.tile(np.arange(count), (batch, 1))] * 2
    return [np.pad(cells, ((0, 0), (0, new)), constant_values=-1) for cells in kept]


def _tied(scores: np.ndarray, rows: np.ndarray) -> bool:
    finite = scores[np.isfinite(scores)]
    return bool(np.ptp(scores[rows]) <= TIED * max(np.ptp(finite), np.abs(finite).max()))


def runners(path: Any, model: Model, variables: Any) -> Iterator[tuple[str, str, Step]]:
    """What there is to run of an export: its name, by what (`Checked.how`), and how one program of it is run."""
    folder = paths.resolve(path)
    about = folders.read_about(folder)
    how = folders.preprocess_of(about) if about["normalise"] else None
    parts = about["programs"]
    stem = parts[0]["name"] if len(parts) == 1 else "exit_*"
    here = folders.this_platform()
    for platform in parts[0]["jax"]:
        if platform == here:
            yield f"{stem}.{platform}.jax", "jax", folders.load_export(folder, platform).step
        else:
            step = _operators(model, variables, how, folders.PLATFORMS[platform])
            yield f"{stem}.{platform}.jax", ELSEWHERE, step
    if parts[0]["onnx"]:
        there = [name for name in RUNTIMES if importlib.util.find_spec(name)]
        if not there:
            raise ImportError("checking ONNX needs onnxruntime or openvino: pip install onnxruntime")
        for name in there:
            yield f"{stem}.onnx", name, onnx_step(folder, about, name)


def _operators(model: Model, variables: Any, how: Preprocess | None, platform: str) -> Step:
    """The programs as they are traced for a platform, compiled for this one."""
    weights = flat_variables(variables)
    runs = [jax.jit(part.run) for part in programs(model, weights, how)]

    def step(inputs: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        with backend.trace_for(platform, stable=True):
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
    # It would start a process, which jax's threads forbid.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    def compiled() -> Any:
        core = openvino.Core()
        # float32, also where the processor has shorter types: kept sets are compared.
        return core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    # The thread that compiles several models ends up with a signal stack that was freed, and with the
    # next signal the process (findings/openvino_signal_stack.sh): so not this one, which Ctrl-C goes to.
    with futures.ThreadPoolExecutor(1) as own:
        model = own.submit(compiled).result()
    # An output also bears the names of the nodes that were merged into it.
    names = [next(iter(output.names & wanted)) for output in model.outputs]
    # Its own copies: the next call writes into the same memory.
    return lambda inputs: {n: np.array(v) for n, v in zip(names, model(inputs).values(), strict=True)}
