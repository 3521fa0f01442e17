"""Speed of a model against its dense counterpart.

Times both in turn on the device at hand and takes their ratio pair by pair: model
only (no data loading), random images and weights, after warm-up. "share of
ideal" is the speed-up over the ratio of multiply-adds. --vs-torch times the
dense architecture in PyTorch in the same turns, --vs-onnx and --vs-openvino both models,
exported. --profile says where the time goes. --suite times what results/speed.csv
holds. Early exit is timed by bench_exits, the input of a recipe by bench_input;
docs/speed.md explains the columns.

examples:
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --batch=1,16,64 --vs-torch --vs-onnx
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --vs dynamicvit_deit_small_patch16_224
  python -m dyntoken.tools.bench evit_deit_tiny_patch16_224 --train --dtype=bfloat16 --json
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --profile
  python -m dyntoken.tools.bench --suite
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

from dyntoken.tools import bench_peers, bench_suite, cli

PAUSE_S = 0.3  # ahead of a measurement beside others: onnxruntime's threads look for work after they had some


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="model, e.g. dtps_deit_small_patch16_224")
    cli.add_model_options(parser)
    parser.add_argument(
        "--vs", metavar="NAME", help="model to compare with; by default the dense counterpart"
    )
    parser.add_argument(
        "--batch", type=batches, default=(16,), help="images at a time, one number or several (default 16)"
    )
    parser.add_argument("--pairs", type=cli.positive, default=20, help="timed pairs (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type")
    parser.add_argument(
        "--train",
        nargs="?",
        const="gradient",
        choices=("gradient", "step"),
        help="time training instead: forward, cross-entropy and gradient, or a whole step with AdamW",
    )
    parser.add_argument(
        "--teacher", action="store_true", help="with --train: the dense model teaches the other, in its step"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time compiling, the first time and from jax's cache"
    )
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--vs-torch", action="store_true", help="also time the dense model in PyTorch")
    parser.add_argument("--vs-torch-compile", action="store_true", help="likewise through torch.compile")
    parser.add_argument("--vs-onnx", action="store_true", help="also time the models in onnxruntime")
    parser.add_argument("--vs-openvino", action="store_true", help="also time the models in OpenVINO")
    bench_suite.arguments(parser.add_argument_group("the suite"))


def batches(text: str) -> tuple[int, ...]:
    """`16` or `1,16,64`."""
    found = cli.ints(text)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1, or several")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    """One result, or one per batch, see `_measure`."""
    if args.suite:
        if args.name:
            raise cli.UsageError("--suite has its own models: leave NAME out")
        return bench_suite.run(args, functools.partial(_parsed, args), _measure)
    if not args.name:
        raise cli.UsageError("which model? give its NAME, or --suite")
    found = [_measure(args, batch) for batch in args.batch]
    return found[0] if len(found) == 1 else found


def _parsed(args: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """The options of a row of the suite, for as many pairs as the suite was asked for."""
    parser = cli.Parser(__spec__.name, "")
    arguments(parser)
    return parser.parse_args([*words, f"--pairs={args.pairs}"])


def _measure(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Times everything at one batch; the first model is the baseline.

    `share_of_ideal` is null where a model trains in mask form, which computes
    every token and only pretends to drop.
    """
    from dyntoken.analysis import macs, timing

    if args.train and (args.vs_onnx or args.vs_openvino):
        raise cli.UsageError("--vs-onnx and --vs-openvino have no training")
    if args.teacher and not args.train:
        raise cli.UsageError("--teacher is part of a training pass: add --train")
    peers = bench_peers.check_all(args)
    models = _models(args, peers)
    if args.teacher and len(models) == 1:
        raise cli.UsageError(f"--teacher: {args.name} is dense and stands alone; give the model to be taught")
    rows: list[dict[str, Any]] = []
    runs: list[Any] = []
    with _told(batch):
        first = next(iter(models.values()))
        for name, model in models.items():
            teacher = first if args.teacher and model is not first else None
            runs.append(_program(args, model, batch, row := {"name": name, "runtime": "jax"}, teacher))
            rows.append({**row, "gmacs": macs.count(model).gmacs})
        for name in peers:
            for row, run in _peers(args, name, models, batch):
                rows.append({**row, "gmacs": rows[[*models].index(row["name"])]["gmacs"]})
                runs.append(run)
        times = timing.in_turn(runs, rounds=args.pairs, pause_s=PAUSE_S if peers else 0.0)
        for row, run, one in zip(rows, runs, times, strict=True):
            row["images_per_s"], row["latency_ms"] = one.images_per_s(batch), 1e3 * one.latency
            row["latency_percentiles_ms"] = {k: 1e3 * v for k, v in timing.latencies(run, one).items()}
            row["speed_up"] = timing.Comparison.of(times[0], one).ratio
        if args.profile:
            from dyntoken.analysis import op_classes

            for row, run in zip(rows[: len(models)], runs, strict=False):
                row["profile_ms"] = {k: 1e3 * v for k, v in op_classes.split(run).items()}
    return {
        "device": timing.device(),
        "mode": "train" if args.train else "eval",
        "train": args.train,
        "teacher": args.teacher,
        "dtype": args.dtype,
        "batch": batch,
        "pairs": args.pairs,
        "models": rows,
        **(_compared(args, list(models.values()), rows, times) if len(models) == 2 else {}),
    }


