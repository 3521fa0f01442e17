"""The cascade itself: exits, what one hands to the next, `upto` and `step`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import pair
from dyntoken.cascade.reuse import OF_CASCADE, Grid, Reuse
from dyntoken.classifier import Classifier, check_upstream
from dyntoken.features import Features
from dyntoken.heads import ClassHead
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Address, Context
from dyntoken.ops import select
from dyntoken.ops.sample import Draws
from dyntoken.reducers.base import Form
from dyntoken.reducers.methods import make_sites
from dyntoken.schema import Count, Keep, Natural
from dyntoken.types import Output, Reduction, Tokens, Upstream

Array = jax.Array
OF_TRUNK = ("embed", "blocks", "stages", "relations")  # records of the backbone
# Fields that only one of the reuses reads, with their defaults.
OF_REUSE = {
    "feature_reuse": {
        "feature_source": "last",
        "feature_class_token": False,
        "feature_layers": "all",
        "feature_norm": True,
    },
    "relation_reuse": {
        "relation_source": "all",
        "relation_mixer": "mlp",
        "relation_resize": "grid",
        "relation_chunks": 1,
    },
}
ONE_BACKBONE = ("depth", "heads", "width", "mlp_ratio")


class Exit(nn.Module):
    """A backbone with its classifier."""

    backbone: Spec
    classes: int
    pool: str

    def setup(self) -> None:
        self.body = self.backbone(name="backbone")
        self.head = ClassHead(self.classes, self.pool)

    def __call__(
        self, images: Array, context: Context, classify: bool = True
    ) -> tuple[Array, Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """`(logits [B, classes], normalised tokens, reductions, records)`; `classify` as in `ClassHead`."""
        tokens, reductions, records = self.body(images, context)
        return self.head(tokens, classify=classify)[0], tokens, reductions, records


class Cascade(Classifier):
    """Exits on growing token grids, each reusing the one before.

    Built by `create_model("dvt_...")`. Nothing is detached between exits, so
    training all of them trains the early ones for the late ones too. The
    switches of the reuse are the rows of the paper's ablation tables (sections
    3.2 and 3.3 describe what they change); their defaults are the paper's model.

    With a method in the name (`dvt_dtps_...`, not in the paper) each exit also
    reduces its tokens. What it hands on is read back onto its full grid: a patch
    takes the features and attention logits of the row that carries it, see
    `dropped`; the next exit, if it is reduced too, takes from all that the share
    of the tokens it still has. `model.clone(keep=...)` runs the same variables
    with other counts.

    Attributes (besides those of `Classifier`):
      backbone: without the token grid; all exits share it, so depth and heads are
        equal, which relation reuse needs.
      exits: token grid of each exit, `n` or `(rows, columns)`.
      feature_reuse: a context embedding, made of the features of the exit
        before, enters every MLP (section 3.2).
      feature_source: the features are those after the "last" block of the exit
        before, or for each block those after the same "layer".
      feature_class_token: also embed the class token's row, which otherwise is
        replaced by zeros.
      feature_layers: "all" blocks get an embedding, or the "first" only.
      feature_norm: LayerNorm at the start of the embedding MLP.
      relation_reuse: the attention logits of the exit before, mixed by an MLP,
        are added to those of every block (section 3.3).
      relation_source: the MLP sees the logits of "all" blocks at once; or every
        block has an MLP of its own, over its heads, that sees those of the same
        "layer" or of the "last" block of the exit before.
      relation_mixer: "mlp" or one "linear" layer.
      relation_resize: "grid" resizes the queries and the keys each on their grid
        of tokens. "flat" is the naive way: the map as one picture whose two
        axes are the flattened tokens, resized by the same rule (nearest, then
        average) without knowing that a row of tokens ends; class token beside.
      relation_chunks: the mixer passes over the query rows of the maps in about
        that many pieces, one after the other: less memory, the same numbers.
        With the backbone's `remat` each piece is recomputed in the backward pass.
      context_width, context_hidden: channels of a context embedding and of the
        MLP that makes it.
      reducer: row of `reducers.METHODS` that each exit runs, or None.
      method_options, form, keep_round_to: as in `Model`.
      keep: as in `Model` for every exit, or one such value per exit as a tuple
        with a tuple in it: `((0.9, 0.8), (0.7, 0.5), (0.7, 0.5))`.
      at: block indices for every exit, or a tuple of them per exit; an empty one
        leaves its exit unreduced: `((), (), (3, 6, 9))`.
      dropped: what stands for a patch without a row of its own: "host" takes
        the row it went into, zeros if there is none (a method that drops); "zero"
        always takes zeros.
    """

    exits: tuple[int | Grid, ...] = (7, 10, 14)
    feature_reuse: bool = True
    feature_source: Literal["last", "layer"] = "last"
    feature_class_token: bool = False
    feature_layers: Literal["all", "first"] = "all"
    feature_norm: bool = True
    relation_reuse: bool = True
    relation_source: Literal["all", "layer", "last"] = "all"
    relation_mixer: Literal["mlp", "linear"] = "mlp"
    relation_resize: Literal["grid", "flat"] = "grid"
    relation_chunks: Count = 1
    context_width: Natural = 48
    context_hidden: Natural = 128
    reducer: str | None = None
    method_options: tuple[tuple[str, Any], ...] = ()
    keep: Keep | tuple[Keep, ...] = 0.7
    at: tuple[int | tuple[int, ...], ...] = ()
    form: Form = "auto"
    keep_round_to: Count | None = None
    dropped: Literal["host", "zero"] = "host"

    # Of `patch_drop`: an exit reuses features and relations of the whole grid.
    decides = frozenset({"tokens", "patch_size", "patch_drop"})
    resets = frozenset({"stem"})
    RECORDS = ("features", *OF_TRUNK, "context", "maps", "biases")

    @property
    def method(self) -> str:
        """What stands before the backbone in the model's name."""
        return "dvt" if self.reducer is None else f"dvt_{self.reducer}"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(rows, columns) of tokens of each exit."""
        return tuple(pair(tokens) for tokens in self.exits)

    def plain(self, index: int = -1) -> Isotropic:
        """The backbone of one exit as a free-standing module, to read its static properties."""
        return self._recipe(range(len(self.exits))[index])(parent=None)

    def sites(self) -> tuple[Site, ...]:
        """The reduction sites of all exits, exit after exit."""
        return tuple(site for index in range(len(self.exits)) for site in self.exit_sites(index))

    def exit_sites(self, index: int) -> tuple[Site, ...]:
        """The reduction sites of one exit with their static counts.

        Raises:
          ValueError: `keep` or `at` with another number of entries than exits, a
            site outside the depth, or a keep that leaves no token.
        """
        if self.reducer is None:
            return ()
        keep = _per_exit("keep", self.keep, len(self.exits))[index]
        at = _per_exit("at", self.at, len(self.exits))[index]
        if not at and at is not self.at:  # its own, empty entry
            return ()
        at = (at,) if isinstance(at, int) else at
        options = {"keep": keep, "at": at, "form": self.form, "arch": self.arch}
        options |= {"keep_round_to": self.keep_round_to}
        try:
            return make_sites(self.plain(index), self.reducer, dict(self.method_options), **options)
        except ValueError as error:
            raise type(error)(f"exit {index}: {error}") from error

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises ValueError where a field of the backbone is given per exit."""
        for name in ONE_BACKBONE:
            if isinstance(options.get(name), (tuple, list)):
                raise ValueError(
                    f"{name}={options[name]}: the exits of a cascade share one backbone, since relation reuse "
                    "adds their attention logits block by block and head by head; give one number"
                )

    def validate(self) -> None:
        """Raises ValueError for fields that make no cascade."""
        self._check_exits()
        self._check_switches()
        for index in range(len(self.exits)):
            self.plain(index)  # checks its fields
        super().validate()

    def _check_exits(self) -> None:
        if not isinstance(self.exits, tuple) or not all(_is_grid(tokens) for tokens in self.exits):
            raise ValueError(
                f"exits={self.exits!r}: give the token grid of each exit as n or (rows, columns), as in "
                "exits=(7, 10, 14)"
            )
        if not self.exits:
            raise ValueError("exits is empty: give the token grid of each exit, as in exits=(7, 10, 14)")
        for old, new in itertools.pairwise(self.grids):
            if new == old or new[0] < old[0] or new[1] < old[1]:
                raise ValueError(
                    f"exits={self.exits}: each exit needs a finer token grid than the one before"
                )

    def _check_switches(self) -> None:
        if self.backbone.get("distilled"):
            raise ValueError("a cascade distils from its own last exit: build it without distilled=True")
        for reuse, fields in OF_REUSE.items():
            changed = [name for name, default in fields.items() if getattr(self, name) != default]
            if changed and not getattr(self, reuse):
                raise ValueError(f"{changed[0]} says how {reuse} works, which is off: leave it out")
        if self.feature_reuse and min(self.context_width, self.context_hidden) < 1:
            raise ValueError(
                "context_width and context_hidden must be at least 1; feature_reuse=False needs none"
            )
        if self.feature_class_token and not self.plain().prefix:
            raise ValueError("feature_class_token=True needs a backbone with a class token")

    def _recipe(self, index: int, sites: tuple[Site, ...] = ()) -> Spec:
        """The backbone of one exit."""
        return self.dense_recipe(index).with_(context=self._context_widths(index), sites=sites)

    def dense_recipe(self, index: int) -> Spec:
        """The backbone of one exit on its own: without reuse and reduction."""
        return self.backbone.with_(tokens=self.grids[index])

    def _context_widths(self, index: int) -> tuple[int, ...]:
        """Channels of the context embedding of each block of an exit."""
        depth = self.backbone["depth"]
        if not index or not self.feature_reuse:
            return (0,) * depth
        rest = self.context_width if self.feature_layers == "all" else 0
        return (self.context_width, *((rest,) * (depth - 1)))

    def setup(self) -> None:
        for index in range(len(self.exits)):
            recipe = self._recipe(index, self.exit_sites(index))
            setattr(self, f"exit_{index}", Exit(recipe, self.num_classes, self.pool))
            if index and (self.feature_reuse or self.relation_reuse):
                setattr(self, f"reuse_{index}", self._reuse(index))

    def _reuse(self, index: int) -> Reuse:
        body = self.plain(index)
        return Reuse(
            old=self.grids[index - 1],
            new=self.grids[index],
            **{
                name: getattr(body, name)
                for name in ("heads", "prefix", "norm_eps", "context", "remat", "dtype")
            },
            **{name: getattr(self, name) for name in OF_CASCADE},
        )

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        ids: Array | None = None,
        noise: Sequence[Array] | None = None,
        decisions: Sequence[Array] | None = None,
        upto: int | None = None,
        record: Sequence[str] = (),
    ) -> Output:
        """Runs the exits 0 .. `upto`.

        Args (images, train and ids as in `Model`):
          noise, decisions: as there, over the sites of all exits, exit after exit.
          upto: number of the last exit that is computed (static); None runs all.
          record: "features" (`Output.tokens`: final tokens), and by name, one
            entry per exit: "embed", "blocks", "stages", "relations" (attention
            logits), "context", "maps" and "biases" (see `Reuse`).

        Returns:
          `Output` with `logits [exits, B, classes]` and the `reductions` of all
          exits, exit after exit.
        """
        self._check_record(record)
        last = self._last_exit(upto)
        counts = [len(self.exit_sites(index)) for index in range(len(self.exits))]
        noise = _by_exit("noise", noise, counts)
        decisions = _by_exit("decisions", decisions, counts)
        context = self._context(images, ids, train, record=tuple(record))
        logits, tokens, reductions, records, upstream = [], [], [], [], None
        for index in range(last + 1):
            own = dataclasses.replace(context, noise=noise[index], decisions=decisions[index])
            result = self._run(index, images, upstream, own, index < last)
            for value, values in zip(result, (logits, tokens, reductions, records), strict=False):
                values.append(value)
            upstream = result[-1]
        return Output(
            logits=jnp.stack(logits),
            reductions=tuple(r for of_exit in reductions for r in of_exit),
            tokens=tuple(tokens) if "features" in record else None,
            records={what: tuple(r[what] for r in records) for what in record if what != "features"},
        )

    def step(
        self,
        images: Array,
        upstream: Upstream | None = None,
        *,
        index: int = 0,
        train: bool = False,
        ids: Array | None = None,
        noise: Sequence[Array] | None = None,
        decisions: Sequence[Array] | None = None,
    ) -> tuple[Array, Upstream]:
        """Runs one exit: `model.apply(variables, images, upstream, index=1, method="step")`.

        Args (images, train and ids as in a call of the whole):
          upstream: what the exit before returned, for the same rows.
          index: number of the exit (static).
          noise, decisions: over the sites of this exit.

        Returns:
          `(logits [B, classes], what the next exit needs)`.
        """
        out, upstream = self.step_output(
            images, upstream, index=index, train=train, ids=ids, noise=noise, decisions=decisions
        )
        return out.logits, upstream

    def step_output(
        self,
        images: Array,
        upstream: Upstream | None = None,
        *,
        index: int = 0,
        train: bool = False,
        ids: Array | None = None,
        noise: Sequence[Array] | None = None,
        decisions: Sequence[Array] | None = None,
    ) -> tuple[Output, Upstream]:
        """As `step`, with an `Output` of the exit (logits and reductions) in place of the logits."""
        check_upstream(index, upstream, index > 0 and (self.feature_reuse or self.relation_reuse))
        counts = [len(self.exit_sites(index))]
        (noise,), (decisions,) = _by_exit("noise", noise, counts), _by_exit("decisions", decisions, counts)
        context = self._context(images, ids, train, noise=noise, decisions=decisions)
        result = self._run(index, images, upstream, context, index + 1 < len(self.exits))
        logits, _, reductions, _, upstream = result
        return Output(logits=logits, reductions=reductions), upstream

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
        """What each exit classifies, its tokens, and those of its blocks asked for.

        Args (as in `Model.features`): `upto` as in a call.
        """
        asked, last = self._taps(blocks, norm), self._last_exit(upto)
        context = self._context(images, ids, False, taps=asked)
        found, upstream = [], None
        for index in range(last + 1):
            result, tokens, _, records, upstream = self._run(
                index, images, upstream, context, index < last, classify=logits
            )
            exit_, fields = getattr(self, f"exit_{index}"), {"pooled": result, "tokens": tokens}
            if logits:
                fields |= {"pooled": exit_.head(tokens, classify=False)[0], "logits": result}
            found.append(self._features(exit_.body, records.get("taps", {}), asked, norm, **fields))
        return tuple(found)

    def _run(
        self,
        index: int,
        images: Array,
        upstream: Upstream | None,
        context: Context,
        needed: bool,
        classify: bool = True,
    ) -> tuple[Array, Tokens, tuple[Reduction, ...], dict[str, Any], Upstream]:
        """One exit: logits, final tokens, reductions, records, and what the next one needs."""
        contexts, maps, bias = None, (), None
        if index and self.feature_reuse:
            reuse = getattr(self, f"reuse_{index}")
            contexts = reuse.contexts(upstream.features, upstream.feature_rows)
        if index and self.relation_reuse:
            reuse = getattr(self, f"reuse_{index}")
            maps = reuse.maps(upstream.relations, upstream.relation_rows)
            bias = reuse.bias(maps)
        for_next = ("addresses", *(("relations",) * self.relation_reuse)) if needed else ()
        own = dataclasses.replace(
            context,
            dropout=_of_exit(context.dropout, index),
            policy=_of_exit(context.policy, index),
            bias=bias,
            extra=contexts,
            record=("blocks", *(what for what in context.record if what in OF_TRUNK), *for_next),
        )
        logits, tokens, reductions, records = getattr(self, f"exit_{index}")(images, own, classify)
        upstream = self._hand_on(records) if needed else Upstream()
        records |= {"context": contexts or (), "maps": maps}
        if "biases" in context.record:
            records["biases"] = tuple(bias(layer)() for layer in range(len(maps)))
        return logits, tokens, reductions, records, upstream

    def _hand_on(self, records: dict[str, Any]) -> Upstream:
        """What the next exit reuses, of the records of this one."""
        attention, mlp = zip(*records["addresses"], strict=True)
        upstream = Upstream()
        if self.feature_reuse:
            layers = slice(-1, None)
            if self.feature_source == "layer":
                layers = slice(None) if self.feature_layers == "all" else slice(1)
            rows = tuple(self._rows(address) for address in mlp[layers])
            upstream = upstream.replace(features=records["blocks"][layers], feature_rows=rows)
        if self.relation_reuse:
            layers = slice(-1, None) if self.relation_source == "last" else slice(None)
            rows = tuple(self._rows(address) for address in attention[layers])
            upstream = upstream.replace(relations=records["relations"][layers], relation_rows=rows)
        return upstream

    def _rows(self, address: Address | None) -> Array | None:
        """Where each patch is read, see `Upstream`."""
        if address is None:
            return None
        return address.carrier if self.dropped == "host" else select.survivors(*address)


