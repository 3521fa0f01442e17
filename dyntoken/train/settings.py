"""The config as a checked value: every key has one reader, a wrong one is found at once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dyntoken import data, losses, mix, optim, weights
from dyntoken.registry import check_options


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`config.data`.

    Attributes:
      name: see `dyntoken.data`.
      split, eval_split: TFDS spelling, `"train[:90%]"`.
      size: pixels, one number or (height, width); None keeps the source's.
      shards: virtual shards of the data, the same on any number of devices.
      data_dir: where TFDS data lies.
      augment: see `data.AugmentOptions`; None changes nothing.
      eval: further arguments of `data.eval_batches` (`crop_pct`,
        `interpolation`; `batch` if not the training one).
      options: of the source.
      mean, std: per channel, of pixels in [0, 1]; by default the source's.
    """

    name: str
    split: Any = "train"
    eval_split: Any = "test"
    size: Any = None
    shards: int = 8
    data_dir: str | None = None
    augment: Mapping[str, Any] | None = None
    eval: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    Attributes:
      model: `name` and keywords of `create_model`; classes, image size and
        channels come from the data unless given.
      data: see `DataSettings`.
      losses: name -> {weight, options}, see `dyntoken.losses`.
      batch: rows of the global batch.
      epochs, steps: length of the run; steps > 0 wins.
      seed: of initialisation, data order and every draw.
      mix: keywords of `dyntoken.mix.mix`.
      optim: keywords of `dyntoken.optim.make`.
      ema: decay of the weight average, 0 for none.
      teacher: `name`, `weights` and keywords of `create_model`; no name, no teacher.
      init: `path` and keywords of `load_weights`; no path, a fresh start.
      resume: workdir of another run to go on from.
      log_steps: steps between two reports.
      eval_steps: steps between two evaluations; 0: see `eval_epochs`.
      eval_epochs: the same in epochs; 0: only at the end.
      checkpoint_steps: steps between two checkpoints; 0: only at the end.
      keep_checkpoints: how many of the newest stay.
      compare: the command line ends a training run with `tools.compare`.
    """

    model: Mapping[str, Any]
    data: DataSettings
    losses: Mapping[str, Mapping[str, Any]]
    batch: int
    epochs: float = 0.0
    steps: int = 0
    seed: int = 0
    mix: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ema: float = 0.0
    teacher: Mapping[str, Any] | None = None
    init: Mapping[str, Any] | None = None
    resume: str | None = None
    log_steps: int = 50
    eval_steps: int = 0
    eval_epochs: float = 0.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    compare: bool = False

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """As JSON would return it: what two runs compare."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def read(config: Mapping[str, Any]) -> Settings:
    """Checks the keys of a config.

    Args:
      config: a `ConfigDict` or nested mapping.

    Raises:
      UnknownNameError: for a key that nothing reads, with the nearest ones.
      ValueError: for a missing key or a value out of range.
    """
    given = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    given["data"] = _fill(DataSettings, given.get("data", {}), "config.data")
    settings = _fill(Settings, given, "config")
    _check_keywords("config.mix", mix.mix, settings.mix, own=("num_classes",))
    _check_keywords("config.optim", optim.make, settings.optim, own=("total_steps", "steps_per_epoch"))
    init = {k: v for k, v in (settings.init or {}).items() if k != "path"}
    _check_keywords("config.init", weights.load_weights, init, own=("return_report",), also=("path",))
    eval_own = ("split", "size", "shards", "process", "data_dir")
    _check_keywords("config.data.eval", data.eval_batches, settings.data.eval, own=eval_own)
    data.AugmentOptions.of(settings.data.augment)
    losses.parse(settings.losses)
    if not 0 <= settings.ema < 1:
        raise ValueError(f"config.ema is {settings.ema}: a decay lies in [0, 1)")
    if settings.steps <= 0 and settings.epochs <= 0:
        raise ValueError("the run has no length: set config.epochs (or config.steps) above 0")
    if settings.log_steps < 1:
        raise ValueError(f"config.log_steps is {settings.log_steps}: it must be at least 1")
    return settings


def _fill(cls: type, given: Mapping[str, Any], what: str) -> Any:
    fields = dataclasses.fields(cls)
    check_options(what, given, [field.name for field in fields])
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{what}.{missing[0]} is missing")
    return cls(**given)


def _check_keywords(
    what: str,
    fn: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    own: Sequence[str],
    also: Sequence[str] = (),
) -> None:
    """Raises for a key that `fn` does not take, or that the trainer sets itself."""
    parameters = inspect.signature(fn).parameters.items()
    known = {name for name, p in parameters if p.kind is p.KEYWORD_ONLY} - set(own)
    check_options(what, given, known | set(also))
