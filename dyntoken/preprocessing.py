"""How an image becomes a model's input: `dyntoken.preprocess(model)`."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from dyntoken import architectures, data, device_augment
from dyntoken.data.resample import resize_centre
from dyntoken.models import Model


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalisation of one kind of weights.

    Attributes:
      size: (height, width) of the input.
      channels: of the input.
      mean, std: per channel, of pixels in [0, 1].
      crop_pct: share of the resized shorter side that the crop keeps.
      interpolation: "bicubic" or "bilinear".
      squash: stretches the whole image, whatever its aspect ratio, before the crop.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, images: np.ndarray) -> jax.Array:
        """uint8 `[H, W, C]` or `[B, H, W, C]` to normalised float32 of the same rank.

        Raises:
          ValueError: another rank, type or number of channels.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != self.channels:
            made = {3: '.convert("RGB")', 1: '.convert("L"), and [..., None] after np.asarray,'}.get(
                self.channels
            )
            raise ValueError(
                f"give uint8 images [H, W, {self.channels}] or [B, H, W, {self.channels}], "
                f"got {images.dtype} {images.shape}"
                + (f": {made} makes them of any PIL image" if made else "")
            )
        batch = images if images.ndim == 4 else images[None]
        if batch.shape[1:3] != self.size:
            batch = resize_centre(batch, self.size, self.crop_pct, self.interpolation, squash=self.squash)
        pixels = device_augment.normalize(batch, self.mean, self.std)
        return pixels if images.ndim == 4 else pixels[0]


def preprocess(model: Model, dataset: str | None = None) -> Preprocess:
    """The preprocessing of a model's weights.

    Args:
      model: from `create_model`.
      dataset: what the weights were trained on; by default what the files beside them say
        (`load_pretrained` keeps it in the model), else what the public weights of the model's
        name want, which is ImageNet's mean and standard deviation for most colour images (0.5
        for `vit_*`, AugReg's), Fashion-MNIST's for grey ones.

    Raises:
      ValueError: a data set with another number of channels.
    """
    height, width, channels = model.input_shape
    facts = data.info(dataset or ("imagenet2012" if channels == 3 else "fashion_mnist_mini"))
    if facts.channels != channels:
        raise ValueError(
            f"{facts.name} has {facts.channels} channels, the model takes {channels}: name another data set"
        )
    exact = facts.image_shape is not None and tuple(facts.image_shape[:2]) == (height, width)
    arch = architectures.get(model.arch)
    crop = 1.0 if exact else arch.crop_pct
    mean, std = facts.mean, facts.std
    if dataset is None and channels == 3 and arch.pixels is not None:
        mean, std = architectures.PIXELS[arch.pixels]
    squash = arch.squash and not exact
    how = Preprocess((height, width), channels, tuple(mean), tuple(std), crop_pct=crop, squash=squash)
    told = {} if dataset else dict(model.prepared)
    if len(told.get("mean", how.mean)) != channels:  # of weights that were adapted to other images
        told = {name: value for name, value in told.items() if name not in ("mean", "std")}
    return dataclasses.replace(how, **told)
