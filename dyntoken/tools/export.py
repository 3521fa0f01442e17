"""A model as files that run without this package.

Writes `jax.export` programs for any batch size, one per platform (of a model
with exits one per exit, too), and ONNX files, and runs them beside the model:
logits and kept tokens at batch 1, 7 and 32. What does not agree is deleted. In
the place of NAME and --weights, the workdir of a run says both.

A program for a platform that is not at hand is checked by its operators, run
here. Where two scores are equal to the accuracy of float32, another row may be
kept, or go to another host: such images are counted under "ties". An earlier
export in the folder is replaced, which is said.

examples:
  python -m dyntoken.tools.export runs/mine --out=exported
  python -m dyntoken.tools.export dtps_deit_small_patch16_224 --weights=dtps.safetensors --out=dtps --platforms=tpu
  python -m dyntoken.tools.export runs/mine --out=exported --format=jax,onnx --normalise --bench
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli

if TYPE_CHECKING:
    from dyntoken.models import Model

BATCHES = (1, 7, 32)
PAIRS = 10  # timed in turn


def arguments(parser: cli.Parser) -> None:
    """The options."""
    cli.add_model(parser)
    parser.add_argument(
        "--weights", help=".safetensors, .npz, .pth, a workdir, pretrained:NAME, or hf:org/name"
    )
    cli.add_prefer(parser)
    parser.add_argument("--out", required=True, help="folder to write, or a URI")
    parser.add_argument(
        "--format", type=_words, default=("jax",), help="jax, onnx or jax,onnx (default: jax)"
    )
    parser.add_argument(
        "--platforms",
        type=_words,
        default=("cpu", "cuda", "tpu"),
        help="of the jax programs: some of cpu, cuda, rocm, tpu (default: cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--normalise", action="store_true", help="programs take uint8 images and normalise them themselves"
    )
    parser.add_argument("--bench", action="store_true", help="time the files beside the model")
    parser.add_argument(
        "--batch",
        type=cli.positive,
        default=16,
        help="images at a time that --bench times besides 1 (default 16)",
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes, checks and perhaps times; what disagrees is deleted and a reason to fail."""
    from dyntoken import exporting
    from dyntoken.exporting import folder

    before = folder.present(args.out)
    model, variables, about = _opened(args)
    exporting.export(model, variables, args.out, args.platforms, args.normalise, formats=args.format, **about)
    try:
        checked = exporting.check(args.out, model, variables, batches=BATCHES)
    except BaseException:
        folder.remove(args.out)  # nobody knows what it computes
        raise
    rows = [
        {
            **{name: getattr(one, name) for name in ("file", "how", "batch", "error", "sets", "ties")},
            "agrees": one.agrees,
        }
        for one in checked
    ]
    images = folder.read_about(folder.paths.resolve(args.out))["programs"][0]["inputs"][folder.IMAGES]
    result = {"written": args.out, "checked": rows, "sites": len(model.sites()), "input": images}
    result["replaced"] = folder.summary(before) if before else None
    result["failed"] = [f"{line}; {args.out} is deleted" for line in exporting.disagreements(checked)]
    if result["failed"]:
        folder.remove(args.out)
    elif args.bench:
        result["times"] = [
            row for batch in sorted({1, args.batch}) for row in _times(args, model, variables, batch)
        ]
    return result


def _opened(args: argparse.Namespace) -> tuple[Model, Any, dict[str, Any]]:
    """The model, its variables, and what is known of its images and classes."""
    if cli.is_folder(args.name):
        if args.weights or cli.overrides(args):
            raise cli.UsageError(
                f"{args.name} is a run's workdir, which says all itself; to change its model, give the model's "
                f"NAME and --weights={args.name}"
            )
        from dyntoken.runs import load_run

        run = load_run(args.name, prefer=args.prefer)
        return run.model, run.variables, {"preprocess": run.preprocess, "class_names": run.class_names}
    if args.weights is None:
        raise cli.UsageError("give --weights, or a run's workdir in the place of NAME")
    from dyntoken.weights import class_names, load_whole, prepared

    model = cli.build(args)
    variables, _ = load_whole(model, args.weights, prefer=args.prefer)
    model = prepared(model, args.weights)
    names = class_names(args.weights)
    return model, variables, {"class_names": names} if len(names) == model.num_classes else {}


def _times(args: argparse.Namespace, model: Model, variables: Any, batch: int) -> list[dict[str, Any]]:
    """Each file that runs here, in turn with the model itself."""
    import numpy as np

    from dyntoken.analysis import timing
    from dyntoken.exporting import checking, folder

    images = timing.random_images(model, batch)
    own = timing.evaluation(model, variables, images)
    given = np.zeros(images.shape, np.uint8) if args.normalise else np.asarray(images)
    rows: list[dict[str, Any]] = []
    about = folder.read_about(folder.paths.resolve(args.out))
    for file, how, step in checking.runners(args.out, model, variables):
        if how == checking.ELSEWHERE:
            continue
        found = timing.compare(own, functools.partial(folder.run_all, about, step, given), pairs=PAIRS)
        if not rows:
            rows.append(_row("the model", "jax", batch, found.first.latency, 1.0))
        rows.append(_row(file, how, batch, found.second.latency, found.ratio))
    return rows


def _row(file: str, how: str, batch: int, latency: float, ratio: float) -> dict[str, Any]:
    return {"file": file, "how": how, "batch": batch, "ms": 1e3 * latency, "speed_up": ratio}


def report(found: dict[str, Any]) -> str:
    """What was checked, and the times."""
    rows = [["file", "run by", "batch", "logits off by", "kept sets", "ties", ""]]
    for one in found["checked"]:
        sets = "-" if not found["sites"] else "equal" if one["sets"] else "differ"
        verdict = "agrees" if one["agrees"] else "DISAGREES"
        rows.append(
            [
                one["file"],
                one["how"],
                str(one["batch"]),
                f"{one['error']:.1e}",
                sets,
                str(one["ties"]),
                verdict,
            ]
        )
    parts = [cli.table(rows)]
    if "times" in found:
        rows = [["file", "run by", "batch", "ms per batch", "speed-up"]]
        for one in found["times"]:
            rows.append(
                [one["file"], one["how"], str(one["batch"]), f"{one['ms']:.2f}", f"{one['speed_up']:.2f}"]
            )
        parts.append(cli.table(rows))
    said = [f"replaced what was in {found['written']}: {found['replaced']}"] if found["replaced"] else []
    if not found["failed"]:
        shape = ", ".join(map(str, found["input"]["shape"]))
        said += [f"input: {found['input']['type']} [{shape}]", f"written: {found['written']}"]
    return "\n\n".join([*parts, *(["\n".join(said)] if said else [])])


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
