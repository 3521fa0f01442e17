"""The former place of `token_maps`."""

from dyntoken.analysis.figures import save
from dyntoken.analysis.token_maps import fate, picture

__all__ = ["fate", "picture", "save"]
