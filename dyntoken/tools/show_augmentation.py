"""Sheets of what training sees.

A sheet of what training sees under a recipe: images of its training split, each
several times. Of every image the upper line is what the data gives (crop, flip,
RandAugment or colour jitter), the lower line what the model gets (erased and
mixed), normalisation undone. Each column is drawn like one training step.

The recipe's data set must be on disk; --data shows other images in its place.

examples:
  python -m dyntoken.tools.show_augmentation configs/tps_deit.py:demo
  python -m dyntoken.tools.show_augmentation configs/tps_deit.py --data=folder:photos --out=seen.png
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyntoken.tools import cli

if TYPE_CHECKING:
    from dyntoken.data import DataInfo
    from dyntoken.train.settings import DataSettings, Settings

SIDE = 1.3  # inches of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Seen:
    """Draws of some images, uint8.

    Attributes:
      stored: `[N, H, W, C]`, resized and cropped at the centre.
      drawn: `[N, D, H, W, C]`, as the data gives them.
      fed: `[N, D, H, W, C]`, as the model gets them, normalisation undone.
      labels: `[N]`.
      targets: `[N, D, K]`.
      rows: `[N]` positions in the split.
    """

    stored: np.ndarray
    drawn: np.ndarray
    fed: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    rows: np.ndarray


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("config", metavar="CONFIG", help="recipe, configs/FILE.py[:args]")
    parser.add_argument(
        "--data", metavar="DATA", help="images of this data set (split train) in place of the recipe's"
    )
    parser.add_argument("--data_dir", help="where TFDS data lies (default: the recipe's, or $TFDS_DATA_DIR)")
    parser.add_argument("--images", type=_even, default=4, help="how many, an even number (default 4)")
    parser.add_argument("--draws", type=cli.positive, default=6, help="of each image (default 6)")
    parser.add_argument(
        "--out", type=Path, default=Path("shown/augment.png"), help="file (default: shown/augment.png)"
    )


def _even(text: str) -> int:
    count = cli.positive(text)
    if count % 2:
        raise argparse.ArgumentTypeError(f"{text} is odd: mixup pairs images, give an even number")
    return count


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the sheet."""
    from dyntoken import config as recipes
    from dyntoken import data
    from dyntoken.analysis import figures
    from dyntoken.train.settings import read

    config = recipes.load(args.config).to_dict()
    if args.data:
        config["data"] |= {"name": args.data, "split": "train", "options": {}}
    if args.data_dir:
        config["data"]["data_dir"] = args.data_dir
    settings = read(config)
    chosen = settings.data
    try:
        known = data.info(chosen.name, chosen.data_dir, **chosen.options)
        seen = look(chosen, settings.mix, known, seed=settings.seed, images=args.images, draws=args.draws)
    except data.MissingDataError as error:
        raise data.MissingDataError(
            f"{error}; to see the recipe on other images add --data=folder:DIR or --data=NAME"
        ) from error
    title = f"What training sees: {args.config}, images of {known.name}"
    figures.save(draw(seen, known.class_names, title, note(settings)), args.out)
    return {"file": str(args.out), "data.augment": dict(chosen.augment or {}), "mix": dict(settings.mix)}


def report(result: Mapping[str, Any]) -> str:
    """The file, and what was asked for."""
    spelt = {key: ", ".join(f"{k}={v}" for k, v in result[key].items()) for key in ("data.augment", "mix")}
    return "\n".join([result["file"], *(f"{key}: {value}" for key, value in spelt.items())])


