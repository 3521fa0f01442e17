"""TensorFlow, imported on use: what needs numpy alone must not wait for it."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

from dyntoken.data.errors import MissingDataError

INSTALL = 'TensorFlow is not installed: pip install "dyntoken[data]"'


@functools.cache
def tensorflow() -> Any:
    """TensorFlow, kept away from the accelerators that JAX uses.

    Raises:
      MissingDataError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError:
        raise MissingDataError(INSTALL) from None
    for kind in ("GPU", "TPU"):
        # Refused once TensorFlow runs: then its user has decided about devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf
