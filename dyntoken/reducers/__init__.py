"""Reduction methods: Score x Select x Fuse, or a `Reducer` of their own."""

from dyntoken.reducers.base import Reducer, ScoreSelectFuse
from dyntoken.reducers.fuse import FUSERS, register_fuser
from dyntoken.reducers.methods import METHODS, Method, make_reducer, method, register_method
from dyntoken.reducers.score import SCORERS, Scores, register_scorer

__all__ = [
    "FUSERS",
    "METHODS",
    "SCORERS",
    "Method",
    "Reducer",
    "ScoreSelectFuse",
    "Scores",
    "make_reducer",
    "method",
    "register_fuser",
    "register_method",
    "register_scorer",
]