def look(
    chosen: DataSettings,
    mixing: Mapping[str, Any],
    known: DataInfo,
    *,
    seed: int,
    images: int,
    draws: int,
) -> Seen:
    """Draws images spread evenly over the training split as training does.

    The draws are of the same distribution as a run's, not those of one of its
    steps, and the rows of a column are mixed like a batch of their own.

    Args:
      chosen: the recipe's data, with its augmentation.
      mixing: keywords of `device_augment.mix`.
      known: of the data set.
      seed: of all draws.
      images: how many, even.
      draws: of each.

    Raises:
      DataError: see the message.
    """
    import jax

    from dyntoken import data, device_augment
    from dyntoken.data.requests import check_size
    from dyntoken.data.splits import parse_split

    parts = parse_split(chosen.name, chosen.split, known.splits)
    rows = _spread(parts, images)
    size = check_size(chosen.size, known.image_shape)
    source = {"size": size, "shards": 1, "data_dir": chosen.data_dir, **chosen.options}
    crop = {key: chosen.eval[key] for key in ("crop_pct", "interpolation") if key in chosen.eval}
    augment = {**chosen.augment, "repeats": 1} if chosen.augment is not None else None
    stored, drawn, labels = [], [], []
    for name, row in rows:
        one = f"{name}[{row}:{row + 1}]"
        first = next(data.eval_batches(chosen.name, split=one, batch=1, **source, **crop))
        # The same row several times over: as many examples, each with draws of its own.
        many = next(
            data.train_batches(
                chosen.name,
                split=[one] * draws,
                batch=draws,
                seed=seed + len(stored),  # else all images would be changed alike
                augment=augment,
                **source,
            )
        )
        stored.append(first["image"][0])
        labels.append(first["label"][0])
        drawn.append(many["image"])
    drawn, labels = np.stack(drawn), np.array(labels)
    mean = known.mean if chosen.mean is None else chosen.mean
    std = known.std if chosen.std is None else chosen.std

    @jax.jit
    def feed(step, pixels):
        key = jax.random.fold_in(jax.random.key(seed), step)
        normal = device_augment.normalize(pixels, mean, std)
        return device_augment.mix(
            key, normal, labels, np.arange(images), num_classes=known.num_classes, **mixing
        )

    fed, targets = zip(*(jax.device_get(feed(step, drawn[:, step])) for step in range(draws)), strict=True)
    plain = np.stack(fed, 1) * np.array(std, np.float32) + np.array(mean, np.float32)
    return Seen(
        stored=np.stack(stored),
        drawn=drawn,
        fed=np.rint(255 * plain.clip(0, 1)).astype(np.uint8),
        labels=labels,
        targets=np.stack(targets, 1),
        rows=np.array([row for _, row in rows]),
    )


def _spread(parts: Sequence[tuple[str, int, int]], images: int) -> list[tuple[str, int]]:
    """(split, row) of images spread evenly over the parts."""
    from dyntoken.data.splits import count_rows, slice_parts

    count = count_rows(parts)
    if count < images:
        raise ValueError(f"the training split has {count} images, and --images asks for {images}")
    wanted = [(2 * n + 1) * count // (2 * images) for n in range(images)]
    return [(name, start) for row in wanted for name, start, _ in slice_parts(parts, row, row + 1)]


def note(settings: Settings) -> str:
    """What the lines of the sheet show, under this recipe."""
    from dyntoken.data import AugmentOptions

    augment = AugmentOptions.of(settings.data.augment)
    steps = [f"crop ({augment.crop})"] if augment.crop != "none" else ["centre crop"]
    steps += ["flip"] if augment.flip else []
    steps += ["RandAugment"] if augment.rand_augment else []
    steps += ["colour jitter"] if augment.color_jitter else []
    lower = ["erased"] if settings.mix.get("erase") else []
    mixed = max(settings.mix.get("mixup", 1), settings.mix.get("cutmix", 1)) > 0
    lower += ["mixed with the neighbouring image"] if mixed else []
    text = f"Upper lines: {', '.join(steps)}. Lower lines: as the model gets them"
    text += f", {' and '.join(lower)}" if lower else ""
    text += "; shares of its own label and of the other."
    if augment.repeats > 1:
        text += f"\nRepeated augmentation: {augment.repeats} such views of an image in an epoch."
    if settings.model.get("mix_token"):
        text += "\nMixToken mixes inside the model and is not shown."
    return text


def draw(seen: Seen, names: Sequence[str], title: str, text: str) -> Any:
    """The figure: what `look` drew, with the classes' names, a title above and a text below."""
    from dyntoken.analysis import contact_sheet

    groups = []
    for n, label in enumerate(seen.labels):
        name = _short(names[label] if label < len(names) else f"class {label}")
        above = [contact_sheet.Cell(seen.stored[n]), *(contact_sheet.Cell(image) for image in seen.drawn[n])]
        pairs = zip(seen.fed[n], seen.targets[n], strict=True)
        below = [contact_sheet.Cell(image, shares(target, label)) for image, target in pairs]
        groups.append(contact_sheet.Group(f"{name}\nimage {seen.rows[n]}", [above, [None, *below]]))
    columns = ("centre crop", *(f"draw {n + 1}" for n in range(seen.drawn.shape[1])))
    return contact_sheet.sheet(groups, columns=columns, title=title, note=text, side=SIDE)


def shares(target: np.ndarray, label: int) -> str:
    """A soft target in per cent: `92 %`, or `38 % + 55 %` where another image's label is mixed in."""
    others = np.sort(np.delete(target, label))
    own = f"{100 * target[label]:.0f} %"
    alone = len(others) < 2 or others[-1] - others[-2] < 1e-6
    return own if alone else f"{own} + {100 * others[-1]:.0f} %"


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
