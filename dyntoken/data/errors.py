"""What goes wrong with data, said in one line that names the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input to the data functions; the message says what to do."""


class MissingDataError(DataError):
    """A data set, or the library that reads it, is not on this machine."""
