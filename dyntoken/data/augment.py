"""How a training image is changed, a function of (seed, epoch, example).

Crops and flips are made here; RandAugment and colour jitter in `randaugment`.
Random erasing, mixup, cutmix and label smoothing act on the normalised batch
on the device (`dyntoken.device_augment`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dyntoken import schema
from dyntoken.data import hash_rng, resample
from dyntoken.data.errors import DataError
from dyntoken.data.randaugment import Distortion, RandAugment, fill_colour
from dyntoken.schema import Count, Interpolation, Natural, NonNegative, Positive, Share

TRIES = 10
_CROP, _FLIP, _DISTORT = 1, 2, 6  # names of the draws


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """How a training image is changed; the defaults are ImageNet's.

    Attributes:
      crop: "random_resized" (Inception's crop, as timm draws it); "pad" (pad
        all four sides, crop back at random: what small images use); "none"
        (centre crop if the size differs).
      scale: share of the area that a random resized crop keeps.
      ratio: width / height of a random resized crop.
      interpolation: "bicubic" or "bilinear", antialiased.
      pad: pixels per side for crop="pad".
      pad_mode: "zero" or "reflect".
      flip: probability of a left-right flip (True is 0.5, False is 0).
      rand_augment: timm's spelling, "rand-m9-mstd0.5-inc1" in DeiT; None for
        none. Warps use `interpolation` and fill with the data set's mean.
      color_jitter: torchvision's ColorJitter of brightness, contrast and
        saturation with this strength; 0 for none. timm, and so DeiT, drops its
        `color_jitter=0.4` where RandAugment is on, so the two exclude each
        other here.
      repeats: repeated augmentation (DeiT: 3): every image of an epoch comes
        this many times, each time changed anew, and an epoch of the same length
        shows that many times fewer images. Mixup never pairs two views of an image.
    """

    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    pad: Natural = 4
    pad_mode: Literal["zero", "reflect"] = "zero"
    flip: bool | Share = 0.5
    rand_augment: str | None = None
    color_jitter: NonNegative = 0.0
    repeats: Count = 1

    def __post_init__(self):
        try:
            given = schema.check(schema.fields(type(self)), vars(self), "augment")
        except ValueError as error:
            raise DataError(str(error)) from None
        for what, value in given.items():
            object.__setattr__(self, what, value)
        for what in ("scale", "ratio"):
            low, high = getattr(self, what)
            if low > high:
                raise DataError(f"augment.{what} is ({low}, {high}); it must be low <= high")
        if isinstance(self.flip, bool):
            object.__setattr__(self, "flip", 0.5 if self.flip else 0.0)
        if self.policy and self.color_jitter:
            raise DataError(
                "augment.color_jitter and augment.rand_augment exclude each other (timm, and so DeiT, drops "
                "the jitter where RandAugment is on): set color_jitter to 0"
            )

    @property
    def policy(self) -> RandAugment | None:
        return RandAugment.parse(self.rand_augment) if self.rand_augment else None

    def distortion(self, mean: Sequence[float]) -> Distortion | None:
        """RandAugment or colour jitter, None if neither is on; `mean` is the data set's, per channel in [0, 1].

        Raises:
          DataError: the images are neither grey nor RGB.
        """
        if not self.rand_augment and not self.color_jitter:
            return None
        if len(mean) not in (1, 3):
            raise DataError(
                f"augment.rand_augment and color_jitter need 1 or 3 channels, not {len(mean)}: set them to None, 0"
            )
        return Distortion(self.policy, float(self.color_jitter), self.interpolation, fill_colour(mean))

    @classmethod
    def of(cls, options: Mapping[str, Any] | AugmentOptions | None) -> AugmentOptions:
        """From a config section; None switches augmentation off. An unknown option raises `UnknownNameError`."""
        if isinstance(options, cls):
            return options
        if options is None:
            return cls(crop="none", flip=0.0)
        return cls(**schema.check(schema.fields(cls), options, "augment"))


def random_boxes(
    draws: Any, height: Any, width: Any, scale: tuple[float, float], ratio: tuple[float, float], xp: Any = np
) -> Any:
    """Random resized crop boxes, with the procedure of timm and torchvision.

    Ten attempts at an area and an aspect ratio; the first that fits is placed
    uniformly; if none fits, the largest centred box of an allowed ratio.

    Args:
      draws: `[..., 22]` uniform in [0, 1): 10 areas, 10 ratios, 2 positions.
      height, width: of the images; TensorFlow wants floats.
      xp: numpy or TensorFlow, the same arithmetic.

    Returns:
      Whole numbers `[..., 4]` (top, left, height, width), of the type of `draws`.
    """
    area = height * width * (scale[0] + draws[..., :TRIES] * (scale[1] - scale[0]))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = xp.exp(log_low + draws[..., TRIES : 2 * TRIES] * (log_high - log_low))
    talls, wides = xp.round(xp.sqrt(area / aspect)), xp.round(xp.sqrt(area * aspect))  # [..., 10]
    fits = (wides > 0) & (wides <= width) & (talls > 0) & (talls <= height)
    shape = width / height
    tall = xp.where(shape < ratio[0], xp.round(width / ratio[0]), height)
    wide = xp.where(shape > ratio[1], xp.round(height * ratio[1]), width)
    centre = (height - tall) // 2, (width - wide) // 2
    found = fits[..., -1]
    for attempt in reversed(range(TRIES)):
        fit = fits[..., attempt]
        found = found | fit
        tall, wide = xp.where(fit, talls[..., attempt], tall), xp.where(fit, wides[..., attempt], wide)
    top = xp.minimum(xp.floor(draws[..., -2] * (height - tall + 1)), height - tall)
    left = xp.minimum(xp.floor(draws[..., -1] * (width - wide + 1)), width - wide)
    return xp.stack([xp.where(found, top, centre[0]), xp.where(found, left, centre[1]), tall, wide], -1)


def _reflect(position: np.ndarray, size: int) -> np.ndarray:
    period = max(2 * (size - 1), 1)
    position = np.abs(position) % period
    return np.minimum(position, period - position)


def pad_crop(
    images: np.ndarray, offsets: np.ndarray, pad: int, mode: str, flip: np.ndarray | None = None
) -> np.ndarray:
    """Pads every side by `pad` pixels, crops back to the same size, mirrors where asked: uint8 `[n, H, W, C]`.

    Args:
      offsets: `[n, 2]` integers in `0 .. 2 * pad`: top and left of the crop in
        the padded image; `pad` is the image as it was.
      mode: "zero" or "reflect" (the edge pixel is not repeated).
      flip: `[n]` bool.
    """
    height, width = images.shape[1:3]
    rows = np.arange(height)[None] + offsets[:, :1] - pad  # [n, H]
    columns = np.arange(width)[None] + offsets[:, 1:] - pad
    if flip is not None:
        columns = np.where(flip[:, None], columns[:, ::-1], columns)
    index = np.arange(len(images))[:, None, None]
    if mode == "reflect":
        return images[index, _reflect(rows, height)[:, :, None], _reflect(columns, width)[:, None]]
    out = images[index, rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None]]
    known = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return out * known[..., None].astype(np.uint8)


def augment(
    images: np.ndarray,
    ids: np.ndarray,
    seed: int,
    epoch: int,
    size: tuple[int, int],
    options: AugmentOptions,
    distortion: Distortion | None = None,
) -> np.ndarray:
    """Crops, flips and distorts a batch, uint8 `[n, H, W, C]` -> `[n, h, w, C]`.

    The draws are keyed by `ids [n]` together with seed and epoch; a distortion needs TensorFlow.
    """

    def uniform(draw: int, count: int) -> np.ndarray:
        return hash_rng.uniform(seed, epoch, draw, ids[:, None], np.arange(count)[None])

    flip = hash_rng.uniform(seed, epoch, _FLIP, ids) < options.flip if options.flip else None
    if options.crop == "random_resized":
        draws = uniform(_CROP, 2 * TRIES + 2)
        boxes = random_boxes(draws, *images.shape[1:3], options.scale, options.ratio)
        images = resample.resize_boxes(images, boxes, size, options.interpolation, flip)
    else:
        if images.shape[1:3] != size:
            images = resample.resize_centre(images, size, 1.0, options.interpolation)
        if options.crop == "pad" and options.pad:
            offsets = (uniform(_CROP, 2) * (2 * options.pad + 1)).astype(np.int64)
            images = pad_crop(images, offsets, options.pad, options.pad_mode, flip)
        elif flip is not None:
            images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    return images if distortion is None else distortion.batch(images, uniform(_DISTORT, distortion.width))
