"""Speed of the input of a recipe.

Times how fast training images are made as CONFIG asks (decoding of the crop,
resizing, flip, RandAugment, batching) against decoding the same JPEGs alone, in
turn and on the same cores. Random erasing and mixup run on the device and are
not part of it.

The images are made from the photographs that scikit-image and scikit-learn
ship, 500 x 375 pixels as ImageNet's are: the data set itself is not needed.

examples:
  python -m dyntoken.tools.bench_input configs/tps_deit.py
  python -m dyntoken.tools.bench_input configs/dynamicvit_deit.py --batch=128 --steps=20 --json
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyntoken import config as recipes
from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import MissingDataError
from dyntoken.data.info import DataInfo
from dyntoken.data.known_datasets import IMAGENET_MEAN, IMAGENET_STD
from dyntoken.data.requests import TrainRequest, check_size
from dyntoken.data.stream import Records, StreamSource
from dyntoken.data.tf_image import eval_view
from dyntoken.data.tf_import import tf
from dyntoken.tools import cli

PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
SHAPE, QUALITY = (375, 500), 95
_READY = 320  # more images than the input keeps ready, in TensorFlow and out of it


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("config", metavar="CONFIG", help="recipe, configs/FILE.py[:args]")
    parser.add_argument("--batch", type=cli.positive, default=64, help="images per batch (default 64)")
    parser.add_argument("--steps", type=cli.positive, default=8, help="batches per round (default 8)")
    parser.add_argument(
        "--rounds", type=cli.positive, default=3, help="rounds, the median counts (default 3)"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times the input of a recipe.

    Raises:
      ValueError: no such recipe, one for small images in memory, or no
        photographs.
    """
    from dyntoken.train.settings import read

    chosen = read(recipes.load(args.config)).data
    augment = dict(chosen.augment or {"crop": "none", "flip": 0.0})
    height, width = check_size(chosen.size, None)
    if height != width:
        raise ValueError(f"{args.config} has images of {height} x {width} pixels: only squares are timed")
    if augment.get("crop") == "pad":
        raise ValueError(
            f"{args.config} trains on images in memory, which nothing decodes: give a recipe for ImageNet, "
            "such as configs/tps_deit.py"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = {"size": height, "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    speed = time_input(augment, **asked)
    return {"mode": "input", "config": args.config, "augment": augment, **asked, "cores": cores, **speed}


def report(result: Mapping[str, Any]) -> str:
    """The comparison as text."""
    rows = [
        ["", "images/s"],
        ["decoding alone", f"{result['decode_images_per_s']:.0f}"],
        ["whole input", f"{result['input_images_per_s']:.0f}"],
    ]
    changes = ", ".join(f"{key} {value}" for key, value in result["augment"].items() if value)
    return (
        f"input of {result['config']}, {result['size']} px, batch {result['batch']}, "
        f"{result['cores']} CPU core(s), JPEGs of {result['kilobytes']:.0f} kB\n"
        f"{changes}\n\n{cli.table(rows)}\n\n"
        f"the whole input runs at {result['ratio']:.2f} of the rate of decoding alone (median of "
        f"{result['rounds']} rounds), at {result['cpu_ratio']:.2f} by processor time"
    )


def photographs() -> list[bytes]:
    """The JPEGs, 375 pixels high and 500 wide.

    Raises:
      MissingDataError: scikit-image or scikit-learn is not installed.
    """
    encoded = []
    for package, files in PHOTOGRAPHS.items():
        found = importlib.util.find_spec(package)
        if found is None:
            raise MissingDataError(
                "the photographs are those of scikit-image and scikit-learn: pip install scikit-image scikit-learn"
            )
        for file in files:
            content = (Path(found.submodule_search_locations[0]) / file).read_bytes()
            image, _ = eval_view(tf.constant(content), SHAPE, 3, 1.0, "bicubic")
            encoded.append(tf.io.encode_jpeg(image, quality=QUALITY).numpy())
    return encoded


class _Repeated(Records):
    """A few JPEGs in memory, over and over."""

    def __init__(self, images: Sequence[bytes]):
        self._images = list(images)

    def train(self, request: TrainRequest, epoch: int, block: int, skip: int) -> Any:
        images = tf.data.Dataset.from_tensor_slices(self._images).repeat().take(request.count)
        return images.map(lambda content: (content, 0, "")).enumerate()


def _rates(run: Callable[[], int]) -> tuple[float, float]:
    """Images per second, and per second of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = run()
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def _settle() -> None:
    """Waits until the input has filled its buffers and lies still, so that it slows nothing else."""
    for _ in range(300):
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.01:
            return


def time_input(
    augment: Mapping[str, Any] | AugmentOptions,
    *,
    size: int = 224,
    batch: int = 64,
    steps: int = 8,
    rounds: int = 3,
) -> dict[str, float]:
    """Times decoding alone and the whole input in turn, on all cores that TensorFlow uses.

    Decoding alone is tf.data mapping `decode_jpeg` over the encoded images. The
    whole input is what `train_batches` does with a streamed set: decoding (of the
    crop, or once for all views of an image), resizing, flip, the distortions,
    batching. Starting up is not timed, nor is what the input had ready before: each
    round first takes that out, and decoding alone waits until it is made again.

    Args:
      augment: `AugmentOptions` or its fields.
      size: pixels of the result.
      batch: images per batch.
      steps: batches per round.
      rounds: repetitions, of which the median ratio counts.

    Returns:
      `decode_images_per_s` and `input_images_per_s`, of decoding alone and of the whole
      input; `ratio`, the second over the first, the median over the rounds; `cpu_ratio`,
      the same by processor time, which other programs on the machine hardly change;
      `kilobytes`, the mean size of a JPEG.
    """
    images = photographs()
    ready = -(-_READY // batch) + 1  # batches
    total = 10 * (rounds + 1) * batch * (steps + ready)
    info = DataInfo("photographs", 2, None, {"train": total}, IMAGENET_MEAN, IMAGENET_STD)
    request = TrainRequest(
        parts=(("train", 0, total),),
        batch=batch,
        size=(size, size),
        seed=0,
        start_step=0,
        shards=8,
        process=(0, 1),
        augment=AugmentOptions.of(augment),
    )
    batches = StreamSource(_Repeated(images), info).train(request)
    decode = tf.data.Dataset.from_tensor_slices(images).repeat().take(batch * steps)
    decode = decode.map(
        lambda data: tf.shape(tf.image.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"))[0],
        num_parallel_calls=2 * (os.cpu_count() or 1),  # AUTOTUNE now and then leaves a core idle
    )

    def decode_once() -> int:
        return sum(1 for _ in decode.batch(batch)) * batch

    def full_once() -> int:
        return sum(len(b["label"]) for b in itertools.islice(batches, steps))

    def one_round() -> tuple[tuple[float, float], tuple[float, float]]:
        _settle()
        decoding = _rates(decode_once)
        for _ in itertools.islice(batches, ready):
            pass
        return decoding, _rates(full_once)

    decode_once(), full_once()
    timed = [one_round() for _ in range(rounds)]

    def median(values: Any) -> float:
        return sorted(values)[rounds // 2]

    return {
        "decode_images_per_s": median(d[0] for d, _ in timed),
        "input_images_per_s": median(f[0] for _, f in timed),
        "ratio": median(f[0] / d[0] for d, f in timed),
        "cpu_ratio": median(f[1] / d[1] for d, f in timed),
        "kilobytes": sum(map(len, images)) / len(images) / 1000,
    }


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
