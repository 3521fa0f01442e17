"""RandAugment and colour jitter: which operation, how strong, in what order.

RandAugment is timm's `rand-m9-mstd0.5-inc1`, with which DeiT trains: `n`
operations drawn with equal probability and with repetition, each applied with
probability `p` at a magnitude drawn from a normal distribution and clipped to
0..10. Colour jitter is torchvision's. All of it is a function of a vector of
uniform draws; `pillow_ops` does the work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dyntoken.data import pillow_ops
from dyntoken.data.errors import DataError
from dyntoken.data.tf_import import graph, tf

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing"),
    *("SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"),
    *("SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
TOP = 10.0  # the highest magnitude
UNIFORM_STD = 100.0  # beyond it the magnitude is uniform in 0..m
_PER_LAYER, _PER_JITTER = 5, 4  # uniform draws
_SECTION = re.compile(r"^([a-z]+)(\d+(?:\.\d+)?)$")
_EXAMPLE = "as in 'rand-m9-mstd0.5-inc1'"


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy in timm's terms.

    Attributes:
      magnitude: `m`, 0 to 10.
      std: `mstd`, standard deviation of the magnitude; above 100 it is uniform
        between 0 and `magnitude` instead.
      layers: `n`, operations per image.
      prob: `p`, with which each of them is applied.
    """

    magnitude: float = 10.0
    std: float = 0.0
    layers: int = 2
    prob: float = 0.5

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Reads timm's spelling, `rand-m9-mstd0.5-inc1`; a `DataError` says what is wrong.

        Only the set of operations whose effect grows with the magnitude is
        there (`inc1`), with equal weights.
        """
        first, *sections = str(text).split("-")
        if first != "rand":
            raise DataError(f"augment.rand_augment is {text!r}: it starts with 'rand', {_EXAMPLE}")
        names = {"m": "magnitude", "mstd": "std", "n": "layers", "p": "prob"}
        fields: dict[str, float] = {}
        increasing = False
        for section in sections:
            match = _SECTION.match(section)
            key, value = match.groups() if match else (section, "")
            if key == "inc" and value == "1":
                increasing = True
            elif key in names and value:
                fields[names[key]] = int(value) if key == "n" and value.isdigit() else float(value)
            else:
                raise DataError(
                    f"augment.rand_augment is {text!r}: {section!r} is none of m<number>, mstd<number>, "
                    f"n<whole number>, p<share>, inc1, {_EXAMPLE}"
                )
        if not increasing:
            raise DataError(
                f"augment.rand_augment is {text!r}: only the increasing operations are there, add '-inc1'"
            )
        policy = cls(**fields)
        if policy.magnitude > TOP or policy.prob > 1 or policy.layers != int(policy.layers):
            raise DataError(
                f"augment.rand_augment is {text!r}: m lies in 0..{TOP:.0f}, p in 0..1, n is a whole number"
            )
        return policy

    def decode(self, draws: Any) -> tuple[Any, Any, Any, Any]:
        """What to do, from float32 draws `[..., 5]` in [0, 1), a row per operation.

        Returns:
          (place in `OPERATIONS` int32, applied bool, magnitude float32, sign float32 +-1), each `[...]`.
        """
        operation = tf.cast(draws[..., 0] * len(OPERATIONS), tf.int32)
        if self.std > UNIFORM_STD:
            magnitude = draws[..., 2] * self.magnitude
        else:
            normal = tf.sqrt(-2.0 * tf.math.log1p(-draws[..., 2])) * tf.cos(2.0 * math.pi * draws[..., 3])
            magnitude = tf.clip_by_value(self.magnitude + self.std * normal, 0.0, TOP)
        sign = tf.where(draws[..., 4] < 0.5, 1.0, -1.0)
        return tf.minimum(operation, len(OPERATIONS) - 1), draws[..., 1] < self.prob, magnitude, sign


def operations(
    image: Any, magnitude: Any, sign: Any, interpolation: str, fill: tuple[int, ...]
) -> list[Callable[[], Any]]:
    """The operations on an image, in the order of `OPERATIONS`, as thunks.

    timm's level-to-argument rules of the increasing set: rotation to 30
    degrees, shears to 0.3, translations to 0.45 of the side, all of random
    sign; 4 down to 0 bits; solarisation from 256 down to 0; 0 to 110 added; and
    enhancement factors that move away from 1 by up to 0.9, either way.

    The image is uint8 `[h, w, C]` of static shape; warps fill what they uncover with C grey levels.
    """
    level = magnitude / TOP
    signed = sign * level

    def cut(scale: int) -> Any:  # C's int(): towards zero
        return tf.cast(level * scale, tf.int32)

    ops, factor = pillow_ops, tf.maximum(1.0 + 0.9 * signed, 0.1)
    return [
        lambda: ops.autocontrast(image),
        lambda: ops.equalize(image),
        lambda: ops.invert(image),
        lambda: ops.rotate(image, 30.0 * signed, interpolation, fill),
        lambda: ops.posterize(image, 4 - cut(4)),
        lambda: ops.solarize(image, 256 - cut(256)),
        lambda: ops.solarize_add(image, cut(110)),
        lambda: ops.color(image, factor),
        lambda: ops.contrast(image, factor),
        lambda: ops.brightness(image, factor),
        lambda: ops.sharpness(image, factor),
        lambda: ops.shear(image, 0.3 * signed, 1, interpolation, fill),
        lambda: ops.shear(image, 0.3 * signed, 0, interpolation, fill),
        lambda: ops.translate(image, 0.45 * signed, 1, interpolation, fill),
        lambda: ops.translate(image, 0.45 * signed, 0, interpolation, fill),
    ]


@functools.lru_cache(maxsize=8)
def _layers(
    shape: tuple[int, ...], interpolation: str, fill: tuple[int, ...], count: int
) -> Callable[..., Any]:
    """RandAugment as one program of XLA, which fuses the dozen passes of an operation into one or two.

    (image uint8 of `shape`, operations int32 `[count]` of which `len(OPERATIONS)` does
    nothing, float32 `[count, 2]` magnitude and sign) -> image.
    """

    def run(image: Any, kinds: Any, how: Any) -> Any:
        def layer(i: Any, image: Any) -> tuple[Any, Any]:
            known = operations(image, how[i, 0], how[i, 1], interpolation, fill)
            return i + 1, tf.ensure_shape(tf.switch_case(kinds[i], [*known, lambda: image]), shape)

        return tf.while_loop(lambda i, _: i < count, layer, (0, image))[1]

    return graph(run, ("uint8", shape), ("int32", (count,)), ("float32", (count, 2)))


_ORDERS = tuple(itertools.permutations(range(3)))


def jitter(image: Any, draws: Any, strength: float) -> Any:
    """torchvision's ColorJitter of brightness, contrast and saturation on uint8 `[h, w, C]`.

    The draws are float32 `[4]`: three factors, uniform in [1 - strength, 1 + strength]
    (not below 0), and the order.
    """
    low = max(0.0, 1.0 - strength)
    factors = low + draws[:3] * (1.0 + strength - low)
    orders = tf.constant(_ORDERS, tf.int32)
    order = orders[tf.minimum(tf.cast(draws[3] * len(_ORDERS), tf.int32), len(_ORDERS) - 1)]
    for place in range(3):
        kind, shape = order[place], image.shape
        kinds = (pillow_ops.brightness, pillow_ops.contrast, pillow_ops.color)
        made = tf.switch_case(kind, [functools.partial(op, image, factors[kind]) for op in kinds])
        image = tf.ensure_shape(made, shape)
    return image


@dataclasses.dataclass(frozen=True)
class Distortion:
    """What happens to the colours and the geometry of a cropped image.

    A policy or none, the strength of a colour jitter (0 for none), the interpolation of
    warps, and the grey level per channel of what a warp uncovers.
    """

    policy: RandAugment | None
    jitter: float
    interpolation: str
    fill: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of uniform draws per image."""
        layers = self.policy.layers if self.policy else 0
        return _PER_LAYER * layers + (_PER_JITTER if self.jitter else 0)

    def sample_ops(self, draws: Any) -> list[tuple[Any, ...]]:
        """What `apply` is to do with each of n images, of float32 draws `[n, width]`; n is static."""
        return _sampler(self, draws.shape[0])(draws)

    def apply(self, image: Any, plan: tuple[Any, ...]) -> Any:
        """uint8 `[h, w, C]` of static shape -> the same, distorted as one of `sample_ops` says."""
        if self.policy is not None:
            kinds, how, *plan = plan
            layers = _layers(tuple(image.shape), self.interpolation, self.fill, kinds.shape[0])
            image = layers(image, kinds, how)
        return jitter(image, plan[0], self.jitter) if self.jitter else image

    def batch(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The same for numpy images uint8 `[n, h, w, C]` and draws `[n, width]`."""
        below_one = np.minimum(draws.astype(np.float32), np.float32(1 - 2**-24))
        return _compiled(self, images.shape[1:])(images, below_one).numpy()


@functools.lru_cache(maxsize=16)
def _sampler(distortion: Distortion, count: int) -> Callable[[Any], list[tuple[Any, ...]]]:
    """`Distortion.sample_ops` of so many images, by XLA: one node of the graph in place of dozens."""
    policy = distortion.policy

    def run(draws: Any) -> list[tuple[Any, ...]]:
        plan: tuple[Any, ...] = ()
        if policy is not None:
            used = _PER_LAYER * policy.layers
            rows, draws = tf.reshape(draws[:, :used], (count, policy.layers, _PER_LAYER)), draws[:, used:]
            kind, applied, magnitude, sign = policy.decode(rows)
            plan = tf.where(applied, kind, len(OPERATIONS)), tf.stack([magnitude, sign], -1)
        if distortion.jitter:
            plan = (*plan, draws)
        return list(zip(*(tf.unstack(x) for x in plan), strict=True))

    return graph(run, ("float32", (count, distortion.width)))


@functools.lru_cache(maxsize=8)
def _compiled(distortion: Distortion, shape: tuple[int, ...]) -> Any:

    @tf.autograph.experimental.do_not_convert
    def one(row: tuple[Any, Any]) -> Any:
        return distortion.apply(tf.ensure_shape(row[0], shape), distortion.sample_ops(row[1][None])[0])

    def run(images: Any, draws: Any) -> Any:
        return tf.map_fn(one, (images, draws), fn_output_signature=tf.TensorSpec(shape, tf.uint8))

    return graph(run, ("uint8", (None, *shape)), ("float32", (None, distortion.width)), xla=False)


def fill_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """The mean colour in grey levels, (124, 116, 104) for ImageNet."""
    return tuple(min(255, round(255 * m)) for m in mean)