def _compared(
    args: argparse.Namespace, models: list[Any], rows: list[dict[str, Any]], times: list[Any]
) -> dict[str, Any]:
    """The second model against the first."""
    from dyntoken.analysis import timing

    masked = args.train and any(
        site.reducer(stage=stage, parent=None).resolved(True) == "mask"
        for model in models
        for stage, site in enumerate(model.sites())
    )
    pairs = timing.Comparison.of(*times[:2])
    ideal = rows[0]["gmacs"] / rows[1]["gmacs"]
    return {
        "ratio": pairs.ratio,
        "ratio_quartiles": list(pairs.spread),
        "gmac_ratio": ideal,
        "share_of_ideal": None if masked else pairs.ratio / ideal,
    }


def _program(
    args: argparse.Namespace, model: Any, batch: int, row: dict[str, Any], teacher: Any | None
) -> Any:
    """The compiled program of a model; what compiling cost and the memory it plans go into `row`.

    A teacher's forward pass is part of the training pass.
    """
    import jax
    import jax.numpy as jnp

    from dyntoken.analysis import compiling, timing

    make: Any = timing.evaluation
    if args.train:
        taught = {} if teacher is None else {"teacher": (teacher, timing.random_variables(teacher))}
        make = functools.partial(timing.training, optimizer=args.train == "step", **taught)
    program = make(
        model,
        timing.random_variables(model),
        jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32),
    )
    cost = compiling.compiled(program, timed=args.compile)
    compiling.check_memory(cost.memory, f"batch {batch} of {row['name']}")
    row |= {"first_compile_s": cost.first_s, "cached_compile_s": cost.cached_s, "planned_bytes": cost.memory}
    images = timing.random_images(model, batch)
    args_ = tuple(images if isinstance(one, jax.ShapeDtypeStruct) else one for one in program.args)
    return dataclasses.replace(program, fn=cost.executable, args=args_)


