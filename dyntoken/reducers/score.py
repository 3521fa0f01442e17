"""Scoring rules: which patches matter. Higher scores are kept first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.nn.reduction_sites import NEEDS
from dyntoken.ops import sample, select
from dyntoken.reducers.predictor import HeadPredictor, Predictor
from dyntoken.registry import Table, UnknownNameError, check_call, suggest
from dyntoken.types import Attended, Tokens

Array = jax.Array


@flax.struct.dataclass
class Scores:
    """What a scoring rule says of n patch rows.

    Attributes:
      rank: `[B, n]` float32; the selection keeps the largest.
      importance: `[B, n]` float32, non-negative weights of a fused token: shares that
        sum to at most 1 over the rows alive (of SPViT, probabilities); None for equal shares.
      log_probs: `[B, n, 2]` (keep, drop) of a learnt decision, else None.
    """

    rank: Array
    importance: Array | None = None
    log_probs: Array | None = None


def predictor(
    tokens: Tokens,
    seen: Attended | None,
    draws: sample.Draws,
    stage: int,
    eps: float = 1e-5,
    score_head: str = "local+global",
) -> Scores:
    """DynamicViT and dTPS: a small network on the residual stream. Has parameters."""
    log_probs = Predictor(eps, score_head, name="predictor")(tokens.patches, tokens.alive)
    keep = jnp.exp(log_probs[..., 0])
    return Scores(rank=log_probs[..., 0], importance=shares(keep, tokens), log_probs=log_probs)


class CellScores(nn.Module):
    """A learnt score for each cell of the first grid, whatever the image shows: `[B, n, 2]`.

    The start is of little size, so that no two cells are equal.
    """

    @nn.compact
    def __call__(self, tokens: Tokens) -> Array:
        logits = self.param("logits", nn.initializers.normal(0.02), (tokens.initial, 2))
        logits = jnp.broadcast_to(logits[None], (tokens.x.shape[0], *logits.shape))
        return nn.log_softmax(select.take(logits, jnp.maximum(tokens.place, 0)), axis=-1)


def static(tokens: Tokens, seen: Attended | None, draws: sample.Draws, stage: int, **_: object) -> Scores:
    """The baseline of one learnt mask (DynamicViT, section 4.3): the same patches of every image. Has parameters."""
    log_probs = CellScores(name="cells")(tokens)
    keep = jnp.exp(log_probs[..., 0])
    return Scores(rank=log_probs[..., 0], importance=shares(keep, tokens), log_probs=log_probs)


def head_predictor(
    tokens: Tokens,
    seen: Attended | None,
    draws: sample.Draws,
    stage: int,
    eps: float = 1e-5,
    heads: int | None = None,
    score_head: str = "local+global",
) -> Scores:
    """SPViT: a small network on each attention head's channels. Has parameters."""
    if heads is None:
        raise ValueError("score='head_predictor' cuts the channels into heads: give their number as heads=")
    score, keep = HeadPredictor(heads, eps, score_head, name="head_predictor")(tokens.patches, tokens.alive)
    return Scores(rank=score[..., 0], importance=keep, log_probs=score)


def class_attention(tokens: Tokens, seen: Attended, draws: sample.Draws, stage: int, **_: object) -> Scores:
    """EViT and eTPS: the class token's attention in the same block."""
    return Scores(rank=seen.cls, importance=seen.cls)


def random(tokens: Tokens, seen: Attended | None, draws: sample.Draws, stage: int, **_: object) -> Scores:
    """Uniform scores: the control of every robustness study."""
    scores = draws.uniform((tokens.count,), stage, 1)
    return Scores(rank=scores, importance=shares(scores, tokens))


def shuffled(scores: Scores, tokens: Tokens, draws: sample.Draws, stage: int) -> Scores:
    """The same scores on other patches: permuted among the rows alive of an image."""
    alive = jnp.ones(scores.rank.shape) if tokens.alive is None else tokens.alive
    rows = sample.permutation(alive, draws, stage, 2)

    def permute(values: Array) -> Array:
        index = rows.reshape(rows.shape + (1,) * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1)

    return jax.tree.map(permute, scores)


