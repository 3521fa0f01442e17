"""`Predictor`: a model as a function from pictures to arrays, for folders, notebooks and Ray's workers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import device_augment, exporting, paths, preprocessing, runs
from dyntoken.data.decode import decode, read_image
from dyntoken.data.errors import DataError
from dyntoken.data.resample import resize_centre_one
from dyntoken.eval.exits import ALWAYS
from dyntoken.eval.runner import Runner
from dyntoken.models import create_model
from dyntoken.preprocessing import Preprocess
from dyntoken.registry import load_plugins
from dyntoken.types import Output
from dyntoken.weights import class_names, fetch, load_pretrained, load_whole, prepared

Columns = dict[str, np.ndarray]
ADDRESSES = ("hf:", "https:", "pretrained:")
COLUMNS = ("image", "bytes", "path")  # of a table of pictures, the first that it has is read
READERS = min(8, os.cpu_count() or 1)  # threads that decode: each holds a whole picture


@dataclasses.dataclass(eq=False)
class Predictor:
    """Pictures to logits, classes and features, in batches of one size: one compilation.

        predictor = dyntoken.Predictor("runs/mine")
        found = predictor(["cat.jpg", "dog.jpg"])      # found["class"], found["top_prob"], ...

    What is built from names and paths is pickled as such, a few hundred bytes: another process opens the
    model when it predicts first. Class and keywords are what Ray's `map_batches` takes.

    Attributes:
      source: workdir of a run; folder of an export; weights, as `load_pretrained` takes them or, with
        `model`, as `load_weights` does; or a model, then with its `variables`.
      model, options: name and keywords of `create_model` for weights, or keywords of `load_pretrained` alone.
      step, prefer: as in `load_run`.
      preprocess: replaces the run's, or of weights the default (`dyntoken.preprocess`), which is ImageNet's.
      class_names: likewise; without any they are "class 0", "class 1", ...
      keep: other counts of tokens for the same weights, see `create_model`.
      thresholds: of a model with exits, `[E]` or all but the last one's: images leave early
        (`eval.runner.Runner`). None takes its last exit.
      rule: of the thresholds, see `eval.exits.RULES`.
      batch: images at a time on the device; a shorter batch is padded.
      top: number of classes in the columns `top_...`.
      features: add the column `pooled`.
      tokens: add the final `tokens` with `place` and `carrier`.
      on_error: what becomes of a picture that cannot be read: "mark" gives it a row that says so, "raise" raises.
      plugins: modules to import before the model is built.
    """

    source: Any
    variables: Any = None
    _: dataclasses.KW_ONLY
    model: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int | str = "newest"
    prefer: str = "ema"
    preprocess: Preprocess | None = None
    class_names: Sequence[str] | None = None
    keep: Any = None
    thresholds: Sequence[float] | None = None
    rule: str = "confidence"
    batch: int = 32
    top: int = 5
    features: bool = False
    tokens: bool = False
    on_error: str = "mark"
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.on_error not in ("mark", "raise"):
            raise ValueError(f"on_error={self.on_error!r}: give 'mark' or 'raise'")
        if self.batch < 1 or self.top < 1:
            raise ValueError(f"batch={self.batch} and top={self.top} must be at least 1")
        if self.thresholds is not None and (self.features or self.tokens):
            raise ValueError("an image that leaves early has logits alone: features need thresholds=None")

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "opened"}
        if self.variables is not None:
            state["variables"] = jax.tree.map(np.asarray, self.variables)
        return state

    @functools.cached_property
    def opened(self) -> Opened:
        """Model, weights and preprocessing; read on first use."""
        load_plugins(",".join(self.plugins))
        model, variables, how, names, origin = self._read_source()
        if self.keep is not None:
            if not model.sites():
                raise ValueError(f"keep={self.keep}: {model.arch} is dense here, it has no tokens to reduce")
            model = model.clone(keep=self.keep)
            model.validate()
        how = self.preprocess or how or preprocessing.preprocess(model)
        names = tuple(names if self.class_names is None else self.class_names)
        if names and len(names) != model.num_classes:
            raise ValueError(f"{len(names)} class names for a model of {model.num_classes} classes")
        names = names or tuple(f"class {number}" for number in range(model.num_classes))
        return Opened(model, variables, how, names, self._program(model, variables, how), origin)

    def _read_source(self) -> tuple[Any, Any, Preprocess | None, Sequence[str], str]:
        """Model, variables, preprocessing, class names and where they are from."""
        if self.variables is not None:
            return self.source, self.variables, None, (), "variables"
        if self.model is not None:
            model: Any = create_model(self.model, **self.options)
            variables, report = load_whole(model, self.source, step=self.step, prefer=self.prefer)
            return (
                prepared(model, self.source, self.step),
                variables,
                None,
                self._names(model),
                report.origin,
            )
        if not isinstance(self.source, Mapping):
            folder = paths.resolve(self.source)
            if (folder / exporting.folder.ABOUT).exists():
                return self._read_export()
            weights = (folder.is_dir() and fetch.in_folder(folder)) or folder
            if weights.is_dir() or not _is_weights(self.source, weights):
                run = runs.load_run(self.source, step=self.step, prefer=self.prefer)
                origin = f"{self.source}, step {run.step}"
                return run.model, run.variables, run.preprocess, run.class_names, origin
        options: dict[str, Any] = {"step": self.step, "prefer": self.prefer, "return_report": True}
        model, variables, report = load_pretrained(self.source, **options, **self.options)
        return model, variables, None, self._names(model), report.origin

    def _names(self, model: Any) -> Sequence[str]:
        """The class names that weights tell, if the model has these classes."""
        names = class_names(self.source)
        return names if len(names) == model.num_classes else ()

    def _read_export(self) -> tuple[Any, Any, Preprocess, Sequence[str], str]:
        if self.features or self.tokens or self.keep is not None or self.thresholds is not None:
            raise ValueError(
                f"{self.source}: an exported program has logits alone, with its own counts: leave features, "
                "tokens, keep and thresholds out, or name the run or weights"
            )
        found = exporting.load_export(self.source)
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.about["preprocess"].items()
        }
        return (
            _OfExport(found),
            found.weights,
            Preprocess(**told),
            found.about["class_names"],
            str(self.source),
        )

    def _program(self, model: Any, variables: Any, how: Preprocess) -> Callable[[np.ndarray], Any]:
        """From a batch, which may be short, to arrays, which may still be on their way and of a full one."""

        def normalised(images: jax.Array) -> jax.Array:
            if images.dtype != jnp.uint8 or getattr(model, "normalises", False):
                return images
            return device_augment.normalize(images, how.mean, how.std)

        if self.thresholds is not None:
            count, limits = len(getattr(model, "exits", ())), tuple(self.thresholds)
            limits = (*limits, ALWAYS) if len(limits) == count - 1 else limits
            devices = jax.local_devices()[:1]
            options = {"rule": self.rule, "batch": self.batch, "prepare": normalised, "devices": devices}
            runner = Runner(model, variables, limits, **options)

            def leave(images: np.ndarray) -> Any:
                found = runner(images)
                return {"logits": found.logits, "exit": found.exit}

            return leave

        @jax.jit
        def forward(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            if not (self.features or self.tokens or not model.num_classes):
                logits = model.apply(variables, normalised(images)).logits
                return {"logits": (logits[-1] if logits.ndim == 3 else logits).astype(jnp.float32)}
            logits = bool(model.num_classes)
            found = model.apply(variables, normalised(images), method="features", logits=logits)
            found = found[-1] if isinstance(found, tuple) else found
            columns = {"logits": found.logits.astype(jnp.float32)} if logits else {}
            if self.features or not logits:
                columns["pooled"] = found.pooled
            if self.tokens:
                tokens = found.tokens
                columns |= {
                    "tokens": tokens.x.astype(jnp.float32),
                    "place": tokens.place,
                    "carrier": tokens.carrier,
                }
            return columns

        variables = jax.device_put(variables)

        def run(images: np.ndarray) -> dict[str, jax.Array]:
            padded = np.zeros((self.batch, *images.shape[1:]), images.dtype)
            padded[: len(images)] = images
            return forward(variables, padded)

        return run

    def __call__(self, batch: Any) -> Columns:
        """Predicts.

        Args:
          batch: uint8 `[B, H, W, C]`, of any size; float `[B, H, W, C]`, which the model takes as it
            is: normalised, of its size; a sequence of pictures: uint8 or float arrays `[H, W, C]`,
            encoded ones (`bytes`), or paths; or a mapping of columns (Ray's batches), of which
            "image", "bytes" or "path" is read and the others are passed on.

        Returns:
          Columns with a row per picture: `logits` and `probs` `[B, classes]`, `label` (-1 for a picture that
          cannot be read), `class`, `top_label`, `top_class` and `top_prob` `[B, top]`, the surest
          first, `error` ("" for none); with thresholds `exit`; with `features` `pooled` `[B, C]`; with
          `tokens` `tokens [B, prefix + n, C]`, `place [B, n]`, `carrier [B, N0]` (see `dyntoken.Tokens`).
          A picture that cannot be read has NaN in all float columns.

        Raises:
          ValueError: a batch that is none of these; with on_error="raise", a picture that cannot be read.
        """
        others: Columns = {}
        if isinstance(batch, Mapping):
            name = next((name for name in COLUMNS if name in batch), None)
            if name is None:
                raise ValueError(
                    f"a table with the columns {', '.join(batch)}: one must be {' or '.join(COLUMNS)}"
                )
            others = {key: value for key, value in batch.items() if key != name or name == "path"}
            batch = batch[name]
        how, pictures = self.opened.preprocess, _pictures(batch)
        if isinstance(pictures, np.ndarray) and len(pictures):
            _check(pictures[0], how)  # what is wrong with an array is wrong with all its rows
        chunks = [pictures[at : at + self.batch] for at in range(0, len(pictures), self.batch)]
        parts: list[Any] = []
        errors: list[str] = []
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            ahead = pool.map(self._read, chunks[0]) if chunks else iter(())
            for number in range(len(chunks)):
                images, wrong = zip(*ahead, strict=True)
                if number + 1 < len(chunks):  # is read while the device works
                    ahead = pool.map(self._read, chunks[number + 1])
                if any(wrong) and self.on_error == "raise":
                    at = next(row for row, error in enumerate(wrong) if error)
                    raise ValueError(f"picture {len(errors) + at}: {wrong[at]}")
                parts.append(self._launch(images))
                parts[-2:-1] = [_on_host(found, len(chunks[number - 1])) for found in parts[-2:-1]]
                errors.extend(wrong)
        if parts:
            parts[-1] = _on_host(parts[-1], len(chunks[-1]))
        return {**others, **self._columns(parts, [len(chunk) for chunk in chunks], errors)}

    def _read(self, picture: Any) -> tuple[np.ndarray | None, str]:
        """A picture of the model's size, uint8 or float, or None and why not."""
        how = self.opened.preprocess
        try:
            if isinstance(picture, bytes):
                picture = decode(picture, how.channels)
            elif isinstance(picture, (str, os.PathLike)):
                picture = read_image(picture, how.channels)
            picture = np.asarray(picture)
            _check(picture, how)
            if picture.dtype != np.uint8:
                return picture.astype(np.float32), ""
            if picture.shape[:2] != how.size:
                picture = resize_centre_one(
                    picture, how.size, how.crop_pct, how.interpolation, squash=how.squash
                )
            return picture, ""
        except (DataError, OSError) as error:
            return None, getattr(error, "strerror", None) or str(error)

    def _launch(self, images: Sequence[np.ndarray | None]) -> Any:
        """What the model says of some pictures, a batch at most; None where there is none to look at."""
        good = [image for image in images if image is not None]
        if not good:
            return None
        if len({image.dtype for image in good}) > 1:
            how = self.opened.preprocess
            images = [i if i is None or i.dtype != np.uint8 else np.asarray(how(i)) for i in images]
            good = [image for image in images if image is not None]
        empty = np.zeros_like(good[0])
        return self.opened.program(np.stack([empty if image is None else image for image in images]))

    def _columns(self, parts: Sequence[Any], counts: Sequence[int], errors: Sequence[str]) -> Columns:
        """The results of some batches one after the other; of one without any picture they are None."""
        like = next((found for found in parts if found is not None), None) or self._shapes()
        wrong = np.array([bool(error) for error in errors], bool)
        columns: Columns = {}
        for name, one in like.items():
            column = np.empty((len(errors), *one.shape[1:]), one.dtype)
            for found, count, end in zip(parts, counts, np.cumsum(counts), strict=True):
                if found is not None:
                    column[end - count : end] = found[name]
            column[wrong] = np.nan if column.dtype.kind == "f" else -1
            columns[name] = column
        if "logits" in columns:
            columns |= _classes(columns["logits"], wrong, np.array(self.opened.class_names), self.top)
        return {**columns, "error": np.array(errors, np.str_)}

    def _shapes(self) -> dict[str, Any]:
        """Shapes of a batch's results, for one that holds no picture; compiles nothing."""
        model, how = self.opened.model, self.opened.preprocess
        if not (self.features or self.tokens) and model.num_classes:
            exit_ = {} if self.thresholds is None else {"exit": jax.ShapeDtypeStruct((1,), np.int64)}
            return {"logits": jax.ShapeDtypeStruct((1, model.num_classes), np.float32), **exit_}
        return jax.eval_shape(lambda: self.opened.program(np.zeros((1, *how.size, how.channels), np.uint8)))


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a `Predictor` works with: as `runs.Run`, the compiled program, and where the weights are from."""

    model: Any
    variables: Any
    preprocess: Preprocess
    class_names: tuple[str, ...]
    program: Callable[[np.ndarray], Any]
    origin: str


class _OfExport:
    """An exported model with the face of one of ours."""

    def __init__(self, found: exporting.Exported):
        self.found, self.arch = found, found.about["model"]
        self.normalises: bool = found.about["normalise"]
        self.num_classes: int = found.about["programs"][-1]["outputs"]["logits"]["shape"][-1]

    def apply(self, weights: Any, images: jax.Array) -> Output:
        return Output(dataclasses.replace(self.found, weights=weights)(images)["logits"])


def _is_weights(source: Any, path: Any) -> bool:
    """Whether a source is a file, or an address that `load_pretrained` knows."""
    return path.is_file() or str(source).startswith(ADDRESSES)


def _pictures(batch: Any) -> Sequence[Any]:
    """The pictures of a batch.

    Raises:
      ValueError: it is none.
    """
    if isinstance(batch, (bytes, str, os.PathLike)):
        raise ValueError("one picture: give a list of them, as in [picture]")
    if hasattr(batch, "__array__"):
        batch = np.asarray(batch)
        if batch.dtype.kind in "uif" and batch.ndim != 4:
            raise ValueError(f"give a batch of images [B, H, W, C], got {batch.dtype} {batch.shape}")
        return batch if batch.dtype.kind in "uif" else batch.tolist()
    return list(batch)


def _check(image: np.ndarray, how: Preprocess) -> None:
    """Raises `DataError` for an array that is no image for the model."""
    if image.ndim != 3 or image.shape[-1] != how.channels:
        raise DataError(f"an image is [H, W, {how.channels}], got {image.dtype} {image.shape}")
    if image.dtype != np.uint8 and (image.dtype.kind != "f" or image.shape[:2] != how.size):
        size = " x ".join(map(str, how.size))
        raise DataError(
            f"{image.dtype} {image.shape}: give uint8 of any size, or float that is normalised and of {size} pixels"
        )


def _on_host(found: Any, count: int) -> Columns | None:
    """The first rows of a batch's results."""
    return found and {name: np.asarray(column)[:count] for name, column in found.items()}


def _classes(logits: np.ndarray, wrong: np.ndarray, names: np.ndarray, top: int) -> Columns:
    """Probabilities and the surest classes of logits `[B, K]`; `wrong [B]` rows have none."""
    with np.errstate(invalid="ignore"):  # logits that are no numbers
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :top]
    found = np.where(wrong[:, None], "", names[best])
    best_shares = np.take_along_axis(shares, best, axis=-1)
    best = np.where(wrong[:, None], -1, best)
    return {
        "probs": shares,
        "label": best[:, 0],
        "class": found[:, 0],
        "top_label": best,
        "top_class": found,
        "top_prob": best_shares,
    }


def predict(model: Any, variables: Any, images: Any, **options: Any) -> Columns:
    """Pictures to classes and probabilities, for people who look: a `Predictor` of this model, called once.

    Args:
      model, variables: from `create_model` or `load_pretrained`.
      images: see `Predictor.__call__`.
      **options: fields of `Predictor`.
    """
    return Predictor(model, variables, **options)(images)
