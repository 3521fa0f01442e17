"""What goes wrong with data, or is odd about them, said in one line that names the remedy."""

from __future__ import annotations

import functools
import logging


class DataError(ValueError):
    """Bad input to the data functions; the message says what to do."""


class MissingDataError(DataError):
    """A data set, or the library that reads it, is not on this machine."""


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, once in a run of a program."""
    logging.getLogger(__name__).warning(text)
