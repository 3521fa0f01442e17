"""Pictures of what a model keeps.

A row per IMAGE: the image, what is left of it after each stage, which patch stands for which, and the
scores that decided. NAME is a model; a run's workdir, or a file of weights that says what model it is of; or, with such
--weights, a method alone (also with options, evit:fuse=drop). --vs puts other models or methods
below. With --html, also a page with a slider over keep rates, on which the patches
that a token stands for light up.

IMAGE is a picture file, or data:INDEX for a picture of a data set's test split
(fashion_mnist_mini:7).

Sheets of many images by the exit they take are drawn by show_exits, what training
sees under a recipe by show_augmentation.

examples:
  python -m dyntoken.tools.show runs/mine cat.jpg
  python -m dyntoken.tools.show etps --weights=dinov2_small --img_size=336 --vs=evit cat.jpg --html=cat.html
  python -m dyntoken.tools.show runs/demo fashion_mnist_mini:7
  python -m dyntoken.tools.show evit_deit_small_patch16_224 --weights=evit.pth cat.jpg dog.jpg --out=both.png
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli

if TYPE_CHECKING:
    import numpy as np

    from dyntoken.analysis.token_strips import Row
    from dyntoken.models import Model
    from dyntoken.preprocessing import Preprocess
    from dyntoken.tools.shown_models import Shown

RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
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

    def caption(self, logits: Any) -> str:
        """What the model says of it, and what it is; empty for a model without classes."""
        import jax

        if not len(self.classes):
            return "" if self.label is None else self._class(self.label)
        shares = jax.nn.softmax(logits)
        best = int(shares.argmax())
        said = f"{self._class(best)}, {100 * float(shares[best]):.0f} %"
        return said if self.label in (None, best) else f"{said}, labelled {self._class(self.label)}"

    def _class(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else f"class {number}"


def arguments(parser: cli.Parser) -> None:
    """The options."""
    cli.add_model(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="picture file, or data set:index")
    parser.add_argument(
        "--weights",
        help=".safetensors, .npz, .pth, a folder with config.json, a workdir, pretrained:NAME, or hf:org/name",
    )
    parser.add_argument(
        "--vs",
        action="append",
        default=[],
        metavar="NAME",
        help="another model, run or method, below the first; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("shown"),
        help="folder for a file per image, or a .png file with a row per image (default: shown)",
    )
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="also write a page with a slider")
    parser.add_argument(
        "--rates",
        type=cli.floats,
        default=RATES,
        help=f"keep rates of that page (default {','.join(map(str, RATES))})",
    )
    parser.add_argument("--colours", type=cli.positive, help="of the PNG, up to 256: a smaller file")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="data set the weights were trained on, for mean, deviation and class names of picture files; "
        "by default what the weights or the model's name say",
    )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes the pictures and the page: their files, and what becomes of the patches at each site."""
    from dyntoken.analysis import token_strips
    from dyntoken.tools import colour, shown_models

    if args.html and any(not 0 < rate <= 1 for rate in args.rates):
        raise ValueError(f"--rates={','.join(map(str, args.rates))}: keep rates lie in (0, 1]")
    if args.colours and not 2 <= args.colours <= 256:
        raise ValueError(f"--colours={args.colours}: a PNG with a palette has 2 to 256")
    models = shown_models.of(args)
    first = models[0]
    pictures = [
        read(text, first.model, args.data, None if args.data else first.trained) for text in args.image
    ]
    told = colour.remark([text for text in args.image if Path(text).is_file()], first.model.input_shape[2])
    if told:
        print(f"note: {told}", file=sys.stderr)
    for model in models:
        model.load()
    found = [[rows(model, picture, len(models) > 1) for model in models] for picture in pictures]
    title = " and ".join(model.title for model in models)
    if first.model.arch not in title:
        title += f" on {first.model.arch}"
    results: list[dict[str, Any]] = []
    single = args.out.suffix.lower() == ".png"
    sheets = {args.out: list(range(len(pictures)))} if single else {}
    if not single:
        for number, picture in enumerate(pictures):
            sheets.setdefault(args.out / f"{picture.stem}.png", []).append(number)
    for path, numbers in sheets.items():
        together = [row for number in numbers for row in itertools.chain(*found[number])]
        save(token_strips.strip(together, title=title), path, args.colours)
        for row in together:
            named = zip(row.stages, row.fates, strict=True)
            patches = [f"{stage}: {fate.summary()}" for stage, fate in named]
            results.append(
                {"file": str(path), "image": row.name, "model": row.label or title, "says": row.caption}
                | {"patches": patches, "drawn": row.drawn()}
            )
    if args.html:
        results.append({"file": str(args.html), "patches": [write_page(args, models, pictures, title)]})
    return results


