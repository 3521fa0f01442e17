"""The folder of an exported model: written by `export`, read by `load_export`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.export
import safetensors.numpy
from etils import epath

from dyntoken import __version__, paths, preprocessing, registry
from dyntoken.exporting import onnx_graph, onnx_program
from dyntoken.exporting.programs import IMAGES, KEEP, LOGITS, NEXT, Program, programs
from dyntoken.models import Model
from dyntoken.ops import backend
from dyntoken.weights import flat_variables, save_weights
from dyntoken.weights.pixels import FIELDS

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}  # jax.export's names and ours
ABOUT, WEIGHTS = "model.json", "weights.safetensors"
FORMATS = ("jax", "onnx")


def export(
    model: Model,
    variables: Mapping[str, Any],
    path: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    normalise: bool = False,
    *,
    formats: Sequence[str] = ("jax",),
    preprocess: preprocessing.Preprocess | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Writes a model as programs that run without this package, for any batch size.

    The folder gets `NAME.PLATFORM.jax` (`jax.export.deserialize` reads it), traced
    under its own platform's name, and `NAME.onnx`, where NAME is "model", or
    "exit_0", "exit_1", ... of a model with exits: exit i takes what exit i - 1
    hands on. A program is called as `program.call(weights, {"images": images})`
    and returns a dict, see `programs.Program`. `weights.safetensors` holds the
    weights once for all of them (a .onnx has its own inside), `model.json` the
    name, shapes, preprocessing, class names, token counts and versions.

    Args:
      model: from `create_model`; it is exported in evaluation, with its `keep`.
      variables: of the model.
      path: folder, local or a URI; an earlier export there is replaced, other files are left alone.
      platforms: of "cpu", "cuda", "rocm" and "tpu".
      normalise: programs take uint8 `[B, H, W, C]` and normalise it themselves;
        otherwise normalised float32.
      formats: "jax", "onnx" (extra [export]) or both.
      preprocess: of the weights; by default `dyntoken.preprocess(model)`.
      class_names: one per class, or none.

    Raises:
      ValueError: an unknown platform or format, class names of another number, a
        file of another kind in the way, or for ONNX an operation or type that there
        is no node for.
      ImportError: ONNX without the package onnx.
    """
    for what, given, known in (("platform", platforms, PLATFORMS), ("format", formats, FORMATS)):
        if not given:
            raise ValueError(f"no {what} to export for: give some of {', '.join(known)}")
        for one in given:
            if one not in known:
                raise registry.UnknownNameError(f"unknown {what} {one!r}: {registry.suggest(one, known)}")
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for {model.num_classes} classes")
    folder = paths.resolve(path)
    earlier = present(folder)
    replaced = [] if earlier is None else _files(earlier)
    how = preprocess or preprocessing.preprocess(model)
    weights = flat_variables(variables)
    parts = programs(model, weights, how if normalise else None)
    files: dict[str, bytes] = {}
    described: list[dict[str, Any]] = []
    versions: dict[str, Any] = {"dyntoken": __version__, "jax": jax.__version__, "flax": flax.__version__}
    for part in parts:
        row: dict[str, Any] = {"name": part.name, "jax": {}, "onnx": None}
        row |= {side: _described(getattr(part, side)) for side in ("inputs", "outputs")}
        for platform in platforms if "jax" in formats else ():
            row["jax"][platform] = f"{part.name}.{platform}.jax"
            found = traced(part, weights, platform)
            versions["calling_convention"] = found.calling_convention_version
            files[row["jax"][platform]] = bytes(found.serialize())
        if "onnx" in formats:
            row["onnx"] = f"{part.name}.onnx"
            files[row["onnx"]] = onnx_program.to_onnx(part, weights)
        described.append(row)
    about = {
        "model": "_".join(filter(None, (model.method, model.arch))),
        "programs": described,
        "weights": WEIGHTS if "jax" in formats else None,
        "normalise": normalise,
        "preprocess": dataclasses.asdict(how),
        "class_names": list(class_names),
        "sites": [{"block": site.at, "keep": site.reducer["keep"]} for site in model.sites()],
        "parameters": sum(value.size for value in weights.values()),
        "versions": versions,
    }
    for name in (*files, *([WEIGHTS] if "jax" in formats else [])):
        if name not in replaced and (folder / name).exists():
            raise ValueError(f"{folder / name} is there and of no export: give another folder, or move it")
    remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "jax" in formats:
        told = model.clone(prepared=tuple((name, getattr(how, name)) for name in sorted(FIELDS)))
        save_weights(folder / WEIGHTS, variables, model=told, class_names=class_names)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")  # last: what it names is there


def present(path: Any) -> dict[str, Any] | None:
    """What `model.json` of a folder says, None without one.

    Raises:
      ValueError: it is not one that `export` wrote.
    """
    folder = paths.resolve(path)
    if not (folder / ABOUT).exists():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text())
        summary(about), _files(about)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder / ABOUT} is not of an export: give another folder") from None
    return about


def _files(about: Mapping[str, Any]) -> list[str]:
    """Names of the files beside `model.json`."""
    parts = (name for one in about["programs"] for name in (*one["jax"].values(), one["onnx"]))
    names = [epath.Path(name).name for name in (about["weights"], *parts) if name]
    return [
        name for name in names if name == WEIGHTS or name.endswith((".jax", ".onnx"))
    ]  # what export writes


