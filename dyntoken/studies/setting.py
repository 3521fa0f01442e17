"""What the networks of a study have in common: the recipe, the data, and one dense checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dyntoken import architectures, data, losses, models, reducers, weights
from dyntoken.analysis import macs, probes
from dyntoken.models import Model
from dyntoken.studies.reading import collect
from dyntoken.studies.trial import Trial
from dyntoken.train.build import Run, build
from dyntoken.weights import runs, trees

VERSION = 1  # of a results folder; another one's rows mean something else
KEEPS = "keeps.json"  # beside the dense weights
REFERENCE = "dtps"  # what `Trial.cost_of` speaks of
OF_RECIPE = ("dtype", "scan", "remat")  # of the model: how it runs, which no checkpoint says
LEAST = 0.3  # keep rate that the sites of a study must bear
Log = Callable[[str], None]

# What a method is trained with beside the recipe's losses, as its paper weighs it, from its keep rate and from
# its cost as a share of the dense model's. Other methods that learn their decision get `keep_ratio`.
LOSSES: dict[str, Callable[[float, float], dict[str, dict[str, Any]]]] = {
    "adavit": lambda keep, cost: {"usage": {"weight": 2.0, "target": keep}},
    "avit": lambda keep, cost: {"ponder": {"weight": 5e-4}, "halting_prior": {"weight": 1e-3}},
    "ltmp": lambda keep, cost: {"flops_share": {"weight": 10.0, "target": cost}},
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The ground that every network of a study stands on.

    Attributes:
      config: of the dense model, losses included, plain; it also teaches where a loss wants that.
      dense: the model.
      weights: its file.
      top1: of the dense weights on the evaluation split.
      at: blocks of the sites, () for each method's own.
    """

    config: Mapping[str, Any]
    dense: Model
    weights: str
    top1: float
    at: tuple[int, ...]

    @functools.cached_property
    def gmacs(self) -> float:
        """1e9 multiply-adds of the dense model."""
        return macs.count(self.dense).gmacs

    def cascade(self) -> dict[str, Any]:
        """Keywords of a cascade over the backbone with three grids, as `with_exits`."""
        rows = self.dense.plain().grid[0]
        grids = tuple(sorted({max(2, round(share * rows)) for share in (0.5, 0.7)} | {rows}))
        return {**self.with_exits(architectures.CASCADE), "exits": grids}

    def with_exits(self, kind: str) -> dict[str, Any]:
        """Keywords of the backbone as a model with exits; `kind` begins its name.

        Raises:
          ValueError: a backbone that cannot be one.
        """
        name = f"{kind}_{self.dense.arch}"
        known = models.keywords(name)
        return {**{k: v for k, v in self.config["model"].items() if k in known}, "name": name}

    def reduced(self, method: str, keep: Any, at: tuple[int, ...] | None, **options: Any) -> Model:
        """The dense model under a method, at the study's sites where it has no places of its own."""
        row = reducers.METHODS[method].plain
        at = at or (self.at if row.from_block is None else ())
        return models.reduced(self.dense, method, keep=keep, **({"at": at} if at else {}), **options)

    def cost(self, model: Any) -> float:
        """1e9 multiply-adds of an image, through all of a model with exits."""
        found = macs.gmacs(model)
        return found[-1] if isinstance(found, list) else found

    @functools.cached_property
    def _solved(self) -> dict[str, Any]:
        """Keep rates by trial, from an earlier command or found so far: each takes seconds of tracing."""
        file = Path(self.weights).with_name(KEEPS)
        return json.loads(file.read_text()) if file.exists() else {}

    def keep_of(self, trial: Trial) -> Any:
        """The keep rate of a trial, found by bisection where the trial gives a cost."""
        if trial.cost_of is None:
            return trial.keep
        key = json.dumps([trial.method, trial.at, trial.cost_of, dict(trial.model)], sort_keys=True)
        if key not in self._solved:
            self._solved[key] = self._solve(trial)
            write(Path(self.weights).with_name(KEEPS), json.dumps(self._solved, indent=1) + "\n")
        return self._solved[key]

    @functools.cached_property
    def _targets(self) -> dict[float, float]:
        return {}

    def target(self, keep: float) -> float:
        """What `Trial.cost_of` means: the multiply-adds of the reference at a keep rate."""
        if keep not in self._targets:
            self._targets[keep] = self.cost(self.reduced(REFERENCE, keep, None))
        return self._targets[keep]

    def _solve(self, trial: Trial) -> float:
        goal, costs, low, high = self.target(trial.cost_of), {}, 0.02, 1.0
        rates: dict[float, float] = {}
        refused: ValueError | None = None
        for _ in range(7):
            rate = round((low + high) / 2, 3)
            try:
                made = self.reduced(trial.method, rate, trial.at, **trial.model)
                counts = tuple(site.reducer["keep"] for site in made.sites())
                if counts not in costs:
                    costs[counts] = self.cost(made)
            except ValueError as error:  # too few tokens are left
                low, refused = rate, error
                continue
            rates[rate] = costs[counts]
            low, high = (rate, high) if costs[counts] < goal else (low, rate)
        if not rates:
            raise ValueError(
                f"{trial.name}: method {trial.method!r} takes no keep rate in {self.dense.arch}: {refused}"
            )
        return min(rates, key=lambda rate: abs(rates[rate] - goal))

    def config_of(self, trial: Trial, seed: int) -> dict[str, Any]:
        """The config of a network, for `train.run`."""
        config = json.loads(json.dumps(self.config))
        section = config["model"]
        if "name" in trial.model:
            config["model"] = {**trial.model}
        elif trial.method is not None:
            keep = self.keep_of(trial)
            made = self.reduced(trial.method, keep, trial.at, **trial.model)
            section |= {"name": f"{trial.method}_{section['name']}", "at": made.at, **trial.model}
            section |= {} if keep is None else {"keep": keep}
        terms = {**config["losses"]}
        if trial.method is not None:
            own = {k: v for k, v in trial.model.items() if k in models.of_method(trial.method)}
            if trial.method in LOSSES:
                goal = self.cost(made) if trial.cost_of is None else self.target(trial.cost_of)
                terms |= LOSSES[trial.method](keep, goal / self.gmacs)
            elif reducers.method(trial.method, **own).plain.learns:
                terms["keep_ratio"] = {"weight": 2.0}
        terms |= trial.losses
        config["losses"] = {name: options for name, options in terms.items() if options is not None}
        if "teacher" in losses.Objective(config["losses"]).needs:
            config["teacher"] = {**self.config["model"], "weights": self.weights}
        for length in ("steps", "epochs"):
            config[length] = type(config[length])(config[length] * trial.length)
        return config | {"seed": seed}


