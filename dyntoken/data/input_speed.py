"""How fast training images are made, against decoding alone.

The images are JPEGs of ImageNet's usual shape (500 x 375), made from the
photographs that scikit-image and scikit-learn ship.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import MissingDataError
from dyntoken.data.info import DataInfo
from dyntoken.data.known_datasets import IMAGENET_MEAN, IMAGENET_STD
from dyntoken.data.requests import TrainRequest
from dyntoken.data.splits import Part
from dyntoken.data.stream import StreamSource
from dyntoken.data.tf_image import eval_image
from dyntoken.data.tf_import import tensorflow

PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
_READY = 320  # more images than the input keeps ready, in TensorFlow and out of it
SHAPE, QUALITY = (375, 500), 95


@dataclasses.dataclass(frozen=True)
class InputSpeed:
    """What `measure` returns.

    Attributes:
      decode, full: images per second of decoding alone and of the whole input.
      ratio: full / decode, the median over the rounds.
      cpu_ratio: the same of images per second of processor time, which other
        programs on the machine hardly change.
      kilobytes: mean size of a JPEG.
    """

    decode: float
    full: float
    ratio: float
    cpu_ratio: float
    kilobytes: float


def photographs() -> list[bytes]:
    """The JPEGs, 375 pixels high and 500 wide.

    Raises:
      MissingDataError: scikit-image or scikit-learn is not installed.
    """
    tf = tensorflow()
    encoded = []
    for package, files in PHOTOGRAPHS.items():
        found = importlib.util.find_spec(package)
        if found is None:
            raise MissingDataError(
                "the photographs are those of scikit-image and scikit-learn: pip install scikit-image scikit-learn"
            )
        for file in files:
            content = (Path(found.submodule_search_locations[0]) / file).read_bytes()
            image = eval_image(tf.constant(content), SHAPE, 3, 1.0, "bicubic")
            encoded.append(tf.io.encode_jpeg(image, quality=QUALITY).numpy())
    return encoded


class _Repeated:
    """`stream.Records` of a few JPEGs in memory, over and over."""

    buffer = 0
    where = ""

    def __init__(self, images: Sequence[bytes]):
        self._images = list(images)

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any:
        tf = tensorflow()
        count = sum(stop - start for _, start, stop in parts)
        images = tf.data.Dataset.from_tensor_slices(self._images).repeat().take(count)
        return images.map(lambda data: (data, 0, ""))

    @staticmethod
    def load(pointer: Any) -> Any:
        return pointer

    def why(self, name: bytes, channels: int) -> str:
        return ""


def _rates(run: Callable[[], int]) -> tuple[float, float]:
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


def measure(
    augment: Mapping[str, Any] | AugmentOptions,
    *,
    size: int = 224,
    batch: int = 64,
    steps: int = 8,
    rounds: int = 3,
) -> InputSpeed:
    """Times decoding alone and the whole input in turn, on all cores that TensorFlow uses.

    Decoding alone is tf.data mapping `decode_jpeg` over the encoded images. The
    whole input is what `train_batches` does with a streamed set: decoding (of the
    crop, or once for all views of an image), resizing, flip, the distortions,
    batching. Random erasing and
    mixup run on the device and are not part of it. Starting up is not timed, nor
    is what the input had ready before: each round first takes that out, and
    decoding alone waits until it is made again.

    Args:
      augment: `AugmentOptions` or its fields.
      size: pixels of the result.
      batch: images per batch.
      steps: batches per round.
      rounds: repetitions, of which the median ratio counts.
    """
    tf = tensorflow()
    images = photographs()
    ready = -(-_READY // batch) + 1  # batches
    count = batch * (steps + ready)
    info = DataInfo("photographs", 2, None, {"train": 10 * (rounds + 1) * count}, IMAGENET_MEAN, IMAGENET_STD)
    plan = TrainRequest(
        parts=(("train", 0, info.splits["train"]),),
        batch=batch,
        size=(size, size),
        seed=0,
        start_step=0,
        shards=8,
        process=(0, 1),
        augment=AugmentOptions.of(augment),
    )
    batches = StreamSource(_Repeated(images), info).train(plan)
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
    rows = [one_round() for _ in range(rounds)]
    middle = rounds // 2
    return InputSpeed(
        decode=sorted(d[0] for d, _ in rows)[middle],
        full=sorted(f[0] for _, f in rows)[middle],
        ratio=sorted(f[0] / d[0] for d, f in rows)[middle],
        cpu_ratio=sorted(f[1] / d[1] for d, f in rows)[middle],
        kilobytes=sum(map(len, images)) / len(images) / 1000,
    )
