"""Pictures of what a model keeps.

Draws for each IMAGE which patches stay as tokens at every stage and, where the
method fuses, which kept patch absorbed which. One PNG per image. In the place of
NAME and --weights, the workdir of a run says both.

IMAGE is a picture file, or data:INDEX for a picture of a data set's test split
(fashion_mnist_mini:7).

Sheets of many images by the exit they take are drawn by show_exits, what training
sees under a recipe by show_augmentation.

examples:
  python -m dyntoken.tools.show runs/mine cat.jpg
  python -m dyntoken.tools.show dtps_vit_mini_patch4_28 --weights=runs/demo fashion_mnist_mini:7
  python -m dyntoken.tools.show evit_deit_small_patch16_224 --weights=evit.pth cat.jpg dog.jpg --out=kept
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli

if TYPE_CHECKING:
    import numpy as np

    from dyntoken.models import Model
    from dyntoken.preprocessing import Preprocess

OF_DATA_SET = re.compile(r"([A-Za-z_][\w/]*):(\d+)")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image as the model is to see it.

    Attributes:
      stem: file name for the result, without suffix.
      pixels: uint8 `[H, W, C]`, of the model's size.
      preprocess: how they are normalised.
      classes: names of the classes, () for none.
      label: true class, or None.
    """

    stem: str
    pixels: np.ndarray
    preprocess: Preprocess
    classes: Sequence[str]
    label: int | None = None

    def title(self, name: str, logits: Any) -> str:
        """What the model says of it, and what it is."""
        import jax

        shares = jax.nn.softmax(logits)
        best = int(shares.argmax())
        title = f"{name}: {self._class(best)} ({100 * float(shares[best]):.0f} %)"
        return title if self.label is None else f"{title}, labelled {self._class(self.label)}"

    def _class(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else f"class {number}"


def arguments(parser: cli.Parser) -> None:
    """The options."""
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


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes one PNG per image and reduced exit: its file, and what becomes of the patches at each site."""
    is_run = _is_run(args)
    import jax

    from dyntoken.analysis import figures, token_maps
    from dyntoken.runs import load_run
    from dyntoken.tools import colour
    from dyntoken.weights import load_whole

    run = load_run(args.name) if is_run else None
    model = cli.build(args) if run is None else run.model
    name = args.name if run is None else Path(args.name).resolve().name
    if not model.sites():
        raise ValueError(f"{name} is dense and keeps every token: name a method, e.g. dtps_{name}")
    weights = args.weights if run is None else args.name
    pictures = [read(text, model, args.data, None if args.data else weights) for text in args.image]
    told = colour.remark([text for text in args.image if Path(text).is_file()], model.input_shape[2])
    if told:
        print(f"note: {told}", file=sys.stderr)
    single = args.out.suffix.lower() == ".png"
    if single and len(pictures) > 1:
        raise ValueError(f"--out={args.out} is one file, but there are {len(pictures)} images: give a folder")
    variables = load_whole(model, weights)[0] if run is None else run.variables
    apply = jax.jit(lambda variables, images: model.apply(variables, images))
    rows = []
    for picture in pictures:
        path = args.out if single else args.out / f"{picture.stem}.png"
        out = apply(variables, picture.preprocess(picture.pixels)[None])
        for suffix, logits, reductions, at in views(model, out):
            target = path.with_stem(path.stem + suffix.replace(", ", "_").replace(" ", "_"))
            about = {"noun": model.plain().site_noun, "title": picture.title(name + suffix, logits)}
            figures.save(token_maps.picture(picture.pixels, reductions, at=at, **about), target)
            fates = [token_maps.fate(reduction).summary() for reduction in reductions]
            rows.append({"file": str(target), "patches": fates})
    return rows


def _is_run(args: argparse.Namespace) -> bool:
    """Whether a run's workdir stands in the place of a model's name."""
    if not Path(args.name).is_dir():
        if args.weights is None:
            raise cli.UsageError(
                f"which weights of {args.name}? give --weights, or a run's workdir in place of NAME"
            )
        return False
    if args.weights is not None or cli.overrides(args):
        raise ValueError(
            f"{args.name} is a run, which says what its model and weights are: leave the options out"
        )
    return True


def read(text: str, model: Model, trained_on: str | None = None, weights: str | None = None) -> Picture:
    """An image by file name or as `data:INDEX`, resized and cropped for `model`.

    Args:
      text: a path, or a data set's name and a number within its test split.
      trained_on: data set whose mean, deviation and class names a file gets.
      weights: where they are a run's workdir, it says these itself.

    Raises:
      ValueError: no such file or index, or a file that is no picture.
    """
    from dyntoken import data
    from dyntoken.data.decode import read_image
    from dyntoken.data.resample import resize_centre
    from dyntoken.preprocessing import preprocess
    from dyntoken.weights import runs

    height, width, channels = model.input_shape
    found = OF_DATA_SET.fullmatch(text)
    if found and not Path(text).exists():
        return _of_data_set(found[1], int(found[2]), model)
    trained_on = trained_on or ("imagenet2012" if channels == 3 else "fashion_mnist_mini")
    how, classes = preprocess(model, trained_on), data.info(trained_on).class_names
    about = runs.of_workdir(weights).get("run") if weights else None
    if about is not None:
        how = dataclasses.replace(how, mean=tuple(about["mean"]), std=tuple(about["std"]))
        classes = about["class_names"]
    if Path(text).is_dir():
        raise ValueError(f"{text} is a folder: name the pictures in it, as in {Path(text) / '*.jpg'}")
    try:
        pixels = read_image(Path(text), channels)
    except FileNotFoundError:
        raise ValueError(
            f"{text}: no such picture (a data set's image is written fashion_mnist_mini:7)"
        ) from None
    if pixels.shape[:2] != (height, width):
        pixels = resize_centre(pixels[None], how.size, how.crop_pct, how.interpolation, squash=how.squash)[0]
    return Picture(Path(text).stem, pixels, how, classes)


def _of_data_set(name: str, index: int, model: Model) -> Picture:
    from dyntoken import data
    from dyntoken.preprocessing import preprocess

    facts, (height, width, channels) = data.info(name), model.input_shape
    if facts.channels != channels:
        raise ValueError(
            f"{name} has {facts.channels} channels, the model takes {channels}: "
            f"add --set in_chans={facts.channels}, or choose another data set"
        )
    split = "test" if "test" in facts.splits else "validation"
    if index >= facts.splits[split]:
        last = facts.splits[split] - 1
        raise ValueError(f"{name}:{index} does not exist: split {split!r} has images 0 to {last}")
    one = f"{split}[{index}:{index + 1}]"
    batch = next(iter(data.eval_batches(name, split=one, batch=1, shards=1, size=(height, width))))
    stem, label = f"{name.replace('/', '_')}_{index}", int(batch["label"][0])
    return Picture(stem, batch["image"][0], preprocess(model, name), facts.class_names, label)


def views(model: Any, out: Any) -> list[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """What there is to see of one image: `(suffix, logits [K], reductions, their blocks)` per reduced exit.

    One entry with an empty suffix for a model without exits.
    """
    if not model.exits:
        return [("", out.logits[0], out.reductions, model.at)]
    found, reductions = [], iter(out.reductions)
    for index in range(len(model.exits)):
        at = tuple(site.at for site in model.exit_sites(index))
        mine = tuple(next(reductions) for _ in at)
        if at:
            found.append((f", exit {index}", out.logits[index, 0], mine, at))
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """A line per file."""
    return "\n".join(f"{row['file']}: {'; '.join(row['patches'])}" for row in rows)


MOVED = {"--exits": "show_exits", "--augment": "show_augmentation"}
main = cli.tool(__spec__.name, __doc__, arguments, measure, report, moved=MOVED)
if __name__ == "__main__":
    sys.exit(main())
