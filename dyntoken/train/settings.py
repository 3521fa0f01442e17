"""What a config says: every key once, checked before anything is built."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import ml_collections

from dyntoken import data, device_augment, losses, models, optim, schema, weights
from dyntoken.registry import load_plugins
from dyntoken.schema import Count, Natural, NonNegative, Positive, Rate, Section, Seed, Size, within
from dyntoken.train import sharding
from dyntoken.workdirs import DEFAULT_METRIC

MOST_STEPS = 2**31 - 1  # the optimizer counts in int32


def _of_model(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model's section; any, while it names no model.

    `create_model` says best what a dense model does not take.
    """
    if not given.get("name"):
        return {**dict.fromkeys(given, Any), **own}
    told = dict.fromkeys(models.OF_METHODS & set(given), Any)
    return {**told, **models.keywords(str(given["name"])), **own}


def _of_source(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of a data set; any of one that may not exist, which is said where it is opened."""
    sure = name in data.SOURCES or name.startswith("folder:")
    return {**({} if sure else dict.fromkeys(given, Any)), **data.source_options(name)}


# What reads the sections that are no dataclass: a key of theirs is an argument there.
MODEL = Section(lambda given, around: _of_model(given, {"name": str}))
TEACHER = Section(lambda given, around: _of_model(given, {"name": str | None, "weights": str | None}))
AUGMENT = Section(lambda given, around: schema.fields(data.AugmentOptions))
SOURCE = Section(lambda given, around: _of_source(given, str(around.get("name", ""))))
EVAL_OWN = ("split", "size", "shards", "process", "data_dir")  # of `data.eval_batches`, set by the trainer
READING = Section(lambda given, around: schema.keywords(data.eval_batches, but=EVAL_OWN))
ALSO_READING = Section(lambda given, around: schema.keywords(data.eval_batches, but=(*EVAL_OWN, "batch")))
LOSS = Section(lambda given, around: {key: Annotated[dict, _of_loss(key)] for key in given})
MIX = Section(lambda given, around: schema.keywords(device_augment.mix, but=("num_classes",)))
OPTIM = Section(lambda given, around: schema.keywords(optim.make, but=("total_steps", "steps_per_epoch")))
INIT = Section(
    lambda given, around: {
        "path": str | None,
        **schema.keywords(weights.load_weights, but=("return_report",)),
        "seed": Seed,
    }
)


def _of_loss(key: str) -> Section:
    return Section(lambda given, around: losses.keywords(key))


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
      balance: an epoch of training has every class equally often; for folders
        and sets in memory.
      eval: further arguments of `data.eval_batches` (`crop_pct`,
        `interpolation`; `batch` if not the training one).
      options: of the source.
      mean, std: per channel, of pixels in [0, 1]; by default the source's.
    """

    name: str
    split: str | Sequence[str] = "train"
    eval_split: str | Sequence[str] = "test"
    size: Size | None = None
    shards: Count = 8
    data_dir: str | None = None
    augment: Annotated[Mapping[str, Any] | None, AUGMENT] = None
    balance: bool = False
    eval: Annotated[Mapping[str, Any], READING] = dataclasses.field(default_factory=dict)
    options: Annotated[Mapping[str, Any], SOURCE] = dataclasses.field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[Positive] | None = None


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """One entry of `config.evals`; images are resized and normalised as those of `config.data`.

    Attributes:
      name: see `dyntoken.data`.
      split: TFDS spelling.
      data_dir: where TFDS data lies; None: where `config.data` has it.
      eval: arguments of `data.eval_batches` that differ from `config.data.eval`.
      options: of the source.
    """

    name: str
    split: str | Sequence[str] = "test"
    data_dir: str | None = None
    eval: Annotated[Mapping[str, Any], ALSO_READING] = dataclasses.field(default_factory=dict)
    options: Annotated[Mapping[str, Any], SOURCE] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class KeepSchedule:
    """`config.keep_schedule`; follows youweiliang/evit, `adjust_keep_rate`.

    Until `start_epoch` every token stays; then the rate falls by a cosine to
    that of the model, which holds from `end_epoch` on. It fixes shapes, so it is
    rounded to a few `levels` (see `reducers.keep.quantize_keep_rates`).

    Attributes:
      start_epoch: whole epochs at rate 1.
      end_epoch: first epoch at the model's own rate; 0: no schedule.
      levels: number of rates, the first and the last included.
    """

    start_epoch: Natural = 0
    end_epoch: Natural = 0
    levels: Annotated[int, within("[2, inf)")] = 5


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """`config.profile`: a few steps of a long run, traced into its workdir.

    Attributes:
      start: first step that is traced, from 1; let it be some steps after the
        start of a session, which is not like the others.
      steps: how many; 0: none.
    """

    start: Count = 20
    steps: Natural = 5

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.start + self.steps


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    Attributes:
      model: `name` and keywords of `create_model`; classes, image size and
        channels come from the data unless given.
      data: see `DataSettings`.
      keep_schedule: a keep rate that falls during training, see `KeepSchedule`.
      elastic: keep rates that take turns, so that one set of weights serves each of them (and those
        between): of three steps one has the largest, one the smallest, one any of them, as in the
        sandwich rule of Yu and Huang 2019, "Universally Slimmable Networks", spread over steps. ().
      losses: name -> {weight, options}, see `dyntoken.losses`.
      accumulate: slices that a device's rows are split into, forward and
        backward one after the other: the same step from less memory. Not for
        models with BatchNorm.
      shard: what each device holds only a piece of, for the same result from
        less memory: "none"; "optimizer" (its state and the weight average), as
        ZeRO-1; "params" (these too), as FSDP.
      epochs, steps: length of the run; steps > 0 wins.
      seed: of initialisation, data order and every draw.
      mix: keywords of `dyntoken.device_augment.mix`.
      optim: keywords of `dyntoken.optim.make`.
      ema: decay of the weight average, 0 for none.
      ema_warmup: the decay rises to `ema` with the steps, so that the average
        forgets the start of the run soon; False: `ema` from the first step on.
      teacher: `name`, `weights` and keywords of `create_model`; no name, no teacher. Weights
        "self": the model's own, as they are at each step.
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
      profile: which steps are traced into `WORKDIR/profile`, see `ProfileConfig`.
      tensorboard: also write `WORKDIR/tensorboard`; needs the extra of that name.
      wandb: project of Weights & Biases that the metrics also go to, "" for none; needs the extra of that name.
      curves: draw `WORKDIR/curves.png` at every evaluation, if matplotlib is there.
      compare: the command line ends a training run with `tools.demo_report`.
      plugins: modules that are imported first; they register what other keys name.
    """

    model: Annotated[Mapping[str, Any], MODEL]
    data: DataSettings
    losses: Annotated[Mapping[str, Any], LOSS]
    batch: Count
    accumulate: Count = 1
    shard: Literal[tuple(sharding.SHARDS)] = "none"
    keep_schedule: KeepSchedule | None = None
    elastic: tuple[Annotated[float, within("(0, 1]")], ...] = ()
    epochs: NonNegative = 0.0
    steps: Annotated[int, within(f"[0, {MOST_STEPS}]")] = 0
    seed: Seed = 0
    mix: Annotated[Mapping[str, Any], MIX] = dataclasses.field(default_factory=dict)
    optim: Annotated[Mapping[str, Any], OPTIM] = dataclasses.field(default_factory=dict)
    ema: Rate = 0.0
    ema_warmup: bool = True
    teacher: Annotated[Mapping[str, Any] | None, TEACHER] = None
    init: Annotated[Mapping[str, Any] | None, INIT] = None
    resume: str | None = None
    log_steps: Count = 50
    eval_steps: Natural = 0
    eval_epochs: NonNegative = 0.0
    checkpoint_steps: Natural = 0
    keep_checkpoints: Count = 2
    keep_best: Natural = 0
    best_metric: str = DEFAULT_METRIC
    rewind: Natural = 0
    evals: Mapping[str, EvalSettings] = dataclasses.field(default_factory=dict)
    profile: ProfileConfig | None = None
    tensorboard: bool = False
    wandb: str = ""
    curves: bool = True
    compare: bool = False
    plugins: Sequence[str] = ()

    @property
    def self_teaching(self) -> bool:
        """Whether the teacher runs on the model's own weights."""
        return (self.teacher or {}).get("weights") == "self"

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """As JSON would return it: what two runs compare."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def read(config: Mapping[str, Any]) -> Settings:
    """Checks the keys of a config: their names, types and ranges.

    Args:
      config: a `ConfigDict` or nested mapping.

    Raises:
      UnknownNameError: for a key that nothing reads, with the nearest ones.
      ValueError: for a missing key or a value of another type or out of range.
    """
    if isinstance(config, str):
        raise ValueError(f"config is the text {config!r}: give dyntoken.config.load({config!r})")
    plugins(config)
    settings = schema.check(Settings, config, "config")
    for label in settings.evals:  # the prefix of its metrics
        if not label or "/" in label or label == "ema":
            raise ValueError(f"config.evals has the label {label!r}: use a word without '/', not 'ema'")
    data.AugmentOptions.of(settings.data.augment)
    losses.Objective(settings.losses)
    return settings


def plugins(config: Mapping[str, Any]) -> None:
    """Imports `config.plugins`: what other keys may be depends on what these modules register.

    Raises:
      ImportError: a module that is not there, or one that it imports.
      ValueError: no names of modules.
    """
    load_plugins(schema.check(Sequence[str], config.get("plugins") or (), "config.plugins"))


def override(config: ml_collections.ConfigDict, changes: Sequence[tuple[str, str]]) -> None:
    """Sets keys of a recipe as a command line spells them.

    What the recipe computes from a key (the learning rate from the batch) follows it.

    Args:
      config: of a recipe; changed in place.
      changes: full name without `config.` and text, `("optim.lr", "1e-3")`.

    Raises:
      UnknownNameError, ValueError: as `read`.
    """
    plain = config.to_dict()
    for name, text in changes:
        *parents, last = name.split(".")
        node = plain
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = schema.Text(text)
    settings = read(plain)
    with config.unlocked(), config.ignore_type():
        for name, _ in changes:
            *parents, last = name.split(".")
            node, value = config, settings
            for parent in parents:
                if node.get(parent) is None:
                    node[parent] = ml_collections.ConfigDict()
                node, value = node[parent], _of(value, parent)
            node[last] = _of(value, last)


def _of(section: Any, name: str) -> Any:
    return section[name] if isinstance(section, Mapping) else getattr(section, name)


def check_lengths(settings: Settings, *, total: int, eval_every: int) -> None:
    """Raises ValueError for what a run of `total` steps never does, and for a run without length."""
    if settings.steps <= 0 and settings.epochs <= 0:
        raise ValueError("the run has no length: set config.epochs (or config.steps) above 0")
    if total > MOST_STEPS:
        raise ValueError(f"the run has {total} steps, more than {MOST_STEPS}: lower config.epochs")
    profile = settings.profile
    if profile is not None and profile.steps and profile.start > total:
        raise ValueError(f"config.profile.start is {profile.start}, but the run has {total} steps")
    if settings.keep_best and not eval_every:
        raise ValueError(
            f"config.keep_best is {settings.keep_best}, but the run evaluates only at its end: set "
            "config.eval_epochs or config.eval_steps"
        )
