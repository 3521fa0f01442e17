"""Pictures of what a model keeps: `python -m dyntoken.tools.show NAME --weights=... IMAGE...`.

With `--exits`: sheets of images by the exit they take, see `sheets`. With
`--augment`: a sheet of what training sees, see `show_augment`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyntoken import data, mix
from dyntoken.analysis import draw
from dyntoken.data.decode import read_image
from dyntoken.data.resample import resize_centre
from dyntoken.models import Model
from dyntoken.preprocessing import preprocess
from dyntoken.runs import Run, load_run
from dyntoken.tools import cli, colour, sheets, show_augment
from dyntoken.weights import runs
from dyntoken.weights.whole import load_whole

TEXT = """\
Draws for each IMAGE which patches stay as tokens at every stage and, where the
method fuses, which kept patch absorbed which. One PNG per image. In the place of
NAME and --weights, the workdir of a run says both.

IMAGE is a picture file, or data:INDEX for a picture of a data set's test split
(fashion_mnist_mini:7).

--exits draws sheets of many images by the exit they take, for a model with
exits: show --exits --help. --augment CONFIG draws what training sees under a
recipe: show --augment --help."""
EXAMPLES = """\
  python -m dyntoken.tools.show runs/mine cat.jpg
  python -m dyntoken.tools.show dtps_vit_mini_patch4_28 --weights=runs/demo fashion_mnist_mini:7
  python -m dyntoken.tools.show evit_deit_small_patch16_224 --weights=evit.pth cat.jpg dog.jpg --out=kept
  python -m dyntoken.tools.show --exits --workdir=runs/dvt_demo
  python -m dyntoken.tools.show --augment configs/tps_deit.py:demo"""
OF_DATA_SET = re.compile(r"([A-Za-z_][\w/]*):(\d+)")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image as the model is to see it.

    Attributes:
      stem: file name for the result, without suffix.
      pixels: uint8 `[H, W, C]`.
      label: true class, or None.
      facts: data set it is normalised as.
    """

    stem: str
    pixels: np.ndarray
    label: int | None
    facts: data.DataInfo


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Writes one PNG per image, or with --exits or --augment sheets of many; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--exits" in argv:
        return sheets.main(argv)
    if cli.chooses(argv, "--augment"):
        return show_augment.main(argv)
    args = (parser := _parser()).parse_args(argv)
    run = _run(args, parser)
    model = cli.build(args) if run is None else run.model
    if not model.sites():
        raise ValueError(f"{args.name} is dense and keeps every token: name a method, e.g. dtps_{args.name}")
    trained = _trained_on(args.weights) if args.data is None else None
    pictures = [read(text, model, args.data, trained) for text in args.image]
    told = colour.remark([text for text in args.image if Path(text).is_file()], model.input_shape[2])
    if told:
        print(f"note: {told}", file=sys.stderr)
    paths = _targets(args.out, [picture.stem for picture in pictures])
    variables = load_whole(model, args.weights)[0] if run is None else run.variables
    apply = jax.jit(lambda variables, images: model.apply(variables, images))
    for picture, path in zip(pictures, paths, strict=True):
        out = apply(variables, normalised(picture, model)[None])
        for suffix, logits, reductions, at in views(model, out):
            title = _title(args.name + suffix, picture, logits)
            target = path.with_stem(path.stem + suffix.replace(", ", "_").replace(" ", "_"))
            noun = model.plain().site_noun
            draw.save(draw.picture(picture.pixels, reductions, at=at, noun=noun, title=title), target)
            fates = "; ".join(draw.fate(reduction).summary() for reduction in reductions)
            print(f"{target}: {fates}")
    return 0


def _run(args: Any, parser: cli.Parser) -> Run | None:
    """The run whose workdir stands in the place of a model's name, if one does."""
    if not Path(args.name).is_dir():
        if args.weights is None:
            parser.error(f"which weights of {args.name}? give --weights, or a run's workdir in place of NAME")
        return None
    if args.weights is not None or cli.overrides(args):
        raise ValueError(
            f"{args.name} is a run, which says what its model and weights are: leave the options out"
        )
    args.weights, args.name = args.name, Path(args.name).resolve().name
    return load_run(args.weights)


def _parser() -> cli.Parser:
    parser = cli.Parser("show", TEXT, EXAMPLES)
    cli.add_model(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="picture file, or data set:index")
    parser.add_argument(
        "--weights",
        help=".safetensors, .npz, .pth, a workdir, pretrained:NAME, or hf:org/name",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("shown"),
        help="folder, or a .png file for one image (default: shown)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="data set the weights were trained on, for mean, deviation and class names of picture files; "
        "by default the run's own where --weights is a workdir, else imagenet2012 in colour, "
        "fashion_mnist_mini in grey",
    )
    return parser


