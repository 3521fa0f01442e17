"""What XLA has to be told about images on a processor's core."""

from __future__ import annotations

from typing import Any

from dyntoken.data.tf_import import tensorflow


def once(x: Any, argument: Any) -> Any:
    """`x`, computed once: XLA would else compute it anew for each pixel that uses it.

    Args:
      x: what to keep.
      argument: numbers below 1e9 that the program is called with. XLA does not
        know them, so it cannot know either which of the two branches is taken.
    """
    tf = tensorflow()
    sure = tf.cast(tf.reshape(argument, [-1])[0], tf.float32) < 1e9
    return tf.cond(sure, lambda: x, lambda: tf.zeros_like(x))