def _of_exit(draws: Draws | None, index: int) -> Draws | None:
    """Exits have their own draws, also where their blocks or sites share a number."""
    return draws and draws.replace(key=jax.random.fold_in(draws.key, index))


def _is_grid(tokens: Any) -> bool:
    sides = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    return len(sides) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in sides)


def _per_exit(name: str, value: Any, exits: int) -> tuple[Any, ...]:
    """One entry per exit: of a tuple that holds a tuple its entries, else `value` for each.

    Raises:
      ValueError: another number of entries than exits.
    """
    if not isinstance(value, (tuple, list)) or not any(isinstance(v, (tuple, list)) for v in value):
        return (value,) * exits
    if len(value) != exits:
        raise ValueError(
            f"{name}={value} has {len(value)} entries for {exits} exits: give one per exit, or one for all"
        )
    return tuple(value)


def _by_exit(name: str, arrays: Sequence[Any] | None, counts: Sequence[int]) -> list[Any]:
    """Arrays per site, cut where a new exit begins.

    Args:
      counts: number of sites of each exit.

    Raises:
      ValueError: another number of arrays than sites.
    """
    if arrays is None:
        return [None] * len(counts)
    if len(arrays) != sum(counts):
        raise ValueError(f"{name} has {len(arrays)} entries for {sum(counts)} sites, exit after exit")
    ends = list(itertools.accumulate(counts))
    return [arrays[end - count : end] for end, count in zip(ends, counts, strict=True)]
