"""From a config to a checked plan: every section goes into exactly one function.

Nothing here reads an image or a weight file, so that a plan costs seconds and a
wrong key is found before anything else happens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dyntoken import data, device_augment, losses, optim
from dyntoken.data.requests import check_eval_batch, check_size, check_topology
from dyntoken.eval.logits import make_eval_step
from dyntoken.train import mesh as meshes
from dyntoken.train.evalsets import MAIN, EvalSet, check_metric, open_sets
from dyntoken.train.roles import make_model, make_teacher
from dyntoken.train.settings import MOST_STEPS, Settings, check_lengths, read
from dyntoken.train.shrink import Shrink, Stage, stages
from dyntoken.train.state import TrainState, create_state, init_variables
from dyntoken.train.step import joined, make_gradient, make_update, refuse_batch_norm

Tree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run is made of, except weights and images.

    Attributes:
      settings: the checked config.
      mesh: devices.
      model, teacher: modules; the teacher may be None.
      info: of the data set.
      eval_sets: what is evaluated, by label; `""` is the split of `config.data`.
      shape: `(H, W, C)` of the batches.
      steps_per_epoch, total_steps, eval_every: in steps.
      stages: what is trained from which step on; several if the keep rate falls.
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
    stages: Sequence[Stage]
    tx: optax.GradientTransformation
    lr_fn: Callable[[Any], Any]

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and places of the state."""
        make = functools.partial(create_state, tx=self.tx, ema=self.settings.ema > 0)
        state = jax.eval_shape(make, self.abstract(self.model))
        return meshes.like(state, meshes.layout_of(state, self.mesh, self.settings.shard))

    @property
    def abstract_teacher(self) -> Tree:
        """Shapes and types of the teacher's variables, `{}` without a teacher."""
        return meshes.replicated_like({} if self.teacher is None else self.abstract(self.teacher), self.mesh)

    def abstract(self, model: nn.Module) -> Tree:
        """Shapes and types of a model's variables."""
        return jax.eval_shape(lambda: init_variables(model, self.shape, self.settings.seed))

    def new_state(self, variables: Tree | None = None) -> TrainState:
        """The state before the first step, of given or of fresh variables."""

        def create(given):
            fresh = init_variables(self.model, self.shape, self.settings.seed) if given is None else given
            return create_state(fresh, self.tx, ema=self.settings.ema > 0)

        state = jax.jit(create)(variables)
        return meshes.replicate(state, self.mesh, meshes.layout_of(state, self.mesh, self.settings.shard))

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """The compiled step, `(state, teacher_variables, batch)`; it consumes the state."""
        return self.train_step_for(self.model)

    def train_step_for(self, model: nn.Module) -> jax.stages.Compiled:
        """The same for the model of a stage."""
        settings = self.settings
        gradient = make_gradient(
            model,
            specs=settings.losses,
            augment=self.augment,
            seed=settings.seed,
            teacher=self.teacher,
            accumulate=settings.accumulate,
        )
        update = make_update(self.tx, specs=settings.losses, ema=settings.ema, ema_warmup=settings.ema_warmup)
        if settings.shard == "none":
            step = meshes.data_parallel(joined(gradient, update), self.mesh, replicated=2, donate=(0,))
        else:
            layout = jax.tree.map(lambda x: x.sharding, self.abstract_state)
            step = meshes.split_update(gradient, update, self.mesh, layout)
        batch = meshes.batch_like(self.mesh, settings.batch, self.shape)
        return step.lower(self.abstract_state, self.abstract_teacher, batch).compile()

    @property
    def eval_step(self) -> jax.stages.Compiled:
        """The compiled evaluation step of the main set, `(variables, batch) -> sums`."""
        return self.eval_step_for(MAIN)

    def eval_step_for(self, label: str) -> jax.stages.Compiled:
        """The evaluation step of a set; sets whose batches look alike share one."""
        labels = self.info.num_classes if self.eval_sets[label].info.several_labels else 0
        if labels not in self._eval_steps:
            step = make_eval_step(self.model, prepare=self.prepare)
            step = meshes.data_parallel(step, self.mesh, replicated=1)
            batch = meshes.batch_like(self.mesh, self.eval_batch, self.shape, labels=labels)
            del batch["id"]
            variables = meshes.replicated_like(self.abstract_state.variables, self.mesh)
            self._eval_steps[labels] = step.lower(variables, batch).compile()
        return self._eval_steps[labels]

    @functools.cached_property
    def _eval_steps(self) -> dict[int, jax.stages.Compiled]:
        return {}

    @property
    def eval_batch(self) -> int:
        """Rows of a global evaluation batch."""
        return self.settings.data.eval.get("batch", self.settings.batch)

    def prepare(self, images: jax.Array) -> jax.Array:
        """uint8 -> normalised float32, `[B, H, W, C]`."""
        chosen = self.settings.data
        mean = self.info.mean if chosen.mean is None else chosen.mean
        return device_augment.normalize(images, mean, self.info.std if chosen.std is None else chosen.std)

    def augment(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Normalises, erases and mixes; see `make_gradient`."""
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

    def eval_batches(self, label: str = MAIN) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of one pass over an evaluation set."""
        return data.eval_batches(batch=self.eval_batch, **self._reading(), **self.eval_sets[label].arguments)

    def _reading(self) -> dict[str, Any]:
        return {
            "size": self.shape[:2],
            "shards": self.settings.data.shards,
            "process": (jax.process_index(), jax.process_count()),
        }


def build(
    config: Mapping[str, Any] | Settings,
    *,
    devices: Sequence[jax.Device] | None = None,
    training: bool = True,
) -> Plan:
    """A plan from a config; reads neither images nor weights.

    Args:
      config: see `Settings`.
      devices: to run on, by default all.
      training: False for a plan that evaluates: how long the run is, and what does
        not fit into it, means nothing then.

    Raises:
      UnknownNameError: for anything that has no such name, with the nearest.
      ValueError: for values that do not fit together.
    """
    settings = config if isinstance(config, Settings) else read(config)
    mesh = meshes.data_mesh(devices)
    mixes = max(settings.mix.get("mixup", 1), settings.mix.get("cutmix", 1)) > 0
    meshes.check_batch(
        settings.batch,
        mesh,
        multiple=2 if mixes else 1,
        slices=settings.accumulate,
        shards=settings.data.shards,
    )
    chosen = settings.data
    meshes.check_batch(chosen.eval.get("batch", settings.batch), mesh)
    process = jax.process_index(), jax.process_count()
    check_topology(settings.batch, chosen.shards, process)
    check_eval_batch(chosen.eval.get("batch", settings.batch), process)
    info = data.info(chosen.name, chosen.data_dir, **chosen.options)
    eval_sets = open_sets(chosen, info, settings.evals)
    check_metric(settings.best_metric, eval_sets, ema=settings.ema > 0)
    eval_every, per_epoch, total = 0, 1, MOST_STEPS  # nothing is too long for that
    if training:
        per_epoch = data.steps_per_epoch(
            chosen.name, chosen.split, settings.batch, chosen.data_dir, **chosen.options
        )
        total = settings.steps if settings.steps > 0 else max(1, round(settings.epochs * per_epoch))
        eval_every = settings.eval_steps or round(settings.eval_epochs * per_epoch)
        check_lengths(settings, total=total, eval_every=eval_every)
    shape = (*check_size(chosen.size, info.image_shape), info.channels)
    model = make_model(settings.model, info, shape, "config.model")
    shrink = Shrink.of(settings.keep_schedule) if training else None
    parts = stages(model, shrink, steps_per_epoch=per_epoch, total_steps=total)
    losses.Objective(settings.losses).check(len(getattr(model, "exits", ())))
    teacher = make_teacher(settings, info, shape)
    variables = jax.eval_shape(lambda: init_variables(model, shape, settings.seed))
    refuse_batch_norm(model, variables, settings.accumulate)
    tx, lr_fn = optim.make(
        variables["params"], total_steps=total, steps_per_epoch=per_epoch, **settings.optim
    )
    return Plan(
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
        stages=parts,
        tx=tx,
        lr_fn=lr_fn,
    )