def _trained_on(weights: str) -> data.DataInfo | None:
    """What a run's checkpoint says of its data; None where the weights are no workdir of such a run."""
    about = runs.of_workdir(weights).get("run")
    if about is None:
        return None
    names = tuple(about["class_names"])
    return data.DataInfo(weights, len(names), None, {}, tuple(about["mean"]), tuple(about["std"]), names)


def read(
    text: str, model: Model, data_set: str | None = None, trained: data.DataInfo | None = None
) -> Picture:
    """An image by file name or as `data:INDEX`, resized and cropped for `model`.

    Args:
      text: a path, or a data set's name and a number within its test split.
      data_set: whose mean and deviation a file is normalised with.
      trained: the same, where a run says it itself.

    Raises:
      ValueError: no such file or index, or a file that is no picture.
    """
    height, width, channels = model.input_shape
    found = OF_DATA_SET.fullmatch(text)
    if found and not Path(text).exists():
        return _from_data_set(found[1], int(found[2]), (height, width), channels)
    name = data_set or ("imagenet2012" if channels == 3 else "fashion_mnist_mini")
    facts = trained or data.info(name)
    _check_channels(facts, channels)
    pixels = _open(Path(text), channels)
    if pixels.shape[:2] != (height, width):
        how = preprocess(model, name)
        pixels = resize_centre(pixels[None], how.size, how.crop_pct, how.interpolation)[0]
    return Picture(Path(text).stem, pixels, None, facts)


def _from_data_set(name: str, index: int, size: tuple[int, int], channels: int) -> Picture:
    facts = data.info(name)
    _check_channels(facts, channels)
    split = "test" if "test" in facts.splits else "validation"
    count = facts.splits[split]
    if index >= count:
        raise ValueError(f"{name}:{index} does not exist: split {split!r} has images 0 to {count - 1}")
    rows = data.eval_batches(name, split=f"{split}[{index}:{index + 1}]", batch=1, shards=1, size=size)
    batch = next(iter(rows))
    stem = f"{name.replace('/', '_')}_{index}"
    return Picture(stem, batch["image"][0], int(batch["label"][0]), facts)


def _check_channels(facts: data.DataInfo, channels: int) -> None:
    if facts.channels != channels:
        raise ValueError(
            f"{facts.name} has {facts.channels} channels, the model takes {channels}: "
            f"add --set in_chans={facts.channels}, or choose another data set"
        )


def _open(path: Path, channels: int) -> np.ndarray:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the pictures in it, as in {path / '*.jpg'}")
    try:
        return read_image(path, channels)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such picture (a data set's image is written fashion_mnist_mini:7)"
        ) from None


def normalised(picture: Picture, model: Model) -> jax.Array:
    """`[H, W, C]` float32 as the model takes it."""
    return mix.normalize(picture.pixels[None], picture.facts.mean, picture.facts.std)[0]


def _targets(out: Path, stems: Sequence[str]) -> list[Path]:
    if out.suffix.lower() == ".png":
        if len(stems) > 1:
            raise ValueError(f"--out={out} is one file, but there are {len(stems)} images: give a folder")
        return [out]
    return [out / f"{stem}.png" for stem in stems]


def views(model: Any, out: Any) -> list[tuple[str, jax.Array, tuple[Any, ...], tuple[int, ...]]]:
    """What there is to see of one image: `(suffix, logits [K], reductions, their blocks)` per reduced exit.

    One entry with an empty suffix for a model without exits.
    """
    if not model.exits:
        return [("", out.logits[0], out.reductions, model.at)]
    found, start = [], 0
    for index in range(len(model.exits)):
        at = tuple(site.at for site in model.exit_sites(index))
        mine = out.reductions[start : start + len(at)]
        start += len(at)
        if at:
            found.append((f", exit {index}", out.logits[index, 0], mine, at))
    return found


def _title(name: str, picture: Picture, logits: jax.Array) -> str:
    shares = jax.nn.softmax(logits)
    best = int(shares.argmax())
    title = f"{name}: {_class(picture.facts, best)} ({100 * float(shares[best]):.0f} %)"
    return title if picture.label is None else f"{title}, labelled {_class(picture.facts, picture.label)}"


def _class(facts: data.DataInfo, number: int) -> str:
    return facts.class_names[number] if number < len(facts.class_names) else f"class {number}"


if __name__ == "__main__":
    sys.exit(main())