def shares(weight: Array, tokens: Tokens) -> Array:
    """`weight [B, n]` of each row, over the sum of those alive."""
    weight = weight if tokens.alive is None else weight * tokens.alive
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def fixed(tokens: Tokens) -> sample.Draws:
    """Without an rng the draw is a fixed one, so that evaluation is deterministic."""
    return sample.Draws(jax.random.key(0), jnp.arange(tokens.x.shape[0], dtype=jnp.int32))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A row of `SCORERS`.

    Attributes:
      fn: see `register_scorer`.
      learns: its decision is trained: training samples it, in either form.
      needs: fields of `Attended` that it reads.
      where: "before" a block (the rows are enough for it, so it works in one as
        well) or "inside", between attention and MLP.
      per_head: it is told the number of attention heads.
      has_head: it has a score head, which can see one row or all (`score_head`).
    """

    fn: Callable[..., Scores]
    learns: bool = False
    needs: tuple[str, ...] = ()
    where: str = "before"
    per_head: bool = False
    has_head: bool = False


SCORERS = Table(
    "score",
    {
        "predictor": Scorer(predictor, learns=True, has_head=True),
        "head_predictor": Scorer(head_predictor, learns=True, per_head=True, has_head=True),
        "class_attention": Scorer(class_attention, needs=("cls",), where="inside"),
        "random": Scorer(random),
        "static": Scorer(static, learns=True),
    },
)
# Values of `score=` that are no row: they keep the method's own scorer and set these options.
VARIANTS = {"shuffled": {"shuffle": True}}


def register_scorer(
    name: str,
    fn: Callable[..., Scores],
    *,
    learns: bool = False,
    needs: str | Sequence[str] | None = None,
    where: str | None = None,
) -> None:
    """Adds a scoring rule: a value of `score=`.

    Args:
      name: of the rule.
      fn: `fn(tokens, seen, draws, stage, **options) -> dyntoken.Scores`; `tokens`
        a `Tokens`, `seen` the fields of `Attended` that it needs, `draws` and
        `stage` for randomness: `draws.uniform((n,), stage, 4)`, where 0 to 3 are taken; in
        evaluation without an rng the draws are fixed. `options` holds `eps`, the LayerNorm epsilon that
        the backbone says.
      learns: `fn` builds linen modules (it runs in a compact method) and returns
        `log_probs`, which the training samples.
      needs: fields of `Attended` that it reads: "cls" (class attention), "keys", "queries",
        "values", "probs", "normed", "token".
      where: "before" a block or "inside", by default inside if it needs anything.

    Raises:
      ValueError: a name that is taken, a function of other arguments, or
        declarations that contradict each other.
    """
    what = f"score {name!r}"
    if name in VARIANTS:
        raise ValueError(f"{what} is registered already: choose another name")
    check_call(what, fn, "tokens", "seen", "draws", "stage", eps=1e-5)
    needs = (needs,) if isinstance(needs, str) else tuple(needs or ())
    where = where or ("inside" if needs else "before")
    check_declared(what, needs, where)
    SCORERS.register(name, Scorer(fn, learns, needs, where))


def check_declared(what: str, needs: Sequence[str], where: str) -> None:
    """Raises ValueError for needs that no attention meets, or not at that place."""
    if isinstance(needs, str):
        raise ValueError(f"{what}: needs is a tuple, as ({needs!r},)")
    for field in needs:
        if field not in NEEDS:
            raise UnknownNameError(f"{what}: unknown need {field!r}: {suggest(field, NEEDS)}")
    if where not in ("before", "inside"):
        raise ValueError(f"{what}: where must be 'before' or 'inside' a block, got {where!r}")
    if needs and where == "before":
        raise ValueError(f"{what} reads {needs[0]!r} of its block's attention: where must be 'inside'")
