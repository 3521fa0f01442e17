"""What a demo is worth: linear floor, dense reference, and the run or each of its exits, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dyntoken import data, train
from dyntoken.analysis import exit_plots, figures, macs, timing, token_maps
from dyntoken.models import create_model, of_method, split_name
from dyntoken.reducers import ScoreSelectFuse
from dyntoken.tools import cli, thresholds

Log = Callable[[str], None]
Config = Mapping[str, Any]
Row = dict[str, Any]
POINTS = 8  # budgets in the table of a model with exits
SHIPPED = "vit_mini_patch4_28"  # the trained dense model in the package: what exits are measured against
PLAIN = {"losses": {"ce": {"weight": 1.0}}, "teacher": {}}


def report(config: Config, result: train.Result, *, log: Log = print) -> list[Row]:
    """Prints and saves the comparison of a finished run.

    The rows are a linear classifier on the same images, the dense model the run
    started from, the run's own weights with dropped tokens that leave no trace
    (DynamicViT) in place of the method's fusion, and the run itself. Writes
    `compare.json` and, with the extra [viz], `kept.png` into the workdir; when
    they are there they are only shown.

    Of a model with exits the rows are the linear classifier, the trained dense
    model of the package where it fits the images, and each exit with the
    multiply-adds up to it; the picture is `exits.png`. `tools.thresholds`
    follows, with its own table and files in `budget/`.

    Args:
      config: of the run.
      result: what `train.run` returned; several processes only say that one is to compare.

    Returns:
      One dict per row: `model`, `top1` (fraction), `gmacs`, and `images_per_s` or
      `exit`, its number.
    """
    if jax.process_count() > 1:
        log("one process makes the comparison: run this command again on one host, with --distributed=off")
        return []
    target = result.workdir / "compare.json"
    exits = bool(result.model.exits)
    if not target.exists():
        log("fitting the linear classifier")
        rows = [{"model": "linear classifier", "top1": linear_top1(result.run)}]
        rows += (_measure_exits if exits else _measure)(config, result, log)
        target.write_text(json.dumps(rows, indent=2) + "\n")
    rows = json.loads(target.read_text())
    log(f"\n{_table(rows, result.run.info.name)}")
    if exits:
        _picture(result, "exits.png", "top-1 against multiply-adds of the exits", _draw_exits, rows, log)
        found = result.workdir / "budget"
        if not (found / "calibration.json").exists():
            log("\nthresholds for average budgets (tools.thresholds):")
            thresholds.main([f"--workdir={result.workdir}", f"--points={POINTS}"])
        log(f"exit thresholds, curves and shares per budget: {found}")
    else:
        _picture(result, "kept.png", "kept tokens of a test image", _draw_kept, result, log)
    return rows


def _measure_exits(config: Config, result: train.Result, log: Log) -> list[Row]:
    rows, reference = [], create_model(SHIPPED)
    if (reference.input_shape, reference.num_classes) == (result.run.shape, result.run.info.num_classes):
        log("evaluating the dense model of the package")
        start = {"model": {"name": SHIPPED}, "init": {"path": f"pretrained:{SHIPPED}"}, "optim": {}}
        top1 = train.evaluate({**config, **PLAIN, **start}, log=lambda line: None)["top1"]
        rows.append({"model": f"dense {SHIPPED}", "top1": top1, "gmacs": macs.count(reference).gmacs})
    costs = macs.gmacs(result.model)
    for index, (top1, gmacs) in enumerate(zip(result.metrics["top1_per_exit"], costs, strict=True)):
        name = f"{result.run.settings.model['name']}, exit {index}"
        rows.append({"model": name, "top1": top1, "gmacs": gmacs, "exit": index})
    return rows


def _measure(config: Config, result: train.Result, log: Log) -> list[Row]:
    name = result.run.settings.model["name"]
    log("evaluating the dense model and the drop in place of the fusion")
    dense, drop = dense_of(config), dropping(config)
    top1 = train.evaluate(dense, log=lambda line: None)["top1"]
    found = [(f"dense {dense['model']['name']}", train.build(dense, training=False).model, top1)]
    if drop is not None:
        top1 = train.measure(drop, result.state.variables)["top1"]
        found.append((f"{name}, dropping instead", drop.model, top1))
    found.append((name, result.model, result.metrics["top1"]))
    log("timing, each in turn with the dense model")
    rows = [
        {"model": label, "top1": share, "gmacs": macs.count(model).gmacs} for label, model, share in found
    ]
    for row, (_, model, _) in zip(rows[1:], found[1:], strict=True):
        rows[0]["images_per_s"], row["images_per_s"], row["speedup"] = _speed(found[0][1], model)
    return rows


def dense_of(config: Config) -> Config:
    """The config of the backbone alone."""
    return {**config, **PLAIN, "model": {"name": split_name(config["model"]["name"])[1]}}


def dropping(config: Config) -> train.Run | None:
    """The same method without its fuser, opened for evaluation; None where a method has none."""
    method = split_name(config["model"]["name"])[0]
    if method is None or "fuse" not in of_method(method):
        return None
    return train.build({**config, "model": {**config["model"], "fuse": ScoreSelectFuse.fuse}}, training=False)


def _speed(dense: Any, model: Any, batch: int = 200) -> tuple[float, float, float]:
    """(dense images/s, the model's, ratio), timed in turn."""
    runs = [
        timing.evaluation(m, timing.random_variables(m), timing.random_images(m, batch))
        for m in (dense, model)
    ]
    both = timing.compare(*runs, pairs=7)
    return both.first.images_per_s(batch), both.second.images_per_s(batch), both.ratio


def linear_top1(plan: Any, steps: int = 300) -> float:
    """Test accuracy of multinomial regression on the pixels: the floor."""
    train_x, train_y = _pixels(plan, plan.settings.data.split)
    test_x, test_y = _pixels(plan, plan.settings.data.eval_split)
    classes = plan.info.num_classes
    start = {"w": jnp.zeros((train_x.shape[1], classes)), "b": jnp.zeros(classes)}
    tx = optax.adam(optax.cosine_decay_schedule(0.01, steps))

    def loss(params):
        logits = train_x @ params["w"] + params["b"][None]
        penalty = 1e-3 * jnp.sum(params["w"] ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean() + penalty

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start, tx.init(start)))
    guess = (test_x @ params["w"] + params["b"][None]).argmax(axis=1)
    return float((guess == test_y).mean())


