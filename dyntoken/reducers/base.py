"""Score x Select x Fuse: every published method is a choice of the three."""

from __future__ import annotations

import typing
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.ops import fuse as fusing
from dyntoken.ops import sample, select
from dyntoken.reducers.fuse import FUSERS
from dyntoken.reducers.score import SCORERS, Scores, fixed, shares, shuffled
from dyntoken.schema import Count, Keep, Positive
from dyntoken.types import Attended, Reduction, Tokens

Array = jax.Array
Form = Literal["auto", "mask", "gather"]
FORMS = typing.get_args(Form)
USUAL_SITES = 3  # of the methods with one keep rate per site (DynamicViT, TPS, EViT)


class _Seen:
    """The fields of `Attended` that a reducer declares to need; reading another one raises ValueError."""

    def __init__(self, reader: str, fields: dict[str, Array | None]):
        for name, value in fields.items():
            if value is None:
                raise ValueError(f"{reader} needs {name!r} of its block's attention, and sees none")
        self.__dict__.update(fields, _reader=reader)

    def __getattr__(self, name: str):
        raise ValueError(
            f"{self._reader} reads {name!r} of its block's attention, which it does not declare: needs={name!r}"
        )


class Reducer(nn.Module):
    """The contract of a reduction site: `(tokens, seen, train) -> (tokens, Reduction)`.

    A method that is no composition (ToMe) subclasses this and implements
    `reduce`, which returns the tokens and a `Reduction` with its `remap`;
    `__call__` then updates `carrier` and `size`. It declares as class attributes
    `learns`, `needs` and `where`, see `register_scorer`, `adds_row` and
    `merges`, see `register_fuser`, and:

      follows: it takes part in every block, sites or not: the trunk calls
        `follow` of the first site's reducer after each.
      watches: fields of `Attended` that `follow` sees.
      gates: it masks by `Tokens.gate`, not by `Tokens.alive` alone.
      returns: rows that leave at a site come back ahead of the next.
      earliest: the first block that a site can lie at.
      default_keep: the keep rate if none is given; None is the model's own default.
      dialect: row of `weights.dialects.DIALECTS`, the keys of its official state dict; None: the backbone's.
      of_body: fields that take their value from the backbone's of the same name.
      recalls: fields of `Attended` that it reads of the block before its site.
      forms: the forms that it has.
      moves: rows change places in the mask form, too.
      takes_decision: a `decision` can replace its own choice.
      mixes: its rows are mixtures that may have no cell of their own.
      bounded: `keep` is only the most rows that stay: how many do depends on the image, and
        `Tokens.alive` says which, in both forms.
      protects: rows that it added stay at every later site.
      per_head: it has a field `heads` for the number of attention heads.
      sized: its parameters are made for one `keep`.
      proportional: attention behind the site counts keys by `Tokens.key_weight`.
      ahead: None for a site where `where` says. "map": ahead of the block, by its
        attention map, whose queries fuse by `Reduction.queries`. "rows": likewise, but
        the rows that are left attend anew. "end": after the block's MLP.
      from_block: by default there is a site at every block from this number on;
        None: where the backbone's sites lie.
      drops: although it merges, some patches are left without a row.
      pools: by how much a site shrinks the grid along each axis, whatever `keep` says; by default it has one
        site then, in the middle of the stack. 0: it does not go by the grid.

    Parameters need no declaration: what a reducer makes is trained by its gradient,
    in the form that is in force. `learns` says that training must sample a decision.

    Attributes:
      keep: static number of rows that stay (prefix and fused rows not counted).
      current: static number of rows alive before the site; None means all rows.
      ratio: target share of the first patches, for the keep-ratio loss; None is
        keep / first patch count.
      form: "mask" (rows stay, `alive` says who is in play), "gather" (rows
        shrink to `keep`), or "auto": gather in evaluation; in training mask for
        methods that learn their decision, gather for the others. Both forms train
        a learnt decision, see `ScoreSelectFuse`.
      stage: number of the site, which keys its random draws.
      block, depth: number of the block it stands at, and how many there are.
      predictor_eps: LayerNorm epsilon of what it learns, which the backbone says.

    """

    keep: int
    current: int | None = None
    ratio: float | None = None
    form: Form = "auto"
    stage: int = 0
    block: int = 0
    depth: int = 1
    predictor_eps: float = 1e-5

    learns = False
    needs = ()
    where = "before"
    adds_row = False
    merges = False
    forms = ("mask", "gather")
    moves = False
    recalls = ()
    takes_decision = True
    mixes = False
    sized = False
    protects = False
    per_head = False
    bounded = False
    proportional = False
    ahead = None
    from_block = None
    drops = False
    pools = 0
    follows = False
    watches = ()
    gates = False
    returns = False
    earliest = 0
    default_keep = None
    of_body = ()
    dialect = None
    title = property(lambda self: type(self).__name__)  # what messages call it

    def resolved(self, train: bool) -> str:
        """The form in force: "mask" or "gather"."""
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.form != "auto" and self.form not in self.forms:
            raise ValueError(
                f"{self.title} has no {self.form} form: use form='auto' or {' or '.join(map(repr, self.forms))}"
            )
        if self.form != "auto":
            return self.form
        return "mask" if (train and self.learns) or "gather" not in self.forms else "gather"

    def refusal(self) -> str | None:
        """Why its options do not go together, as the end of a sentence; None if they do."""
        return None

    def learns_share(self) -> bool:
        """Whether training decides how many rows stay: what the loss `keep_ratio` holds to its target."""
        return self.learns and self.resolved(True) == "mask"

    def site_keep(self, keep: Keep, sites: int, patches: int, prefix: int) -> Keep:
        """`keep` as the rule for counts takes it, see `reducers.keep.keep_counts`.

        Of a method with a site at every block, one rate r is what each of three
        sites would keep; more sites share that: each keeps `r ** (3 / sites)` of
        the rows it finds.

        Args:
          keep: of the model.
          sites: how many there are.
          patches, prefix: rows that enter the first block, patches and others.
        """
        if self.from_block is None or self.default_keep is not None or not isinstance(keep, float):
            return keep
        return (keep ** (min(sites, USUAL_SITES) / sites),) * sites

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        """The method itself; `carrier`, `ratio`, `count` and `grid` of the `Reduction` are filled in."""
        raise NotImplementedError(f"{type(self).__name__} does not implement reduce()")

    def follow(
        self, tokens: Tokens, seen: Attended | None, *, block: int, closes: bool, last: bool
    ) -> Tokens:
        """The tokens after a block, if the method `follows` them.

        Args:
          seen: what the attention of the block showed, see `watches`.
          block: its number.
          closes: a site or the end of the stack comes next.
          last: it is the last block.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement follow()")

    def __call__(
        self,
        tokens: Tokens,
        seen: Attended | None = None,
        train: bool = False,
        *,
        draws: sample.Draws | None = None,
        noise: Array | None = None,
        decision: Array | None = None,
    ) -> tuple[Tokens, Reduction]:
        """Reduces `tokens`.

        Args:
          seen: what the attention layer of this block showed (`inside` sites), or that of
            the block before; `reduce` gets the fields that are declared as `needs` or `recalls`.
          draws: randomness of scorers and Gumbel noise.
          noise: `[B, n, 2]`, replaces the Gumbel draws; the mask form then samples in evaluation, too.
          decision: `[B, n]` 0/1, imposed in place of the site's own choice.
        """
        if decision is not None and not self.takes_decision:
            raise ValueError(f"{self.title} takes no decision on single rows: call it without")
        if tokens.alive is not None and self.resolved(train) == "gather" and not self.bounded:
            raise ValueError("the gather form needs every row alive: use one form at all sites")
        shown = (*self.needs, *self.recalls)
        seen = _Seen(self.title, {need: getattr(seen, need, None) for need in shown})
        count = tokens.count
        fused = int(self.adds_row and self.keep < (self.current or count))
        rows = (self.keep if self.resolved(train) == "gather" else count) + fused
        tokens, reduction = self.reduce(tokens, seen, train, draws=draws, noise=noise, decision=decision)
        if tokens.count != rows:
            raise ValueError(
                f"{self.title} leaves {tokens.count} rows, not {rows}: keep={self.keep} and "
                f"adds_row={self.adds_row}, as it declares"
            )
        carrier = select.lookup(reduction.remap, tokens.carrier)
        x = select.rows_outermost(tokens.x) if tokens.count < count else tokens.x
        tokens = tokens.replace(x=x, carrier=carrier, size=select.sizes(carrier, tokens.count))
        ratio = self.keep / tokens.initial if self.ratio is None else self.ratio
        static = {"ratio": ratio, "count": self.keep + fused, "grid": tokens.grid}
        return tokens, reduction.replace(carrier=carrier, **static)


class ScoreSelectFuse(Reducer):
    """Scores the patches, keeps the best, and fuses the rest by rule.

    A learnt decision trains in either form, straight-through. With l = (keep, drop)
    the log-probabilities of a row, g Gumbel noise and m = (l_keep + g_keep) - (l_drop +
    g_drop) its margin:

      mask: rows with m > 0 stay (DynamicViT, section 3.3). The decision's gradient is
        that of sigmoid(m / tau), and reaches l through every later attention, of whose
        keys it is the weight, and through what the fusing rule makes of dropped rows.
        How many stay is left to the loss `keep_ratio`. Every row is computed.
      gather: the `keep` rows of largest margin stay, as m is in the sampled mask of
        that size, and the others leave. The gradient is that of sigmoid((m - t) / tau), t
        the margin at the cut (`sample.top_k_mask`), and reaches l by the same
        ways as far as they are computed: of rows kept through their weight w = 1 as
        keys, `dL/dw_j = sum_i p_ij <dL/dy_i, v_j - y_i>` over queries i and heads, of
        dropped rows through the fusing rule. What later blocks would have made of a
        dropped row is not known, so that dropping (DynamicViT's rule) learns from the rows
        kept alone, as routers of experts do (Fedus et al. 2022, "Switch Transformers", section
        2.1; Raposo et al. 2024, "Mixture-of-Depths", section 3.4). The count is exact and the
        cut moves with the margins: no loss is needed in place of `keep_ratio`.

    Attributes:
      score: row of `SCORERS`.
      fuse: row of `FUSERS`.
      shuffle: permutes the scores within each image (robustness study of TPS).
      similarity: what rules that merge compare: the tokens, or the keys, queries or values of the
        attention (averaged over heads, as ToMe does), of this block where the site lies inside it
        and of the block before where it lies before one.
      measure: of that similarity: "cosine"; "dot", the plain inner product; "l2", minus the root mean
        square difference; "random", any host that stays (and its cosine).
      temperature: divides it.
      weight: of the rows in a host's mean: "similarity", e and exp(similarity) as in TPS; "mean", 1;
        "size", the patches a row stands for; "score", the scorer's importance.
      score_head: what a learnt scorer sees: "local+global", or "local", one row.
      tau: temperature of the Gumbel-softmax.
      heads: attention heads, for a scorer that looks at each; None: those of the backbone.
    """

    score: str = "predictor"
    fuse: str = "drop"
    shuffle: bool = False
    similarity: Literal["tokens", "keys", "queries", "values"] = "tokens"
    measure: Literal["cosine", "dot", "l2", "random"] = "cosine"
    temperature: Positive = 1.0
    weight: Literal["similarity", "mean", "size", "score"] = "similarity"
    score_head: Literal["local+global", "local"] = "local+global"
    tau: Positive = 1.0
    heads: Count | None = None

    scorer = property(lambda self: SCORERS[self.score])
    fuser = property(lambda self: FUSERS[self.fuse])
    learns = property(lambda self: self.scorer.learns)
    needs = property(lambda self: self.scorer.needs + self._compared(self.where == "inside"))
    recalls = property(lambda self: self._compared(self.where == "before"))
    where = property(lambda self: self.scorer.where)
    adds_row = property(lambda self: self.fuser.adds_row)
    protects = property(lambda self: self.fuser.protects)
    per_head = property(lambda self: self.scorer.per_head)
    merges = property(lambda self: self.fuser.merges)
    title = property(lambda self: f"score={self.score!r} with fuse={self.fuse!r}")

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        options: dict[str, Any] = {"heads": self.heads} if self.per_head else {}
        options |= {"score_head": self.score_head} if self.scorer.has_head else {}
        given = fixed(tokens) if draws is None else draws
        scores = self.scorer.fn(tokens, seen, given, self.stage, eps=self.predictor_eps, **options)
        self._check(scores)
        if scores.importance is None:
            scores = scores.replace(importance=shares(jnp.ones(tokens.place.shape), tokens))
        if self.shuffle:
            scores = shuffled(scores, tokens, given, self.stage)
        chex.assert_shape(scores.rank, tokens.place.shape)
        if tokens.alive is not None:
            scores = scores.replace(rank=jnp.where(tokens.alive > 0.5, scores.rank, -jnp.inf))
        if self.protects:
            scores = scores.replace(rank=jnp.where(tokens.place < 0, jnp.inf, scores.rank))
        if self.resolved(train) == "gather":
            sampled = self.learns and train and decision is None
            margin = self._margin(scores, tokens, draws, noise) if sampled else None
            return self._gather(tokens, seen, scores, draws, decision, margin)
        return self._mask(tokens, seen, scores, train, draws, noise, decision)

    def _compared(self, there: bool) -> tuple[str, ...]:
        """The field of `Attended` that rows are compared by, if there is one and it is to be seen `there`."""
        return (self.similarity,) if there and self.similarity != "tokens" else ()

    def refusal(self) -> str | None:
        for name in ("similarity", "measure", "temperature", "weight"):
            if getattr(self, name) != getattr(type(self), name) and name not in self.fuser.reads:
                able = [rule for rule, row in FUSERS.items() if name in row.reads]
                return f"{name}={getattr(self, name)!r} is of a rule that merges: fuse={' or '.join(able)}"
        if self.measure not in ("cosine", "dot") and "similarity" not in self.fuser.reads:
            return f"fuse={self.fuse!r} is told of measure='cosine' or 'dot' alone"
        if self.score_head != "local+global" and not self.scorer.has_head:
            able = [rule for rule, row in SCORERS.items() if row.has_head]
            return f"score_head={self.score_head!r} is of a learnt scorer: score={' or '.join(able)}"
        return None

    def _check(self, scores: Scores) -> None:
        """Raises ValueError where a scorer does not do what it declares: nothing would train it."""
        if self.learns and scores.log_probs is None:
            raise ValueError(f"score={self.score!r} learns, but returns no log_probs to sample from")
        if self.is_initializing() and not self.learns and self.variables.get("params"):
            raise ValueError(
                f"score={self.score!r} makes parameters, but top-k has no gradient: register it with "
                "learns=True, which samples its log_probs in training"
            )

    def _matching(
        self, tokens: Tokens, seen: Any, scores: Scores, draws: sample.Draws | None, *rows: Array | None
    ) -> dict[str, Any]:
        """What the rule compares and weighs by, of hosts and guests: `rows` of both, None for all."""
        options = {"temperature": self.temperature, "normalize": self.measure != "dot"}
        if "similarity" not in self.fuser.reads:
            return options
        options |= {"measure": self.measure}

        def of_both(values: Array) -> tuple[Array, ...]:
            return tuple(values if at is None else select.take(values, at) for at in rows)

        if self.similarity != "tokens":
            features = getattr(seen, self.similarity)[:, :, tokens.prefix :]
            options["compared"] = of_both(features.astype(jnp.float32).mean(axis=1))
        if self.measure == "random":  # a number per pair of cells, so that both forms draw the same
            draws = fixed(tokens) if draws is None else draws
            table = draws.uniform((tokens.initial, tokens.initial), self.stage, 3)
            hosts, guests = of_both(jnp.maximum(tokens.place, 0))
            table = jnp.take_along_axis(table, guests[:, :, None], axis=1)
            options["luck"] = jnp.take_along_axis(table, hosts[:, None, :], axis=2)
        masses = {"mean": jnp.ones_like(tokens.size), "size": tokens.size, "score": scores.importance}
        if self.weight in masses:
            options["mass"] = of_both(masses[self.weight])
        return options

    def _absorb(self, targets: Array, sources: Array, **roles: Any) -> fusing.Fused:
        options = {"allowed": None, "weight": None, "same": False, **roles}
        fused = self.fuser.fn(targets, sources, **options)
        for what, result in (("adds_row", fused.extra), ("merges", fused.host)):
            if getattr(self, what) == (result is None):
                raise ValueError(f"fuse={self.fuse!r} declares {what}={result is None}, and does otherwise")
        return fused

    def _gather(
        self,
        tokens: Tokens,
        seen: Any,
        scores: Scores,
        draws: sample.Draws | None,
        decision: Array | None,
        margin: Array | None,
    ) -> tuple[Tokens, Reduction]:
        """Rows really shrink: top-k with a static count, of `margin [B, n]` where the decision is sampled."""
        n = tokens.count
        with jax.named_scope("select"):
            rank = scores.rank if margin is None else margin
            keep, dropped = select.split(rank if decision is None else decision, self.keep)
        if (
            self.keep == n
        ):  # nothing to drop: every row stays where it is, and the result that of the dense model
            keep = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], keep.shape)
        x, prefix = tokens.x, tokens.prefix  # rows of all are taken: a TPU would copy a slice of them
        inverse = select.inverse(keep, n)
        place, remap = select.lookup(tokens.place, keep), inverse
        kept, extra, gone, weight = select.take(x, keep + prefix), None, None, tokens.weight
        now = (inverse >= 0).astype(jnp.float32)
        if margin is not None:
            now = sample.top_k_mask(margin, keep, dropped, temperature=self.tau)
            gone = 1.0 - jnp.take_along_axis(now, dropped, axis=1)
            # What a row kept counts as a key of later attention: 1, with the gradient of its decisions.
            weight = jnp.take_along_axis(now if weight is None else now * weight, keep, axis=1)
        if self.keep < n:
            importance = select.take(scores.importance[..., None], dropped)[..., 0]
            by = self._matching(tokens, seen, scores, draws, keep, dropped)
            fused = self._absorb(
                kept, select.take(x, dropped + prefix), importance=importance, weight=gone, **by
            )
            kept, extra = fused.x, fused.extra
            if fused.host is not None:
                remap = _place_at(remap, dropped, fused.host)
        host = select.lookup(place, remap)
        if extra is not None:
            kept = jnp.concatenate([kept, extra], axis=1)
            place = jnp.concatenate([place, jnp.full_like(place[:, :1], -1)], axis=1)
            remap = jnp.where(remap < 0, self.keep, remap)
            weight = None if weight is None else jnp.pad(weight, [(0, 0), (0, 1)], constant_values=1.0)
        reduction = Reduction(scores.rank, now, place, host, remap, scores.log_probs, keep)
        x = jnp.concatenate([x[:, :prefix], kept], axis=1)
        return tokens.replace(x=x, place=place, weight=weight), reduction

    def _mask(
        self,
        tokens: Tokens,
        seen: Any,
        scores: Scores,
        train: bool,
        draws: sample.Draws | None,
        noise: Array | None,
        decision: Array | None,
    ) -> tuple[Tokens, Reduction]:
        """Rows stay; a cumulative mask says who is alive."""
        alive = jnp.ones(tokens.place.shape, jnp.float32) if tokens.alive is None else tokens.alive
        keep = None
        if decision is not None:
            chosen = decision.astype(jnp.float32)
        elif self.learns and (train or noise is not None):
            chosen = self._sampled(scores, draws, noise)
            chosen = jnp.where(tokens.place < 0, 1.0, chosen) if self.protects else chosen
        else:
            keep, _ = select.split(scores.rank, self.keep)
            chosen = select.mask_of(keep, tokens.count)
        now = chosen * alive
        # Dropped at exactly this site; equal values whose gradients in earlier decisions are SPViT's and TPS's.
        gone = alive - now if self.protects else (1.0 - now) * alive
        x, place = tokens.patches, tokens.place
        roles = {"importance": scores.importance, "allowed": now, "weight": gone, "same": True}
        fused = self._absorb(x, x, **roles, **self._matching(tokens, seen, scores, draws, None, None))
        rows = jnp.arange(tokens.count, dtype=jnp.int32)[None, :]
        stays = now > 0.5
        remap = jnp.where(stays, rows, -1)
        if fused.host is not None:
            remap = jnp.where((gone > 0.5) & stays.any(axis=1, keepdims=True), fused.host, remap)
        host = select.lookup(place, remap)
        kept, extra, alive_after = fused.x, fused.extra, now
        if extra is not None and self.keep < (self.current or tokens.count):
            kept = jnp.concatenate([kept, extra], axis=1)
            place = jnp.concatenate([place, jnp.full_like(place[:, :1], -1)], axis=1)
            remap = jnp.where((gone > 0.5) & (remap < 0), tokens.count, remap)
            alive_after = jnp.concatenate([now, jnp.ones_like(now[:, :1])], axis=1)
        reduction = Reduction(scores.rank, now, place, host, remap, scores.log_probs, keep)
        x = jnp.concatenate([tokens.x[:, : tokens.prefix], kept], axis=1)
        return tokens.replace(x=x, place=place, alive=alive_after), reduction

    def _sampled(self, scores: Scores, draws: sample.Draws | None, noise: Array | None) -> Array:
        """Gumbel straight-through keep decision, DynamicViT section 3.3."""
        noise = self._noise(scores, draws, noise)
        return sample.gumbel_softmax(scores.log_probs, noise, temperature=self.tau)[..., 0]

    def _margin(
        self, scores: Scores, tokens: Tokens, draws: sample.Draws | None, noise: Array | None
    ) -> Array:
        """By how much "keep" exceeds "drop", both with their noise: where it is positive, `_sampled` keeps."""
        noisy = scores.log_probs + self._noise(scores, draws, noise)
        margin = noisy[..., 0] - noisy[..., 1]
        return jnp.where(tokens.place < 0, jnp.inf, margin) if self.protects else margin

    def _noise(self, scores: Scores, draws: sample.Draws | None, noise: Array | None) -> Array:
        if noise is None:
            if draws is None:
                raise ValueError(
                    "training with a learnt decision draws Gumbel noise: pass rngs={'policy': key} or noise=(...)"
                )
            noise = draws.gumbel(scores.log_probs.shape[1:], self.stage, 0)
        chex.assert_shape(noise, scores.log_probs.shape)
        return noise


def _place_at(base: Array, rows: Array, values: Array) -> Array:
    """`base [B, n]` with `values [B, r]` written at `rows [B, r]` (all distinct)."""
    hit = rows[:, :, None] == jnp.arange(base.shape[1])[None, None, :]
    written = jnp.where(hit, values[:, :, None], 0).sum(axis=1).astype(base.dtype)
    return jnp.where(hit.any(axis=1), written, base)
