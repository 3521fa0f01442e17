"""Adaptive depth: one network with a classifier after several of its blocks.

MSDNet's multi-exit idea (Huang et al. 2018, arXiv 1703.09844, section 4) on a vision
transformer, the baseline for cascades that adapt the number of tokens (`cascade`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.classifier import Classifier, check_upstream
from dyntoken.features import Features
from dyntoken.heads import ClassHead
from dyntoken.nn import layers
from dyntoken.types import Output, Tokens

Array = jax.Array


class Early(nn.Module):
    """The classifier of an exit before the last: its own final norm and head."""

    classes: int
    pool: str
    norm_eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, classify: bool = True) -> tuple[Array, Tokens]:
        """`(logits [B, classes], normalised tokens)`; `classify` as in `ClassHead`."""
        norm = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        tokens = tokens.replace(x=norm(tokens.x))
        return ClassHead(self.classes, self.pool, name="head")(tokens, classify=classify)[0], tokens


class MultiExit(Classifier):
    """A dense backbone that can be left after some of its blocks.

    Built by `create_model("multiexit_...")`. The backbone and the last
    classifier have the parameter names of the dense model, so that its weights
    load; the early classifiers are `early_0`, `early_1`, ... Every loss trains
    the blocks before its exit.

    Attributes (besides those of `Classifier`):
      exits: 0-based block after which each exit sits; the last one is the last
        block.
    """

    exits: tuple[int, ...] = ()

    method = "multiexit"
    decides = frozenset({"aux_weight", "mix_token"})  # what only an auxiliary head could honour
    images_once = True
    RECORDS = ("features", "embed", "blocks")

    def validate(self) -> None:
        """Raises ValueError for exits that do not fit the backbone."""
        super().validate()
        exits, depth = self.exits, self.plain().depth
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 0 or exits[-1] != depth - 1:
            raise ValueError(
                f"exits={exits} must be increasing block indices that end with the last block, "
                f"{depth - 1}, as in exits={default_exits(depth)}"
            )
        if self.backbone.get("distilled"):
            raise ValueError("exits have one classifier each: build the model without distilled=True")

    def setup(self) -> None:
        self.body = self.backbone(name="backbone")
        for index in range(len(self.exits) - 1):
            early = Early(self.num_classes, self.pool, self.body.norm_eps, self.body.dtype)
            setattr(self, f"early_{index}", early)
        self.head = ClassHead(self.num_classes, self.pool)

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        ids: Array | None = None,
        upto: int | None = None,
        record: Sequence[str] = (),
    ) -> Output:
        """Runs the exits 0 .. `upto`.

        Args (images, train and ids as in `Model`):
          upto: number of the last exit that is computed (static); None runs all.
          record: "features" (`Output.tokens`: normalised tokens of each exit),
            "embed" (rows entering block 0), "blocks" (rows after each block).

        Returns:
          `Output` with `logits [exits, B, classes]`.
        """
        self._check_record(record)
        last = self._last_exit(upto)
        context = self._context(images, ids, train, record=tuple(record))
        logits, features, blocks = [], [], []
        state = self.body.embed(images, context)
        embed = state.x
        for index in range(last + 1):
            state, _, records = self.body.trunk(state, context, self._blocks(index))
            result, seen = self._classify(index, state)
            logits.append(result)
            features.append(seen)
            blocks.extend(records.get("blocks", ()))
        kept = {"embed": embed, "blocks": tuple(blocks)}
        return Output(
            logits=jnp.stack(logits),
            tokens=tuple(features) if "features" in record else None,
            records={what: kept[what] for what in record if what in kept},
        )

    def features(
        self,
        images: Array,
        *,
        blocks: Sequence[int] = (),
        norm: bool = False,
        logits: bool = False,
        ids: Array | None = None,
        upto: int | None = None,
    ) -> tuple[Features, ...]:
        """What each exit classifies, its tokens, and of the blocks asked for those up to it.

        Args (as in `Model.features`; upto as in a call): `norm` is the last exit's.
        """
        asked, last = self._taps(blocks, norm), self._last_exit(upto)
        context = self._context(images, ids, False, taps=asked)
        found, taps = [], {}
        state = self.body.embed(images, context)
        for index in range(last + 1):
            state, _, records = self.body.trunk(state, context, self._blocks(index))
            taps |= records.get("taps", {})
            pooled, tokens = self._classify(index, state, classify=False)
            fields = {"logits": self._classify(index, state)[0]} if logits else {}
            fields |= {"pooled": pooled, "tokens": tokens}
            found.append(self._features(self.body, taps, asked, norm, **fields))
        return tuple(found)

    def step(
        self,
        images: Array,
        upstream: Array | None = None,
        *,
        index: int = 0,
        train: bool = False,
        ids: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Runs one exit: `model.apply(variables, images, upstream, index=1, method="step")`.

        Args (train and ids as in a call of the whole):
          images: `[B, H, W, C]`; after exit 0 only their number counts.
          upstream: what the exit before returned, for the same rows.
          index: number of the exit (static).

        Returns:
          `(logits [B, classes], rows after its last block [B, prefix + N, width])`,
          None in place of the rows after the last exit.
        """
        check_upstream(index, upstream, index > 0)
        context = self._context(images, ids, train)
        if index:
            state = Tokens.start(upstream, prefix=self.body.prefix, grid=self.body.grid)
        else:
            state = self.body.embed(images, context)
        state, _, _ = self.body.trunk(state, context, self._blocks(index))
        return self._classify(index, state)[0], state.x if index + 1 < len(self.exits) else None

    def step_output(
        self, images: Array, upstream: Array | None = None, *, index: int = 0
    ) -> tuple[Output, Array | None]:
        """As `step` in evaluation, with an `Output` of the exit in place of the logits."""
        logits, upstream = self.step(images, upstream, index=index)
        return Output(logits=logits), upstream

    def _blocks(self, index: int) -> range:
        """The blocks between the exit before and this one."""
        return range(self.exits[index - 1] + 1 if index else 0, self.exits[index] + 1)

    def _classify(self, index: int, state: Tokens, classify: bool = True) -> tuple[Array, Tokens]:
        if index < len(self.exits) - 1:
            return getattr(self, f"early_{index}")(state, classify)
        tokens = state.replace(x=self.body.norm(state.x))
        return self.head(tokens, classify=classify)[0], tokens


def default_exits(depth: int) -> tuple[int, ...]:
    """Three exits at the thirds of the depth: after blocks 3, 7 and 11 of 12."""
    return tuple(sorted({max(1, depth * third // 3) - 1 for third in (1, 2, 3)}))
