"""`load_run`: a trained run as a thing to predict with, from its workdir alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from dyntoken import workdirs
from dyntoken.preprocessing import Preprocess
from dyntoken.weights import WeightsError, load_weights, runs


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds for those who predict.

    Attributes:
      model: module; `model.apply(variables, preprocess(images))` returns an `Output`.
      variables: of the checkpoint.
      preprocess: uint8 `[B, H, W, C]` to the model's input, as the run's evaluation does it.
      class_names: one per class, `()` where the data set names none.
      step: of the checkpoint.
    """

    model: Any
    variables: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...]
    step: int

    def name(self, number: int) -> str:
        """The name of a class, "class 3" where the data set names none.

        Raises:
          ValueError: the model has no such class.
        """
        if not 0 <= number < self.model.num_classes:
            raise ValueError(
                f"there is no class {number}: the run has {self.model.num_classes}, "
                f"0 to {self.model.num_classes - 1}"
            )
        return self.class_names[number] if self.class_names else f"class {number}"


def load_run(workdir: str | epath.PathLike, *, step: int | str = "newest", prefer: str = "ema") -> Run:
    """Opens a run; needs neither its recipe nor its data.

    Args:
      workdir: folder of a training run.
      step: "newest", "best" (by the run's `best_metric`) or the number of a step.
      prefer: "ema" takes the weight average where the run keeps one, or "params".

    Raises:
      WeightsError: no run there, no such step, or a damaged checkpoint.
      ValueError: a model that this version cannot build.
    """
    path = epath.Path(workdir).expanduser()
    if not path.is_dir():
        raise WeightsError(f"no run in {workdir}: give the workdir of a training run")
    try:
        directory = workdirs.step_folder(path, step)
    except workdirs.CheckpointError as error:
        raise WeightsError(str(error)) from error
    meta = workdirs.read_meta(directory)
    if not meta:
        raise WeightsError(f"{directory} has no description of its run (or a damaged one): give another step")
    if "run" not in meta:  # as checkpoints were written once; this needs the data set
        from dyntoken import train

        meta = {**meta, "run": train.build(meta.get("config", {})).description}
    about = meta["run"]
    model = runs.model_of(meta)
    height, width, channels = about["image_shape"]
    preprocess = Preprocess((height, width), channels, **dict(model.prepared))
    variables = load_weights(model, directory, prefer=prefer, strict=True)
    return Run(model, variables, preprocess, tuple(about["class_names"]), int(meta["step"]))
