"""What a run is worth: linear floor, dense reference, and the run or each of its exits, side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dyntoken import data, train
from dyntoken.analysis import macs, timing
from dyntoken.models import create_model, split_name
from dyntoken.reducers import ScoreSelectFuse
from dyntoken.tools import budget, cli

Log = Callable[[str], None]
POINTS = 8  # budgets in the table of a model with exits
SHIPPED = "vit_mini_patch4_28"  # the trained dense model in the package: what exits are measured against


def report(config: Mapping[str, Any], result: train.Result, *, log: Log = print) -> list[dict[str, Any]]:
    """Prints and saves the comparison of a finished run.

    The rows are a linear classifier on the same images, the dense model the run
    started from, the run's own weights with dropped tokens that leave no trace
    (DynamicViT) in place of the method's fusion, and the run itself. Writes
    `compare.json` and, with the extra [viz], `kept.png` into the workdir; when
    they are there they are only shown.

    Of a model with exits the rows are the linear classifier, the trained dense
    model of the package where it fits the images, and each exit with the
    multiply-adds up to it; the picture is `exits.png`. `tools.budget` follows,
    with its own table and files in `budget/`.

    Args:
      config: of the run.
      result: what `train.run` returned.

    Returns:
      One dict per row: `model`, `top1` (fraction), `gmacs`, and `images_per_s` or
      `exit`, its number.
    """
    target = result.workdir / "compare.json"
    exits = bool(result.model.exits)
    if not target.exists():
        rows = (_measure_exits if exits else _measure)(config, result, log)
        target.write_text(json.dumps(rows, indent=2) + "\n")
    rows = json.loads(target.read_text())
    log("")
    log(_table(rows, result.run.info.name))
    if exits:
        _picture(
            result.workdir / "exits.png", "top-1 against multiply-adds of the exits", _draw_exits, rows, log
        )
        _budgets(result, log)
    else:
        _picture(result.workdir / "kept.png", "kept tokens of a test image", _draw_kept, result, log)
    return rows


def _measure_exits(config: Mapping[str, Any], result: train.Result, log: Log) -> list[dict[str, Any]]:
    name = result.run.settings.model["name"]
    log("fitting the linear classifier")
    rows = [{"model": "linear classifier", "top1": linear_top1(result.run)}]
    reference = create_model(SHIPPED)
    if (reference.input_shape, reference.num_classes) == (result.run.shape, result.run.info.num_classes):
        log("evaluating the dense model of the package")
        top1 = train.evaluate(_shipped_config(config), log=_silent)["top1"]
        gmacs = macs.count(reference).gmacs
        rows.append({"model": f"dense {SHIPPED}", "top1": top1, "gmacs": gmacs})
    costs = macs.gmacs_per_exit(result.model, macs.count(result.model))
    for index, (top1, gmacs) in enumerate(zip(result.metrics["top1_per_exit"], costs, strict=True)):
        rows.append({"model": f"{name}, exit {index}", "top1": top1, "gmacs": gmacs, "exit": index})
    return rows


def _measure(config: Mapping[str, Any], result: train.Result, log: Log) -> list[dict[str, Any]]:
    name = result.run.settings.model["name"]
    log("fitting the linear classifier")
    rows = [{"model": "linear classifier", "top1": linear_top1(result.run)}]
    log("evaluating the dense model and the drop in place of the fusion")
    dense = _dense_config(config)
    rows.append(
        {"model": f"dense {dense['model']['name']}", "top1": train.evaluate(dense, log=_silent)["top1"]}
    )
    drop = train.build(_drop_config(config))
    top1 = train.measure(drop, result.state.variables)["top1"]
    rows.append({"model": f"{name}, dropping instead", "top1": top1})
    rows.append({"model": name, "top1": result.metrics["top1"]})
    log("timing, each in turn with the dense model")
    models = [train.build(dense).model, drop.model, result.model]
    for row, model in zip(rows[1:], models, strict=True):
        row["gmacs"] = macs.count(model).gmacs
    for row, model in zip(rows[2:], models[1:], strict=True):
        rows[1]["images_per_s"], row["images_per_s"], row["speedup"] = _speed(models[0], model)
    return rows


def _silent(line: str) -> None:
    """The dense model's own report is not of interest here."""


def _shipped_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the package's dense model on the run's images, for evaluation."""
    dense = copy.deepcopy(dict(config))
    dense["model"], dense["init"] = {"name": SHIPPED}, {"path": f"pretrained:{SHIPPED}"}
    dense["losses"], dense["teacher"], dense["optim"] = {"ce": {"weight": 1.0}}, {}, {}
    return dense


def _dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense model that the run started from, for evaluation."""
    dense = copy.deepcopy(dict(config))
    _, name = split_name(dense["model"]["name"])
    dense["model"] = {"name": name}
    dense["losses"], dense["teacher"] = {"ce": {"weight": 1.0}}, {}
    return dense