def _peers(
    args: argparse.Namespace, peer: str, models: dict[str, Any], batch: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """What a peer can run of the models: (row, run)."""
    from dyntoken.analysis import timing

    runtime = bench_peers.PEERS[peer]
    shown = f"{'torch.compile' if peer == 'vs_torch_compile' else runtime} {bench_peers.version(runtime)}"
    for name, model in models.items():
        if runtime != "torch":
            run = bench_peers.exported(
                model, timing.random_variables(model), timing.random_images(model, batch), runtime
            )
            yield {"name": name, "runtime": shown}, run
        elif getattr(model, "method", None) is None:
            options = {"train": bool(args.train), "dtype": args.dtype, "compile": peer == "vs_torch_compile"}
            yield {"name": name, "runtime": shown}, bench_peers.torch_vit(model, batch, **options)


@contextlib.contextmanager
def _told(batch: int) -> Iterator[None]:
    """Turns what a device or the machine says when its memory is full into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).lower()
        if isinstance(error, MemoryError) or "resource_exhausted" in words or "out of memory" in words:
            raise ValueError(f"batch {batch} does not fit into memory: take a smaller one") from error
        raise


def _models(args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
    """The baseline and the model, by name, built for the same images; a dense model may stand alone beside peers."""
    from dyntoken.models import OF_SITES, create_model, of_method, split_name
    from dyntoken.reducers import METHODS

    _, dense = split_name(args.name)
    other = args.vs or dense
    given = {**cli.overrides(args), "dtype": args.dtype}
    if other == args.name:
        if args.vs or not (peers or args.profile or args.compile):
            raise ValueError(f"{args.name} is dense: name a second model with --vs")
        return {args.name: create_model(args.name, **given)}
    of_methods = OF_SITES.union(*map(of_method, METHODS))
    shared = {key: value for key, value in given.items() if key not in of_methods}
    return {other: create_model(other, **shared), args.name: create_model(args.name, **given)}


def report(found: dict[str, Any] | list[dict[str, Any]]) -> str:
    """The comparison as text, one after the other."""
    if isinstance(found, list):
        return "\n\n".join(map(report, found))
    return bench_suite.report(found) if "suite" in found else _report(found)


def _report(found: dict[str, Any]) -> str:
    whole = "with AdamW" if found["train"] == "step" else "no optimizer"
    what = f"training pass (forward, loss, gradient; {whole})" if found["train"] else "evaluation"
    what += ", the second model taught by the first" if found["teacher"] else ""
    rows = [
        [
            "model",
            "by",
            "images/s",
            "ms per batch",
            "p90",
            "p99",
            "speed-up",
            "GMACs",
            "compiled in",
            "cached",
            "GiB",
        ]
    ]
    for row in found["models"]:
        tail = row["latency_percentiles_ms"]
        cells = [
            f"{row['images_per_s']:.1f}",
            f"{row['latency_ms']:.2f}",
            f"{tail['p90']:.2f}",
            f"{tail['p99']:.2f}",
        ]
        cells += [f"{row['speed_up']:.2f}", f"{row['gmacs']:.3f}"]
        for key, scale, unit in (
            ("first_compile_s", 1, " s"),
            ("cached_compile_s", 1, " s"),
            ("planned_bytes", 2**-30, ""),
        ):
            value = row.get(key)
            cells.append("-" if value is None else f"{scale * value:.2f}{unit}")
        rows.append([row["name"], row["runtime"], *cells])
    parts = [
        f"{what}, random weights, batch {found['batch']}, {found['dtype']}, {found['device']}",
        cli.table(rows),
    ]
    profiled = [row for row in found["models"] if "profile_ms" in row]
    if profiled:
        classes = dict.fromkeys(name for row in profiled for name in row["profile_ms"])
        table = [["ms of instructions, added up", *(row["name"] for row in profiled)]]
        for name in classes:
            table.append([name, *(f"{row['profile_ms'].get(name, 0.0):.2f}" for row in profiled)])
        parts.append(cli.table(table))
    if "ratio" in found:
        low, high = found["ratio_quartiles"]
        share = found["share_of_ideal"]
        ideal = (
            "training in mask form computes every token" if share is None else f"{100 * share:.0f} % of ideal"
        )
        parts.append(
            f"speed-up {found['ratio']:.2f} (quartiles {low:.2f} to {high:.2f} of {found['pairs']} pairs), "
            f"multiply-adds {found['gmac_ratio']:.2f} times fewer: {ideal}"
        )
    return "\n\n".join(parts)


MOVED = {"--input": "bench_input", "--exits": "bench_exits"}
main = cli.tool(__spec__.name, __doc__, arguments, measure, report, moved=MOVED)
if __name__ == "__main__":
    sys.exit(main())
