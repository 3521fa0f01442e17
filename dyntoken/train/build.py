"""From a config to a checked run: every section goes into exactly one function.

Nothing here reads an image or a weight file, so that a run is built in seconds and a
wrong key is found before anything else happens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dyntoken import data, device_augment, losses, models, optim, schedules
from dyntoken.data.requests import check_eval_batch, check_size, check_topology
from dyntoken.eval import answers
from dyntoken.eval.logits import make_eval_step
from dyntoken.train import phases, sharding
from dyntoken.train.eval_datasets import MAIN, EvalSet, check_metric, open_eval_sets
from dyntoken.train.settings import MOST_STEPS, Settings, check_lengths, read
from dyntoken.train.state import TrainState, create_state, init_variables
from dyntoken.train.step import gradient, refuse_batch_norm, train_step, update

Tree = Any
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run is made of, except weights and images.

    Attributes:
      settings: the checked config.
      mesh: devices.
      model, teacher: modules; the teacher may be None.
      info: of the data set.
      eval_sets: what is evaluated, by label; `""` is the split of `config.data`.
      shape: `(H, W, C)` of the batches.
      steps_per_epoch, total_steps, eval_every: in steps.
      phases: what is trained from which step on; several if the keep rate falls or takes turns.
      objective: the losses.
      tx, lr_fn: the optimizer and its learning rate.
    """

    settings: Settings
    mesh: Mesh
    model: nn.Module
    teacher: nn.Module | None
    info: data.DataInfo
    eval_sets: Mapping[str, EvalSet]
    shape: tuple[int, int, int]
    steps_per_epoch: int
    total_steps: int
    eval_every: int
    phases: Sequence[phases.Phase]
    objective: losses.Objective
    tx: optax.GradientTransformation
    lr_fn: Callable[[Any], Any]

    def phase_at(self, done: int) -> int:
        """Number of the phase of the step that follows `done` steps."""
        taking_turns = bool(self.settings.elastic)
        return phases.phase_at(self.phases, done, seed=self.settings.seed if taking_turns else None)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and places of the state."""
        make = functools.partial(create_state, tx=self.tx, ema=self.settings.ema > 0)
        state = jax.eval_shape(make, self.abstract(self.model))
        return sharding.abstract(
            state, self.mesh, sharding.state_sharding(state, self.mesh, self.settings.shard)
        )

    @property
    def abstract_teacher(self) -> Tree:
        """Shapes and types of the teacher's variables, `{}` where there are none of its own."""
        without = self.teacher is None or self.settings.self_teaching
        return sharding.abstract({} if without else self.abstract(self.teacher), self.mesh)

    def abstract(self, model: nn.Module) -> Tree:
        """Shapes and types of a model's variables."""
        return jax.eval_shape(lambda: init_variables(model, self.shape, self.settings.seed))

    def new_state(self, variables: Tree | None = None) -> TrainState:
        """The state before the first step, of given or of fresh variables."""

        def create(given):
            fresh = init_variables(self.model, self.shape, self.settings.seed) if given is None else given
            return create_state(fresh, self.tx, ema=self.settings.ema > 0)

        state = jax.jit(create)(variables)
        layout = sharding.state_sharding(state, self.mesh, self.settings.shard)
        return sharding.replicate(state, self.mesh, layout)

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """The compiled step, `(state, teacher_variables, batch)`; it consumes the state."""
        return self.train_step_for(self.model)

    def train_step_for(self, model: nn.Module) -> jax.stages.Compiled:
        """The same for the model of a phase."""
        settings = self.settings
        first = {
            "model": model,
            "augment": self.augment,
            "seed": settings.seed,
            "teacher": self.teacher,
            "self_teaching": settings.self_teaching,
            "accumulate": settings.accumulate,
        }
        second = {"objective": self.objective, "tx": self.tx}
        second |= {"ema": settings.ema, "ema_warmup": settings.ema_warmup}
        if settings.shard == "none":
            step = functools.partial(train_step, **first, **second)
            step = sharding.data_parallel(step, self.mesh, replicated=2, donate=(0,))
        else:
            step = sharding.split_update(
                functools.partial(gradient, objective=self.objective, **first),
                functools.partial(update, **second),
                self.mesh,
                jax.tree.map(lambda x: x.sharding, self.abstract_state),
            )
        batch = sharding.abstract_batch(self.mesh, settings.batch, self.shape)
        return step.lower(self.abstract_state, self.abstract_teacher, batch).compile()

    @property
    def eval_step(self) -> jax.stages.Compiled:
        """The compiled evaluation step of the main set, `(variables, batch) -> sums`."""
        return self.eval_step_for(MAIN)

    def eval_step_for(self, label: str, *, rows: bool = False) -> jax.stages.Compiled:
        """The evaluation step of a set; sets whose batches look alike share one.

        Args:
          rows: it also returns what it answers to each image, see `eval.answers`.
        """
        labels = self.info.num_classes if self.eval_sets[label].info.several_labels else 0
        if (labels, rows) not in self._eval_steps:
            step = make_eval_step(self.model, prepare=self.prepare, rows=answers.rows if rows else None)
            step = sharding.data_parallel(step, self.mesh, replicated=1, rows=rows)
            batch = sharding.abstract_batch(self.mesh, self.eval_batch, self.shape, labels=labels)
            del batch["id"]
            variables = sharding.abstract(self.abstract_state.variables, self.mesh)
            self._eval_steps[labels, rows] = step.lower(variables, batch).compile()
        return self._eval_steps[labels, rows]

    @functools.cached_property
    def _eval_steps(self) -> dict[tuple[int, bool], jax.stages.Compiled]:
        return {}

    @property
    def eval_batch(self) -> int:
        """Rows of a global evaluation batch."""
        return self.settings.data.eval.get("batch", self.settings.batch)

    def prepare(self, images: jax.Array) -> jax.Array:
        """uint8 -> normalised float32, `[B, H, W, C]`."""
        return device_augment.normalize(images, *self.normalization)

    @property
    def normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation per channel, of pixels in [0, 1]."""
        chosen, info = self.settings.data, self.info
        return (
            info.mean if chosen.mean is None else chosen.mean,
            info.std if chosen.std is None else chosen.std,
        )

    def augment(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Normalises, erases and mixes; see `step.gradient`."""
        classes = self.info.num_classes
        return device_augment.mix(
            key, self.prepare(images), labels, ids, num_classes=classes, **self.settings.mix
        )

    def train_batches(
        self, start_step: int, *, skipped: int = 0, rewinds: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's training batches from a step on, with the rows' global positions.

        Args:
          start_step: number of updates done.
          skipped: batches that rewinds have left out so far.
          rewinds: how many there were; each moves the positions on by a batch,
            and so changes every draw that they key.
        """
        chosen = self.settings.data
        batches = data.train_batches(
            chosen.name,
            split=chosen.split,
            batch=self.settings.batch,
            seed=self.settings.seed,
            start_step=start_step + skipped,
            augment=chosen.augment,
            balance=chosen.balance,
            data_dir=chosen.data_dir,
            **chosen.options,
            **self._reading(),
        )
        rows = self.settings.batch // jax.process_count()
        first = rows * jax.process_index() + rewinds * self.settings.batch
        ids = np.arange(rows, dtype=np.int32) + np.int32(first)
        return ({**batch, "id": ids} for batch in batches)

    def eval_batches(self, label: str = MAIN, *, named: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of one pass over an evaluation set; `named`: see `data.eval_batches`."""
        how = self._reading() | ({"named": True} if named else {})
        return data.eval_batches(batch=self.eval_batch, **how, **self.eval_sets[label].arguments)

    def _reading(self) -> dict[str, Any]:
        return {
            "size": self.shape[:2],
            "shards": self.settings.data.shards,
            "process": (jax.process_index(), jax.process_count()),
        }

    @property
    def state_bytes(self) -> int:
        """What one checkpoint holds."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract_state))

    @property
    def held_bytes(self) -> int:
        """What each device holds of the state between two steps."""
        leaves = jax.tree.leaves(self.abstract_state)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be the same on every host; where the data lie may differ."""
        facts = {f"config.{name}": value for name, value in flat(self.settings.plain).items()}
        facts.pop("config.data.data_dir", None)
        for label, one in self.eval_sets.items():
            of = f" of {label}" if label else ""
            facts |= {f"the size of split {name!r}{of}": size for name, size in one.info.splits.items()}
            facts.pop(f"config.evals.{label}.data_dir", None)
        names = zlib.crc32("\n".join(self.info.class_names).encode())
        return facts | {
            "the number of classes": self.info.num_classes,
            "the checksum of the class names": names,
        }

    @property
    def summary(self) -> str:
        """One line: the model with its size and precision, and the data."""
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract(self.model)["params"]))
        size, info = " x ".join(map(str, self.shape)), self.info
        given = self.settings.plain["model"]
        return (
            f"model: {given['name']}, {count / 1e6:.2f} M parameters, {given.get('dtype') or 'float32'}; "
            f"data: {info.name}, {info.num_classes} classes, {size} pixels"
        )

    @property
    def warning(self) -> str | None:
        """One line where the run is too short to learn much."""
        given = self.settings.optim
        if given.get("name", "adamw") != "adamw":
            return None
        warm = given.get("warmup_steps")
        warm = round(given.get("warmup_epochs", 0) * self.steps_per_epoch) if warm is None else warm
        return schedules.step_warning(self.lr_fn, self.total_steps, warm)

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint keeps so that it can be opened without the data, see `weights.runs`."""
        info, chosen, shape = self.info, self.settings.data, self.shape
        native = info.image_shape is not None and tuple(info.image_shape[:2]) == tuple(shape[:2])
        reading = {key: chosen.eval[key] for key in ("crop_pct", "interpolation") if key in chosen.eval}
        facts = {"num_classes": info.num_classes, "img_size": list(shape[:2]), "in_chans": shape[2]}
        given = {k: v for k, v in self.settings.plain["model"].items() if k not in facts or v is not None}
        return {
            "class_names": list(info.class_names),
            "image_shape": list(shape),
            "mean": [float(x) for x in self.normalization[0]],
            "std": [float(x) for x in self.normalization[1]],
            **reading,
            **({"crop_pct": 1.0} if native else {}),  # such images pass through untouched
            "model": {**facts, **given},
        }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, node in tree.items() for k, v in flat(node, f"{prefix}.{key}".strip(".")).items()}


def build(
    config: Mapping[str, Any] | Settings,
    *,
    devices: Sequence[jax.Device] | None = None,
    training: bool = True,
) -> Run:
    """A run from a config; reads neither images nor weights.

    Args:
      config: see `Settings`.
      devices: to run on, by default all.
      training: False for a run that evaluates: how long the run is, and what does
        not fit into it, means nothing then.

    Raises:
      UnknownNameError: for anything that has no such name, with the nearest.
      ValueError: for values that do not fit together.
    """
    settings = config if isinstance(config, Settings) else read(config)
    mesh = sharding.data_mesh(devices)
    mixes = max(settings.mix.get("mixup", 1), settings.mix.get("cutmix", 1)) > 0
    unit = sharding.check_batch(
        settings.batch,
        mesh,
        multiple=2 if mixes else 1,
        slices=settings.accumulate,
        shards=settings.data.shards,
    )
    chosen = settings.data
    sharding.check_batch(chosen.eval.get("batch", settings.batch), mesh)
    process = jax.process_index(), jax.process_count()
    check_topology(settings.batch, chosen.shards, process)
    check_eval_batch(chosen.eval.get("batch", settings.batch), process)
    info = data.info(chosen.name, chosen.data_dir, **chosen.options)
    eval_sets = open_eval_sets(chosen, info, settings.evals)
    check_metric(settings.best_metric, eval_sets, ema=settings.ema > 0)
    eval_every, per_epoch, total = 0, 1, MOST_STEPS  # nothing is too long for that
    if training:
        per_epoch = data.steps_per_epoch(
            chosen.name, chosen.split, settings.batch, chosen.data_dir, multiple=unit, **chosen.options
        )
        total = settings.steps if settings.steps > 0 else max(1, round(settings.epochs * per_epoch))
        eval_every = settings.eval_steps or round(settings.eval_epochs * per_epoch)
        check_lengths(settings, total=total, eval_every=eval_every)
    shape = (*check_size(chosen.size, info.image_shape), info.channels)
    model = _make_model(settings.model, info, shape, "config.model")
    schedule = settings.keep_schedule if training else None
    parts = phases.falling(model, schedule, steps_per_epoch=per_epoch, total_steps=total)
    if training and settings.elastic:
        if len(parts) > 1:
            raise ValueError(
                "config.elastic and config.keep_schedule both change the keep rate: give one of both"
            )
        parts = phases.elastic(model, settings.elastic)
    objective = losses.Objective(settings.losses)
    learns = any(site.reducer(parent=None).learns for site in model.sites())
    objective.check(len(model.exits), learns=learns or not training)
    teacher = _make_teacher(settings, objective, info, shape)
    variables = jax.eval_shape(lambda: init_variables(model, shape, settings.seed))
    if settings.self_teaching and teacher is not None:
        theirs = jax.eval_shape(lambda: init_variables(teacher, shape, settings.seed))
        if jax.tree.map(_shape, theirs) != jax.tree.map(_shape, variables):
            raise ValueError(
                "config.teacher.weights is 'self', but the teacher's parameters are not those of config.model: "
                "name the same model, with other options of its method alone"
            )
    refuse_batch_norm(model, variables, settings.accumulate)
    tx, lr_fn = optim.make(
        variables["params"], total_steps=total, steps_per_epoch=per_epoch, **settings.optim
    )
    return Run(
        settings=settings,
        mesh=mesh,
        model=model,
        teacher=teacher,
        info=info,
        eval_sets=eval_sets,
        shape=shape,
        steps_per_epoch=per_epoch,
        total_steps=total,
        eval_every=eval_every,
        phases=parts,
        objective=objective,
        tx=tx,
        lr_fn=lr_fn,
    )


def _shape(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


def _make_model(
    section: Mapping[str, Any], info: data.DataInfo, shape: tuple[int, int, int], what: str
) -> nn.Module:
    """The model of a section, `what`, of the config; classes, image size and channels come from the data."""
    options = dict(section)
    if not options.get("name"):
        raise ValueError(f"{what}.name is missing: see dyntoken.list_models()")
    size = shape[0] if shape[0] == shape[1] else shape[:2]
    facts = {"num_classes": info.num_classes, "img_size": size, "in_chans": shape[2]}
    try:
        model = models.create_model(options.pop("name"), **{**facts, **options})
    except ValueError as error:
        raise type(error)(f"{what}: {error}") from error
    if model.input_shape != shape or model.num_classes != info.num_classes:
        raise ValueError(
            f"{what} takes images {model.input_shape} of {model.num_classes} classes, but the data set "
            f"{info.name!r} gives {shape} of {info.num_classes}: leave img_size, in_chans and num_classes "
            "to the data"
        )
    return model


def _make_teacher(
    settings: Settings, objective: losses.Objective, info: data.DataInfo, shape: tuple[int, int, int]
) -> nn.Module | None:
    """The teacher that `config.teacher` names, None without one.

    Raises:
      ValueError: a loss that needs a teacher and none, a teacher that no loss
        reads or that has no weights, or one with exits.
    """
    wanted = sorted(term.key for term in objective.terms if "teacher" in term.loss.needs)
    section = dict(settings.teacher or {})
    source = section.pop("weights", None)
    if not section.get("name"):
        if wanted:
            raise ValueError(
                f"loss {wanted[0]!r} needs a teacher: set config.teacher.name and config.teacher.weights, "
                "or drop the loss"
            )
        return None
    if not wanted:
        raise ValueError("config.teacher is set but no loss reads it: add logit_kl, or clear teacher.name")
    if not source:
        raise ValueError(
            "config.teacher.weights is empty: name a weight file (or a workdir) for the teacher, or 'self' for "
            "the model's own"
        )
    teacher = _make_model(section, info, shape, "config.teacher")
    if teacher.exits:
        raise ValueError(
            f"config.teacher.name is {section['name']!r}, which has exits: a teacher is one network. Name a "
            "plain model; the last exit of a model teaches its earlier ones through the loss exit_kl"
        )
    return teacher


def dry_run(config: Mapping[str, Any], *, log: Log = print) -> dict[str, Any]:
    """Builds and compiles a run without weights or images.

    Returns:
      `model`, `parameters`, `teacher`, `devices`, `batch`, `steps_per_epoch`,
      `steps`, `eval_every`, `compile_s`, and per device in bytes `state_bytes`
      and `memory_bytes` (arguments, results and temporaries of the step).
    """
    run = build(config)
    if run.warning:
        log(run.warning)
    facts = {
        "devices": sharding.describe_devices(run.mesh.devices.flat),
        "model": run.settings.model["name"],
        "parameters": sum(x.size for x in jax.tree.leaves(run.abstract_state.params)),
        "teacher": (run.settings.teacher or {}).get("name") or None,
        "batch": run.settings.batch,
        "steps_per_epoch": run.steps_per_epoch,
        "steps": run.total_steps,
        "eval_every": run.eval_every,
        "state_bytes": run.held_bytes,
    }
    for name, value in facts.items():
        log(f"{name}: {value}")
    began = time.monotonic()
    largest = run.phases[0].model  # keep rates only fall from phase to phase
    memory = peak_bytes(run.train_step_for(largest).memory_analysis())
    compiled = {"memory_bytes": memory, "compile_s": round(time.monotonic() - began, 1)}
    for name, value in compiled.items():
        log(f"{name}: {value}")
    return facts | compiled


def peak_bytes(memory: Any) -> int:
    """Bytes per device while a step runs; donated arguments count once."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