def prepare(
    config: ml_collections.ConfigDict, source: str | None, out: Path, *, probe: bool, log: Log
) -> Setting:
    """The setting of a results folder, made at first and read again later.

    Args:
      config: recipe of the dense model.
      source: its weights, as `load_pretrained` takes them; None: those of the recipe, or fresh ones.
      out: the folder.
      probe: fit a new classifier to a source that has one for other classes.

    Raises:
      ValueError: a folder of another version or of other options, weights of another architecture or of
        other classes.
    """
    plain = config.to_dict()
    plan = {"version": VERSION, "source": source, **_flat(plain)}
    for name in ("data.data_dir", "seed"):
        plan.pop(name, None)
    plan = json.loads(json.dumps(plan))
    about, file = out / "study.json", out / "dense.safetensors"
    try:
        stored = json.loads(about.read_text()) if about.exists() else {}
    except ValueError as error:
        raise ValueError(f"{about} is damaged ({error}): give another --out") from None
    if stored and stored.get("version") != VERSION:
        raise ValueError(
            f"{out} holds studies of version {stored.get('version')}, this is {VERSION}: give another --out"
        )
    wrong = sorted(k for k in {*plan, *stored} - {"dense"} if plan.get(k) != stored.get(k)) if stored else []
    if wrong:
        raise ValueError(
            f"{out} holds studies with other options ({wrong[0]} is {stored.get(wrong[0])} there, "
            f"{plan.get(wrong[0])} here): give another --out"
        )
    if "dense" not in stored:
        model, variables = _dense(plain, source, probe, log)
        weights.save_weights(file, variables, model=model)
        section = json.loads(runs.recipe(model)["recipe"])
        settled = _settled(plain, section, file)
        top1 = _top1(_opened(settled, section), model, variables)
        plan["dense"] = {"model": section, "top1": top1}
        write(about, json.dumps(plan, indent=2) + "\n")
        log(f"dense {section['name']}: top-1 {100 * top1:.2f}")
        stored = plan
    section = stored["dense"]["model"]
    dense = models.create_model(**_tuples(section))
    settled = _settled(plain, section, file)
    return Setting(settled, dense, str(file), stored["dense"]["top1"], _sites(dense))


def _dense(plain: dict[str, Any], source: str | None, probe: bool, log: Log) -> tuple[Model, Any]:
    """The dense model with a classifier for the classes of the data."""
    if source is None:
        run = _opened(plain, plain["model"])
        if path := plain["init"].get("path"):
            return run.model, weights.load_whole(run.model, path)[0]
        return run.model, run.model.init(jax.random.key(0), np.zeros((1, *run.shape), np.float32))
    chosen = plain["data"]
    info = data.info(chosen["name"], chosen["data_dir"], **chosen["options"])
    shape = (*data.check_size(chosen["size"], info.image_shape), info.channels)
    extra = {key: plain["model"][key] for key in OF_RECIPE if key in plain["model"]}
    size = shape[0] if shape[0] == shape[1] else shape[:2]
    model, variables, report = weights.load_pretrained(source, img_size=size, return_report=True, **extra)
    if not isinstance(model, Model) or model.method is not None:
        raise ValueError(f"{source} holds no dense model of one exit, which is what studies reduce")
    if model.input_shape != shape:
        raise ValueError(f"{source} takes images {model.input_shape}, {info.name} gives {shape}")
    if model.num_classes and model.num_classes != info.num_classes and not probe:
        raise ValueError(
            f"{source} classifies {model.num_classes} classes, {info.name} has {info.num_classes}: give other "
            "data, or --head=probe, which fits a new linear classifier first"
        )
    log(str(report))
    if model.num_classes == info.num_classes and not probe:
        return model, variables
    return _with_head(plain, model, variables, info.num_classes, log)


def _with_head(
    plain: dict[str, Any], model: Model, variables: Any, classes: int, log: Log
) -> tuple[Model, Any]:
    """The model with a linear classifier fitted to its features of the training split."""
    log("fitting a linear classifier to the features of the training split")
    made = model.clone(num_classes=classes)
    config = {**plain, "data": {**plain["data"], "eval_split": plain["data"]["split"]}}
    run = _opened(config, json.loads(runs.recipe(made)["recipe"]))
    (features,), labels = collect(
        run, variables, lambda v, images: (model.apply(v, images, method="features").pooled,)
    )
    kernel, bias = probes.logistic(features.astype(np.float64), labels, classes)
    have, flat = weights.flat_variables(variables), {}
    for path, shape in weights.shapes_of(made).items():
        if path in have and tuple(have[path].shape) == tuple(shape) and "head" not in path.split("/"):
            flat[path] = have[path]
            continue
        flat[path] = kernel if len(shape) == 2 else bias
        if flat[path].shape != tuple(shape):
            raise ValueError(f"{model.arch} has no plain linear classifier ({path} {shape}): train one first")
    return made, trees.nested_variables(flat)


def _opened(plain: Mapping[str, Any], section: Mapping[str, Any]) -> Run:
    """A dense model's run, to read images with."""
    return build({**plain, "model": section, "losses": {"ce": {}}, "teacher": None}, training=False)


def _settled(plain: Mapping[str, Any], section: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The recipe with the dense model of the folder as its model and start."""
    config = json.loads(json.dumps(plain))
    section = {**section, **{k: v for k, v in config["model"].items() if k in OF_RECIPE}}
    return config | {"model": section, "init": {"path": str(file)}, "teacher": None, "compare": False}


def _sites(dense: Model) -> tuple[int, ...]:
    """Blocks where a study reduces: the method's own, unless these leave next to nothing of a small grid."""
    own = models.reduced(dense, REFERENCE).at
    body = dense.plain()
    if int(np.prod(body.grid)) * LEAST ** len(own) >= 2 or not hasattr(body, "depth") or body.depth < 4:
        return own if body.depth >= 4 else (body.depth // 2,)
    return (body.depth // 4, body.depth // 2)


def _top1(run: Run, model: Model, variables: Any) -> float:
    (logits,), labels = collect(run, variables, lambda v, x: (model.apply(v, x).logits,))
    return float((logits.argmax(axis=-1) == labels).mean())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key, node in tree.items() for k, v in _flat(node, f"{prefix}.{key}".strip(".")).items()}


def _tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}


def write(path: Path, text: str) -> None:
    """Writes a file; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