def rows(shown: Shown, picture: Picture, several: bool) -> list[Row]:
    """A row per reduced exit of a model."""
    from dyntoken.analysis import token_strips

    out = shown(picture.preprocess(picture.pixels)[None])
    model, found = shown.model, []
    for suffix, logits, reductions, at in views(model, out):
        stages = [f"{model.plain().site_noun} {number}" for number in at]
        label = (shown.title if several else "") + suffix
        words = {"label": label.removeprefix(", "), "name": picture.stem, "caption": picture.caption(logits)}
        found.append(token_strips.row(picture.pixels, reductions, stages, **words))
    return found


def save(figure: Any, path: Path, colours: int | None) -> None:
    """Writes a figure, with a palette of so many colours or all."""
    from dyntoken.analysis import figures

    figures.save(figure, path)
    if colours:
        from PIL import Image

        with Image.open(path) as image:
            full = image.convert("RGB")
        small = full.quantize(palette=full.quantize(colours), dither=Image.Dither.FLOYDSTEINBERG)
        small.save(path, optimize=True)


def write_page(
    args: argparse.Namespace, models: Sequence[Shown], pictures: Sequence[Picture], title: str
) -> str:
    """Writes the page; returns what is on it."""
    from dyntoken.analysis import token_page

    rates = sorted(set(args.rates), reverse=True)
    of_rates: list[list[list[Row]]] = [[] for _ in pictures]  # [picture][model and exit][rate]
    for shown in models:
        by_rate = []
        for rate in rates:
            at_rate = shown.at(rate)
            by_rate.append([rows(at_rate, picture, True) for picture in pictures])
        for number, views in enumerate(of_rates):
            views += map(list, zip(*(found[number] for found in by_rate), strict=True))
    start = min(range(len(rates)), key=lambda index: abs(rates[index] - 0.7))
    args.html.parent.mkdir(parents=True, exist_ok=True)
    text = token_page.page(of_rates, rates, start=start, title=f"What is left: {title}")
    args.html.write_text(text)
    counts = f"{cli.counted(len(pictures), 'picture')}, {cli.counted(len(rates), 'keep rate')}"
    return f"{counts}, {len(text) / 1e3:.0f} kB"


def read(text: str, model: Model, trained_on: str | None = None, weights: str | None = None) -> Picture:
    """An image by file name or as `data:INDEX`, resized and cropped for `model`.

    Args:
      text: a path, or a data set's name and a number within its test split.
      trained_on: data set whose mean, deviation and class names a file gets.
      weights: the class names that these tell come first.

    Raises:
      ValueError: no such file or index, or a file that is no picture.
    """
    from dyntoken import data
    from dyntoken.data.decode import read_image
    from dyntoken.data.resample import resize_centre
    from dyntoken.preprocessing import preprocess
    from dyntoken.weights import class_names

    height, width, channels = model.input_shape
    found = OF_DATA_SET.fullmatch(text)
    if found and not Path(text).exists():
        return _of_data_set(found[1], int(found[2]), model)
    how = preprocess(model, trained_on)
    known = data.info(trained_on or ("imagenet2012" if channels == 3 else "fashion_mnist_mini"))
    classes = class_names(weights) if weights else ()
    if not classes and (trained_on or not model.prepared):  # else these are other classes than the known ones
        classes = known.class_names
    if len(classes) != model.num_classes:
        classes = [f"class {number}" for number in range(model.num_classes)]
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
    how = preprocess(model, None if model.prepared else name)
    one = {"split": f"{split}[{index}:{index + 1}]", "batch": 1, "shards": 1, "size": (height, width)}
    reading = {"crop_pct": how.crop_pct, "interpolation": how.interpolation}
    batch = next(iter(data.eval_batches(name, **one, **reading)))
    stem, label = f"{name.replace('/', '_')}_{index}", int(batch["label"][0])
    return Picture(stem, batch["image"][0], how, facts.class_names, label)


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


def report(found: list[dict[str, Any]]) -> str:
    """A line per file, image and model; of many sites those in the picture."""
    lines = []
    for row in found:
        about = ", ".join(row[key] for key in ("image", "model", "says") if row.get(key))
        patches = [row["patches"][site] for site in row.get("drawn", (0,))]
        lines.append(f"{row['file']}: {about + ': ' if about else ''}{'; '.join(patches)}")
    return "\n".join(lines)


MOVED = {"--exits": "show_exits", "--augment": "show_augmentation"}
main = cli.tool(__spec__.name, __doc__, arguments, measure, report, moved=MOVED)
if __name__ == "__main__":
    sys.exit(main())
