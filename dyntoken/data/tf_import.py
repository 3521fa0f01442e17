"""TensorFlow, imported on use: what needs numpy alone must not wait for it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from dyntoken.data.errors import MissingDataError

INSTALL = "TensorFlow is not installed: pip install tensorflow"


@functools.cache
def tensorflow() -> Any:
    """TensorFlow, kept away from the accelerators that JAX uses, with one thread for an operation.

    Many images at a time keep the cores busy. Parts of one image on many cores, which is
    what XLA would compile, have them wait for each other.

    Raises:
      MissingDataError: it is not installed.
    """
    # jax sets 1, with which every bad image is logged.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no use to images; announced at any log level
    try:
        import tensorflow as tf
    except ImportError:
        raise MissingDataError(INSTALL) from None
    # Refused once TensorFlow runs: then its user has decided about devices and threads.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf


def graph(run: Callable[..., Any], *signature: tuple[str, tuple[int | None, ...]], xla: bool = True) -> Any:
    """A function of tensors as a graph, by XLA or not; the signature has (dtype, shape) for each argument."""
    specs = [tf.TensorSpec(shape, dtype) for dtype, shape in signature]
    return tf.function(run, input_signature=specs, autograph=False, jit_compile=xla or None)


class _OnUse:
    """A module that is imported by the first look at it."""

    def __init__(self, load: Callable[[], Any]):
        self._load = load

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by those who look through a module
            raise AttributeError(name)
        return getattr(self._load(), name)


tf: Any = _OnUse(tensorflow)
tfds: Any = _OnUse(lambda: importlib.import_module("tensorflow_datasets"))


def optimization_barrier(x: Any, argument: Any) -> Any:
    """`x`, of which XLA must not compute any part anew for each pixel that uses it.

    `argument` is numbers below 1e9 that the program is called with. XLA does not know
    them, so it cannot drop the branch below that is never taken.
    """
    known = tf.cast(tf.reshape(argument, [-1])[0], tf.float32) < 1e9
    return tf.cond(known, lambda: x, lambda: tf.zeros_like(x))