def _drop_config(config: Mapping[str, Any]) -> dict[str, Any]:
    drop = copy.deepcopy(dict(config))
    drop["model"]["fuse"] = ScoreSelectFuse.fuse  # its default: what is dropped leaves no trace
    return drop


def linear_top1(plan: Any, steps: int = 300) -> float:
    """Test accuracy of multinomial regression on the pixels: the floor."""
    train_x, train_y = _pixels(plan, plan.settings.data.split)
    test_x, test_y = _pixels(plan, plan.settings.data.eval_split)
    params = {
        "w": jnp.zeros((train_x.shape[1], plan.info.num_classes)),
        "b": jnp.zeros(plan.info.num_classes),
    }
    tx = optax.adam(optax.cosine_decay_schedule(0.01, steps))

    def loss(params):
        logits = train_x @ params["w"] + params["b"][None]
        penalty = 1e-3 * jnp.sum(params["w"] ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean() + penalty

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, tx.init(params)))
    guess = (test_x @ params["w"] + params["b"][None]).argmax(axis=1)
    return float((guess == test_y).mean())


def _pixels(plan: Any, split: str) -> tuple[jax.Array, jax.Array]:
    chosen = plan.settings.data
    batches = list(
        data.eval_batches(
            chosen.name,
            split=split,
            batch=200,
            size=plan.shape[:2],
            shards=1,
            data_dir=chosen.data_dir,
            **chosen.options,
        )
    )
    real = np.concatenate([b["mask"] for b in batches]) > 0
    images = np.concatenate([b["image"] for b in batches])[real]
    labels = np.concatenate([b["label"] for b in batches])[real]
    return plan.prepare(jnp.asarray(images)).reshape(len(images), -1), jnp.asarray(labels)


def _speed(dense: Any, model: Any, batch: int = 200) -> tuple[float, float, float]:
    """(dense images/s, the model's, ratio), timed in turn."""
    runs = [
        timing.evaluation(m, timing.random_variables(m), timing.random_images(m, batch))
        for m in (dense, model)
    ]
    both = timing.compare(*runs, pairs=7)
    return both.first.images_per_s(batch), both.second.images_per_s(batch), both.ratio


def _table(rows: list[dict[str, Any]], name: str) -> str:
    columns = {
        "top-1 %": lambda row: f"{100 * row['top1']:.2f}",
        "GMACs": lambda row: f"{row['gmacs']:.4f}" if row.get("gmacs") else "-",
        "images/s": lambda row: f"{row['images_per_s']:.0f}" if row.get("images_per_s") else "-",
        "x dense": lambda row: f"{row['speedup']:.2f}" if row.get("speedup") else "-",
    }
    cells = [["", *columns], *([row["model"], *(cell(row) for cell in columns.values())] for row in rows)]
    used = [c for c in range(len(cells[0])) if c == 0 or any(row[c] != "-" for row in cells[1:])]
    return f"{name}, test split\n{cli.table([[row[c] for c in used] for row in cells])}"


def _picture(
    target: epath.Path, what: str, paint: Callable[[Any, epath.Path], None], source: Any, log: Log
) -> None:
    if not target.exists():
        try:
            paint(source, target)
        except ImportError as error:
            log(f"no picture: {error}")
            return
    log(f"{what}: {target}")


def _budgets(result: train.Result, log: Log) -> None:
    """Thresholds for some average budgets, and the picture of the trade-off."""
    target = result.workdir / "budget"
    if not (target / "calibration.json").exists():
        log("\nthresholds for average budgets (tools.budget):")
        budget.main([f"--workdir={result.workdir}", f"--points={POINTS}"])
    log(f"exit thresholds, curves and shares per budget: {target}")


def _draw_kept(result: train.Result, target: epath.Path) -> None:
    from dyntoken.analysis import draw

    batch = next(iter(result.run.eval_batches()))
    image = batch["image"][:1]
    out = jax.jit(result.model.apply)(
        jax.device_get(result.state.variables), result.run.prepare(jnp.asarray(image))
    )
    names = result.run.info.class_names
    title = f"{result.run.settings.model['name']}: {names[int(out.logits[0].argmax())] if names else ''}"
    draw.save(draw.picture(image[0], out.reductions, at=result.model.at, title=title), target)


def _draw_exits(rows: list[dict[str, Any]], target: epath.Path) -> None:
    """Top-1 against multiply-adds: a line through the exits, the others for reference."""
    from matplotlib.figure import Figure

    from dyntoken.analysis import draw

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    exits = [row for row in rows if "exit" in row]
    axes.plot(
        [1e3 * row["gmacs"] for row in exits], [100 * row["top1"] for row in exits], "o-", label="exits"
    )
    for row in rows:
        if row in exits:
            continue
        if row.get("gmacs"):
            axes.plot(1e3 * row["gmacs"], 100 * row["top1"], "s", color="black", label=row["model"])
        else:
            axes.axhline(100 * row["top1"], color="grey", linestyle=":", label=row["model"])
    axes.set(xlabel="multiply-adds per image (millions)", ylabel="top-1 (%)")
    axes.legend()
    draw.save(figure, target, dpi=150)