def _pixels(plan: Any, split: str) -> tuple[jax.Array, jax.Array]:
    chosen, size = plan.settings.data, plan.shape[:2]
    more = {"batch": 200, "size": size, "shards": 1, "data_dir": chosen.data_dir, **chosen.options}
    batches = list(data.eval_batches(chosen.name, split=split, **more))
    real = np.concatenate([b["mask"] for b in batches]) > 0
    images, labels = (np.concatenate([b[key] for b in batches])[real] for key in ("image", "label"))
    return plan.prepare(jnp.asarray(images)).reshape(len(images), -1), jnp.asarray(labels)


def _table(rows: list[Row], name: str) -> str:
    columns = (
        ("top-1 %", "top1", lambda top1: f"{100 * top1:.2f}"),
        ("GMACs", "gmacs", "{:.4f}".format),
        ("images/s", "images_per_s", "{:.0f}".format),
        ("x dense", "speedup", "{:.2f}".format),
    )
    used = [column for column in columns if any(row.get(column[1]) for row in rows)]
    cells = [["", *(heading for heading, _, _ in used)]]
    for row in rows:
        cells.append([row["model"], *(spell(row[key]) if row.get(key) else "-" for _, key, spell in used)])
    return f"{name}, test split\n{cli.table(cells)}"


def _picture(
    result: train.Result, name: str, what: str, paint: Callable[[Any], Any], source: Any, log: Log
) -> None:
    target = result.workdir / name
    if not target.exists():
        try:
            figures.save(paint(source), target)
        except ImportError as error:
            log(f"no picture: {error}")
            return
    log(f"{what}: {target}")


def _draw_kept(result: train.Result) -> Any:
    image = next(iter(result.run.eval_batches()))["image"][:1]
    variables = jax.device_get(result.state.variables)
    out = jax.jit(result.model.apply)(variables, result.run.prepare(jnp.asarray(image)))
    names = result.run.info.class_names
    title = f"{result.run.settings.model['name']}: {names[int(out.logits[0].argmax())] if names else ''}"
    return token_maps.picture(image[0], out.reductions, at=result.model.at, title=title)


def _draw_exits(rows: list[Row]) -> Any:
    """Top-1 against multiply-adds: a line through the exits, the others for reference."""
    exits = [row for row in rows if "exit" in row]
    costs = [1e3 * row["gmacs"] for row in exits]
    series = [exit_plots.Series("exits", costs, [row["top1"] for row in exits])]
    for row in rows[: -len(exits)]:
        cost = [1e3 * row["gmacs"]] if "gmacs" in row else [costs[0], costs[-1]]
        kind = "rival" if "gmacs" in row else "cited"
        series.append(exit_plots.Series(row["model"], cost, [row["top1"]] * len(cost), kind))
    return exit_plots.curves(series, xlabel="multiply-adds per image (millions)", title="")
