"""What sweep and search share: a checkpoint, pictures, and how well and how fast a reduced model does on them."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli

if TYPE_CHECKING:
    import numpy as np

    from dyntoken.models import Model


def add(parser: cli.Parser) -> None:
    """Adds the checkpoint, the pictures and what judges them."""
    parser.add_argument("source", metavar="SOURCE", help="weights, as load_pretrained takes them")
    parser.add_argument("--name", help="model, where the checkpoint does not tell, see load_pretrained")
    parser.add_argument("--img_size", type=cli.size, help="pixels; by default the checkpoint's")
    parser.add_argument(
        "--data", required=True, help="a data set on disk: cifar10, folder:DIR, fashion_mnist_mini"
    )
    parser.add_argument("--data_dir", help="where TFDS data sets lie")
    parser.add_argument("--split", default="test", help="pictures to judge by (default test)")
    parser.add_argument("--images", type=cli.positive, help="only so many of them, the first")
    parser.add_argument(
        "--gallery", default="train[:5000]", help="labelled pictures of a probe (default train[:5000])"
    )
    parser.add_argument(
        "--probe",
        choices=("neighbours", "linear"),
        default="neighbours",
        help="what classifies features where the checkpoint has no classifier for the data's classes",
    )
    parser.add_argument("--batch", type=cli.positive, default=16, help="images at a time (default 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type")


def load(args: argparse.Namespace) -> tuple[Model, Any]:
    """The dense model and its variables."""
    from dyntoken.models import Model
    from dyntoken.weights import load_pretrained

    given = {} if args.name is None else {"name": args.name}
    model, variables = load_pretrained(args.source, img_size=args.img_size, dtype=args.dtype, **given)
    if not isinstance(model, Model) or model.method is not None:
        raise ValueError(f"{args.source} holds no dense model of one exit, which is what is reduced here")
    return model, variables


def method_of(text: str) -> tuple[str, dict[str, Any]]:
    """`evit:fuse=drop` as the method's name and its options."""
    name, *words = text.split(":")
    return name, dict(cli.assignment(word) for word in words)


def fresh(model: Model, dense: Model) -> list[str]:
    """Arrays of a reduced model that the dense one has not."""
    from dyntoken.weights import trees

    have = trees.shapes_of(dense)
    return [path for path in trees.shapes_of(model) if path not in have]


def training_free(dense: Model) -> tuple[str, ...]:
    """Methods that the backbone takes and that add no parameters."""
    from dyntoken.models import pairings, reduced

    def adds_none(name: str) -> bool:
        try:
            return not fresh(reduced(dense, name, keep=0.9), dense)
        except ValueError:  # sites that this image size does not bear
            return False

    able = [name for name, refused in pairings(dense.arch).items() if refused is None]
    return tuple(name for name in able if adds_none(name))


def judged_by(args: argparse.Namespace, dense: Model) -> str:
    """What decides the class of a picture, in words."""
    if dense.num_classes == classes(args):
        return "its own classifier"
    return {"neighbours": "20 nearest neighbours in", "linear": "a linear probe on"}[
        args.probe
    ] + f" {args.gallery}"


def classes(args: argparse.Namespace) -> int:
    """How many classes the data set has."""
    from dyntoken import data

    return data.info(args.data, args.data_dir).num_classes


def check_data(args: argparse.Namespace, split: str) -> None:
    """Reads a picture of a split: what is missing is said ahead of all that takes time.

    Raises:
      ValueError: no such data set or split, or not on this disk.
    """
    from dyntoken import data

    found = data.eval_batches(
        args.data, split=split, batch=1, size=(32, 32), shards=1, data_dir=args.data_dir
    )
    next(iter(found))