def summary(about: Mapping[str, Any]) -> str:
    """What an export is for, in words: `cpu, tpu, onnx; float32`."""
    forms = [*about["programs"][0]["jax"], *(["onnx"] if about["programs"][0]["onnx"] else [])]
    return f"{', '.join(forms)}; {about['programs'][0]['inputs'][IMAGES]['type']}"


def remove(path: Any) -> None:
    """Deletes the files of an export, and its folder where nothing else is in it."""
    folder = paths.resolve(path)
    about = present(folder)
    if about is None:
        return
    (folder / ABOUT).unlink()
    for name in _files(about):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def traced(part: Program, weights: Mapping[str, Any], platform: str) -> jax.export.Exported:
    """A program with the operators' forms of a platform, lowered for it."""
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    with backend.trace_for(PLATFORMS[platform], stable=True):
        run = jax.jit(lambda weights, inputs: part.run(weights, inputs))  # fresh: nothing is traced yet
        return jax.export.export(run, platforms=[platform])(shapes, part.inputs)


def _described(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    return {
        name: {
            "shape": [int(d) if onnx_graph.static(d) else str(d) for d in leaf.shape],
            "type": leaf.dtype.name,
        }
        for name, leaf in arrays.items()
    }


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model on this machine's platform.

    Attributes:
      about: what `model.json` says.
      programs: one, or one per exit; see `export` for how they are called.
      weights: what they take first.
    """

    about: dict[str, Any]
    programs: tuple[jax.export.Exported, ...]
    weights: dict[str, Any]

    @property
    def preprocess(self) -> preprocessing.Preprocess:
        """From uint8 images of any size to what the programs take, unless they normalise themselves."""
        return preprocess_of(self.about)

    def step(self, inputs: Mapping[str, Any], index: int = 0) -> dict[str, jax.Array]:
        """Runs one program on its inputs.

        Raises:
          ValueError: this jax is too old for the file.
        """
        try:
            return self.programs[index].call(self.weights, dict(inputs))
        except jax.errors.JaxRuntimeError as error:
            if "deserialize StableHLO" not in str(error):
                raise
            raise ValueError(
                f"written by jax {self.about['versions']['jax']}, which this jax {jax.__version__} cannot read: "
                "run it with that one or a newer one, or export it again"
            ) from error

    def __call__(self, images: Any, upto: int | None = None) -> dict[str, jax.Array]:
        """`logits [B, classes]`, of exits 0 .. `upto` (None: all) `[exits, B, classes]`, and `keep_0`, ..."""
        return run_all(self.about, self.step, images, upto)


def run_all(about: Mapping[str, Any], step: Any, images: Any, upto: int | None = None) -> dict[str, Any]:
    """Runs the programs of a folder one after the other; `step(inputs, index)` runs one."""
    parts = about["programs"][: None if upto is None else upto + 1]
    logits: list[Any] = []
    kept: dict[str, Any] = {}
    handed: dict[str, Any] = {}
    for index, part in enumerate(parts):
        out = step({IMAGES: images, **handed} if IMAGES in part["inputs"] else handed, index)
        logits.append(out[LOGITS])
        kept |= {name: rows for name, rows in out.items() if name.startswith(KEEP)}
        handed = {name.removeprefix(NEXT): rows for name, rows in out.items() if name.startswith(NEXT)}
    exits = part["name"] != "model"
    return {LOGITS: jax.numpy.stack(logits) if exits else logits[0], **kept}


def load_export(path: Any, platform: str | None = None) -> Exported:
    """Opens what `export` wrote, to run it here.

    Args:
      path: the folder.
      platform: whose programs to read; by default that of this machine.

    Raises:
      ValueError: no export there, or none for the platform.
    """
    folder = paths.resolve(path)
    about = read_about(folder)
    platform = platform or this_platform()
    lacking = [one["name"] for one in about["programs"] if platform not in one["jax"]]
    if lacking:
        there = sorted({name for one in about["programs"] for name in one["jax"]})
        raise ValueError(
            f"{path} holds no jax program for {platform}, but for {', '.join(there) or 'none'}: "
            f"export it for {platform}, too"
        )
    found = tuple(read_program(folder / one["jax"][platform]) for one in about["programs"])
    weights = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    return Exported(about, found, jax.device_put(weights))


def read_about(folder: epath.Path) -> dict[str, Any]:
    """What `model.json` of a folder says."""
    if not (folder / ABOUT).exists():
        raise ValueError(
            f"{folder} holds no export (no {ABOUT}): name the folder that `dyntoken.export` wrote"
        )
    return json.loads((folder / ABOUT).read_text())


def preprocess_of(about: Mapping[str, Any]) -> preprocessing.Preprocess:
    """The preprocessing that `model.json` describes."""
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in about["preprocess"].items()
    }
    return preprocessing.Preprocess(**fields)


def read_program(path: epath.Path) -> jax.export.Exported:
    """One `.jax` file."""
    return jax.export.deserialize(bytearray(path.read_bytes()))


def this_platform() -> str:
    """This machine's platform, as jax.export calls it."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
