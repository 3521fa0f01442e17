"""Recipes of modules, and the sites where reducers stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """A module to be built later: hashable, equal by value.

    Linen adopts a module instance where it is first used, so a trunk gets the
    recipe and builds the module itself. `spec["keep"]` reads a field.
    """

    make: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, make: Callable[..., Any], **options: Any) -> Spec:
        return cls(make, tuple(sorted(options.items())))

    def with_(self, **changes: Any) -> Spec:
        """The recipe with some fields replaced or added."""
        return Spec.of(self.make, **{**dict(self.options), **changes})

    def __call__(self, **more: Any) -> Any:
        return self.make(**{**dict(self.options), **more})

    def __getitem__(self, name: str) -> Any:
        return dict(self.options)[name]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a reducer stands.

    Attributes:
      at: 0-based block index.
      reducer: recipe of the reducer.
      inside: between attention and MLP of that block, else before it.
    """

    at: int
    reducer: Spec
    inside: bool = False
