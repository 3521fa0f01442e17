"""What every classifier is: a backbone, its heads, and one face for weights, training and analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.sizes import pair
from dyntoken.features import Features, tap_numbers
from dyntoken.heads import Pool, check_pool
from dyntoken.nn import images as guard
from dyntoken.nn import rng
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Context
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.schema import Natural
from dyntoken.types import Tokens

Array = jax.Array


class Classifier(nn.Module):
    """Base of `Model`, `Cascade` and `MultiExit`: images to an `Output`.

    `method` is what stands before the backbone in the model's name (None for a
    dense one), `exits` names its classifiers where there are several (else it is
    empty), `at` holds the positions of the reduction sites.

    Attributes:
      arch: name of the backbone.
      backbone: its recipe, without its sites.
      num_classes: 0 returns pooled features.
      pool: see `heads.ClassHead`.
      prepared: pairs of fields of `preprocessing.Preprocess`, as the files beside the weights have
        them; `dyntoken.preprocess` does the rest as the public weights of the name want it.
    """

    arch: str
    backbone: Spec
    num_classes: Natural = 1000
    pool: Pool = "token"
    prepared: tuple[tuple[str, Any], ...] = ()

    method = None
    exits = ()
    at = ()
    attends = False  # whether pool="map" and "prr" can be built
    decides = frozenset()  # fields of the backbone that the class itself sets
    resets = frozenset()  # fields that a name sets and the class leaves at their defaults
    images_once = False  # whether the exits after the first read no images
    RECORDS = ()  # values of `record`

    def plain(self, index: int = -1) -> Any:
        """The backbone (of one exit) as a free-standing module, to read its static properties."""
        return self.backbone(parent=None)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        body = self.plain()
        return (*pair(body.img_size), body.in_chans)

    def sites(self) -> tuple[Site, ...]:
        """The reduction sites with their static counts, exit after exit.

        Raises:
          ValueError: a site outside the depth, or a keep that leaves no token.
        """
        return ()

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raises ValueError for keywords that the class can never honour."""

    def validate(self) -> None:
        """Raises ValueError for fields that do not fit together."""
        body = self.plain()
        self.sites()  # so that a bad value fails here, not inside a jitted step
        if self.pool in ("map", "prr") and not (
            self.attends and isinstance(getattr(body, "heads", None), int)
        ):
            raise ValueError(
                f"pool={self.pool!r} needs one classifier and blocks of one width; {self.arch} has not"
            )
        check_pool(self.pool, body.prefix if getattr(body, "class_token", True) else 0)

    def _check_record(self, record: Sequence[str]) -> None:
        for what in record:
            if what not in self.RECORDS:
                raise UnknownNameError(f"unknown record {what!r}: {suggest(what, self.RECORDS)}")

    def _last_exit(self, upto: int | None) -> int:
        """The number of the last exit to compute."""
        if upto is not None and not 0 <= upto < len(self.exits):
            raise ValueError(f"upto={upto}: this model has the exits 0 to {len(self.exits) - 1}")
        return len(self.exits) - 1 if upto is None else upto

    def _taps(self, blocks: Sequence[int], norm: bool) -> tuple[int, ...]:
        """The numbers of the blocks asked for, from 0.

        Raises:
          ValueError: the backbone has no such block, or no norm that fits.
        """
        body = self.plain()
        if norm and not body.one_width:
            raise ValueError(
                f"the final norm of {self.arch} fits its last stage alone, whose normed rows are `tokens`: "
                "leave norm=True out"
            )
        return tap_numbers(blocks, body.taps, body.tap_noun, self.arch)

    def _features(
        self, body: Any, taps: dict[int, Tokens], asked: Sequence[int], norm: bool, **fields: Any
    ) -> Features:
        """The record of a forward pass (of one exit) with the blocks asked for that lie in it."""
        numbers = tuple(number for number in asked if number in taps)
        blocks = tuple(taps[number] for number in numbers)
        if norm:
            blocks = tuple(rows.replace(x=body.norm(rows.x)) for rows in blocks)
        return Features(blocks=blocks, numbers=numbers, count=self.plain().taps, **fields)

    def _context(self, images: Array, ids: Array | None, train: bool, **fields: Any) -> Context:
        """Checks the images; randomness for this batch, keyed by `ids` (default: position in it)."""
        guard.check(images)
        ids = jnp.arange(images.shape[0], dtype=jnp.int32) if ids is None else ids
        return Context(
            train=train,
            dropout=rng.of_dropout(self, self.backbone, ids) if train else None,
            policy=rng.of_stream(self, "policy", ids) if self.sites() else None,
            **fields,
        )


def check_upstream(index: int, upstream: Any, wanted: bool) -> None:
    """Raises ValueError where an exit gets what the one before returned and needs none, or the reverse."""
    if (upstream is None) == wanted:
        raise ValueError(f"exit {index} takes {'the result of the exit before' if index else 'no upstream'}")