class Judge:
    """Judges reduced models by pictures.

    Attributes:
      labels: `[N]` of the pictures.
      answers: `[N]`, the dense model's classes.
      features: `[N, C]`, what the dense model's head reads (or its logits).
    """

    def __init__(self, args: argparse.Namespace, dense: Model, variables: Any):
        self.args, self.dense, self.variables = args, dense, variables
        self.classes = classes(args)
        self.heads = dense.num_classes == self.classes
        self.pictures, self.labels = self._read(args.split, args.images)
        if not self.heads:
            pictures, self._labels = self._read(args.gallery, None)
            self._gallery = self.encode(dense, pictures)
        self.features = self.encode(dense)
        self.answers = self.classify(self.features)

    def _read(self, split: str, count: int | None) -> tuple[np.ndarray, np.ndarray]:
        """uint8 pictures of the model's size and their labels."""
        import numpy as np

        from dyntoken import data, preprocessing

        height, width, channels = self.dense.input_shape
        ready = preprocessing.preprocess(self.dense)
        options = {"crop_pct": ready.crop_pct, "interpolation": ready.interpolation}
        images, labels, seen = [], [], 0
        for batch in data.eval_batches(
            self.args.data,
            split=split,
            batch=64,
            size=(height, width),
            shards=1,
            data_dir=self.args.data_dir,
            **options,
        ):
            real = batch["mask"] > 0
            images.append(batch["image"][real])
            labels.append(batch["label"][real])
            seen += int(real.sum())
            if count is not None and seen >= count:
                break
        if images[0].shape[-1] != channels:
            raise ValueError(
                f"{self.args.data} has {images[0].shape[-1]} channels, the model takes {channels}"
            )
        return np.concatenate(images)[:count], np.concatenate(labels)[:count]

    def encode(self, model: Model, pictures: np.ndarray | None = None) -> np.ndarray:
        """What a model says of pictures (by default those to judge by): logits, or pooled features `[N, C]`."""
        import jax
        import numpy as np

        from dyntoken import preprocessing

        pictures = self.pictures if pictures is None else pictures
        ready = preprocessing.preprocess(self.dense)
        batch = min(self.args.batch, len(pictures))

        @jax.jit
        def forward(variables: Any, images: Any) -> Any:
            if self.heads:
                return model.apply(variables, images).logits
            return model.apply(variables, images, method="features").pooled

        rows = []
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            full = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            rows.append(np.asarray(forward(self.variables, ready(full)), np.float32)[: len(part)])
        return np.concatenate(rows)

    def classify(self, rows: np.ndarray) -> np.ndarray:
        """Classes `[N]` of what `encode` returned."""
        from dyntoken.analysis import probes

        if self.heads:
            return rows.argmax(axis=1)
        return probes.PROBES[self.args.probe](self._gallery, self._labels, rows, self.classes)

    def classes_of(self, model: Model) -> np.ndarray:
        """A reduced model's classes `[N]`."""
        return self.classify(self.encode(model))

    def accuracy(self, answers: np.ndarray) -> float | None:
        """Share of the pictures whose class is right; None without labels."""
        return float((answers == self.labels).mean()) if self.classes > 1 else None

    def agreement(self, answers: np.ndarray) -> float:
        """Share of the pictures that get the dense model's class."""
        return float((answers == self.answers).mean())


class Clock:
    """Times reduced models beside the dense one, which is compiled once."""

    def __init__(self, args: argparse.Namespace, dense: Model, variables: Any):
        self.batch, self.dense, self.variables = args.batch, dense, variables

    def _run(self, model: Model) -> Any:
        import jax

        from dyntoken.analysis import timing

        images = timing.random_images(model, self.batch)
        return timing.evaluation(model, jax.device_put(self.variables), images)

    @functools.cached_property
    def _dense_run(self) -> Any:
        return self._run(self.dense)

    def speed(self, model: Model, pairs: int) -> tuple[float, float]:
        """Speed-up over the dense model, median of pairs, and images/s."""
        from dyntoken.analysis import timing

        timed = timing.compare(self._dense_run, self._run(model), pairs=pairs)
        return timed.ratio, timed.second.images_per_s(self.batch)
