"""A guard against images that nobody normalised."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 50.0  # normalised images stay within a few units of 0


def check(images: Any) -> None:
    """Raises for images of whole numbers and warns of values that look like 0 .. 255.

    Values are looked at outside of `jit` only: there they cost nothing beside the
    model, and inside there are none yet.

    Raises:
      ValueError: images that are no floats.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}, the model takes normalised floats: "
            "dyntoken.preprocess(model)(images) makes them of uint8"
        )
    if isinstance(images, jax.core.Tracer) or not getattr(images, "is_fully_addressable", True):
        return
    if images.size and np.abs(np.asarray(images, np.float32)).max() > LARGEST:  # numpy: never traced
        warnings.warn(
            f"images hold values beyond {LARGEST:g}, like pixels of 0 to 255: the model takes normalised "
            "ones, dyntoken.preprocess(model)(images) makes them of uint8",
            stacklevel=2,
        )
