"""What a config says: every key once, checked before anything is built."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken import data, losses, mix, optim, weights
from dyntoken.registry import UnknownNameError, load_plugins, suggest
from dyntoken.train import mesh as meshes
from dyntoken.train.evalsets import EvalSettings, read_evals
from dyntoken.train.fields import check_keywords, fill
from dyntoken.train.shrink import Shrink
from dyntoken.train.tracing import Window
from dyntoken.weights import workdirs


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
      keep_schedule: a keep rate that falls during training, see `shrink.Shrink`.
      losses: name -> {weight, options}, see `dyntoken.losses`.
      batch: rows of the global batch.
      accumulate: slices that a device's rows are split into, forward and
        backward one after the other: the same step from less memory. Not for
        models with BatchNorm.
      shard: what each device holds only a piece of, for the same result from
        less memory: "none"; "optimizer" (its state and the weight average), as
        ZeRO-1; "params" (these too), as FSDP.
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
      keep_best: how many of the best stay besides, by `best_metric`; every
        evaluation then saves. 0: none.
      best_metric: of an evaluation, `"top1"`, `"ema/top1"`, `"LABEL/loss"`, ...
      rewind: how often a run may go back to its last checkpoint from a loss
        that is not finite, and on with other images; 0: it ends there.
      evals: label -> `EvalSettings`: sets to evaluate on besides, their metrics
        are `LABEL/top1`, ...
      profile: `start` and `steps`: which steps are traced into `WORKDIR/profile`.
      tensorboard: also write `WORKDIR/tensorboard`; needs the extra of that name.
      curves: draw `WORKDIR/curves.png` at every evaluation, if matplotlib is there.
      compare: the command line ends a training run with `tools.compare`.
      plugins: modules that are imported first; they register what other keys name.
    """

    model: Mapping[str, Any]
    data: DataSettings
    losses: Mapping[str, Mapping[str, Any]]
    batch: int
    accumulate: int = 1
    shard: str = "none"
    keep_schedule: Mapping[str, int] | None = None
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
    keep_best: int = 0
    best_metric: str = workdirs.DEFAULT_METRIC
    rewind: int = 0
    evals: Mapping[str, EvalSettings] = dataclasses.field(default_factory=dict)
    profile: Mapping[str, int] | None = None
    tensorboard: bool = False
    curves: bool = True
    compare: bool = False
    plugins: Sequence[str] = ()

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
    given["plugins"] = load_plugins(given.get("plugins") or ())
    given["data"] = fill(DataSettings, given.get("data", {}), "config.data")
    given["evals"] = read_evals(given.get("evals"))
    settings = fill(Settings, given, "config")
    check_keywords("config.mix", mix.mix, settings.mix, own=("num_classes",))
    check_keywords("config.optim", optim.make, settings.optim, own=("total_steps", "steps_per_epoch"))
    init = {k: v for k, v in (settings.init or {}).items() if k != "path"}
    check_keywords("config.init", weights.load_weights, init, own=("return_report",), also=("path",))
    eval_own = ("split", "size", "shards", "process", "data_dir")
    check_keywords("config.data.eval", data.eval_batches, settings.data.eval, own=eval_own)
    data.AugmentOptions.of(settings.data.augment)
    losses.parse(settings.losses)
    if not 0 <= settings.ema < 1:
        raise ValueError(f"config.ema is {settings.ema}: a decay lies in [0, 1)")
    if settings.steps <= 0 and settings.epochs <= 0:
        raise ValueError("the run has no length: set config.epochs (or config.steps) above 0")
    for name in ("log_steps", "accumulate"):
        if getattr(settings, name) < 1:
            raise ValueError(f"config.{name} is {getattr(settings, name)}: it must be at least 1")
    if settings.shard not in meshes.SHARDS:
        raise UnknownNameError(
            f"config.shard is {settings.shard!r}: {suggest(settings.shard, meshes.SHARDS)}"
        )
    for name in ("keep_best", "rewind"):
        if getattr(settings, name) < 0:
            raise ValueError(f"config.{name} is {getattr(settings, name)}: it must be 0 (off) or more")
    Window.of(settings.profile)
    Shrink.of(settings.keep_schedule)
    return settings


def check_lengths(settings: Settings, *, total: int, eval_every: int) -> None:
    """Raises ValueError for what a run of `total` steps never does."""
    window = Window.of(settings.profile)
    if window is not None and window.start > total:
        raise ValueError(f"config.profile.start is {window.start}, but the run has {total} steps")
    if settings.keep_best and not eval_every:
        raise ValueError(
            f"config.keep_best is {settings.keep_best}, but the run evaluates only at its end: set "
            "config.eval_epochs or config.eval_steps"
        )
