"""Published methods as rows of one table, and a method's sites in a backbone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken import architectures
from dyntoken.nn.spec import Site, Spec
from dyntoken.reducers.adavit import AdaViT
from dyntoken.reducers.ats import ATS
from dyntoken.reducers.avit import AViT
from dyntoken.reducers.base import Reducer, ScoreSelectFuse
from dyntoken.reducers.diffrate import DiffRate
from dyntoken.reducers.dpcknn import DPCKNN
from dyntoken.reducers.evovit import EvoViT
from dyntoken.reducers.fuse import FUSERS
from dyntoken.reducers.keep import site_counts
from dyntoken.reducers.kmedoids import KMedoids
from dyntoken.reducers.ltmp import LTMP
from dyntoken.reducers.mctf import MCTF
from dyntoken.reducers.patchmerger import PatchMerger
from dyntoken.reducers.pitome import PiToMe
from dyntoken.reducers.pooling import Pooling
from dyntoken.reducers.score import SCORERS, VARIANTS, check_declared
from dyntoken.reducers.sinkhorn import Sinkhorn
from dyntoken.reducers.sit import SelfSlimming
from dyntoken.reducers.tofu import ToFu
from dyntoken.reducers.tome import ToMe
from dyntoken.registry import Table, UnknownNameError, check_options, suggest

# Fields of a reducer that its site decides, and those of every linen module.
OF_SITE = ("keep", "current", "ratio", "form", "stage", "block", "depth", "parent", "name")


@dataclasses.dataclass(frozen=True)
class Method(Spec):
    """A published method: the recipe of its reducer, and

    Attributes:
      published: where its sites lie as published, see `Reducer.where`; another
        scorer leaves them there, if it can work there.
      source: paper and repository it follows.
    """

    published: str = "before"
    source: str = ""

    @classmethod
    def new(cls, make: type[Reducer], source: str, **options: Any) -> Method:
        """The row of a reducer class with these fields."""
        published = make(keep=1, parent=None, **options).where
        return cls(make, tuple(sorted(options.items())), published, source)

    @functools.cached_property
    def plain(self) -> Reducer:
        """The reducer as a free-standing module, to read what it declares."""
        return self(keep=1, parent=None)

    @property
    def inside(self) -> bool:
        """Whether sites lie between attention and MLP, else before the block."""
        return "inside" in (self.published, self.plain.where)

    @property
    def relative(self) -> bool:
        """Whether a keep rate refers to the current tokens and rounds up (EViT).

        Else it refers to the first patch count and rounds down (DynamicViT).
        """
        return self.published == "inside"

    def refusal(self, body: Any, at: tuple[int, ...] | None = None) -> str | None:
        """Why a backbone refuses the method at these sites (by default its own), None if it takes it."""
        return body.refuse(self.plain, body.sites_of(self.plain) if at is None else at)


def _row(score: str, fuse: str, source: str) -> Method:
    return Method.new(ScoreSelectFuse, source, score=score, fuse=fuse)


METHODS = Table(
    "method",
    {
        "dynamicvit": _row("predictor", "drop", "DynamicViT, NeurIPS 2021; raoyongming/DynamicViT"),
        "dtps": _row("predictor", "squeeze", "TPS, CVPR 2023; megvii-research/TPS-CVPR2023"),
        "evit": _row("class_attention", "one_token", "EViT, ICLR 2022; youweiliang/evit"),
        "topk": _row("class_attention", "drop", "EViT without its fused token; youweiliang/evit"),
        "tome": Method.new(ToMe, "ToMe, ICLR 2023; facebookresearch/ToMe"),
        "pitome": Method.new(PiToMe, "PiToMe, NeurIPS 2024; hchautran/PiToMe"),
        "tofu": Method.new(ToFu, "ToFu, WACV 2024, as hchautran/PiToMe has it"),
        "diffrate": Method.new(DiffRate, "DiffRate, ICCV 2023; OpenGVLab/DiffRate"),
        "mctf": Method.new(MCTF, "MCTF, CVPR 2024; mlvlab/MCTF"),
        "etps": _row("class_attention", "squeeze", "TPS, CVPR 2023, as its authors describe it"),
        "adavit": Method.new(AdaViT, "AdaViT, CVPR 2022; MengLcool/AdaViT"),
        "avit": Method.new(AViT, "A-ViT, CVPR 2022; NVlabs/A-ViT"),
        "ltmp": Method.new(LTMP, "LTMP, TMLR 2023; Mxbonn/ltmp"),
        "evovit": Method.new(EvoViT, "Evo-ViT, AAAI 2022; YifanXu74/Evo-ViT"),
        "spvit": _row("head_predictor", "package", "SPViT, ECCV 2022; PeiyanFlying/SPViT"),
        "ats": Method.new(ATS, "ATS, ECCV 2022; adaptivetokensampling/ATS"),
        "dpcknn": Method.new(DPCKNN, "DPC-KNN of TCFormer, CVPR 2022; JoakimHaurum/TokenReduction"),
        "kmedoids": Method.new(KMedoids, "K-medoids, WACV 2023; JoakimHaurum/TokenReduction"),
        "sinkhorn": Method.new(Sinkhorn, "Sinkhorn tokenizer, 2022; JoakimHaurum/TokenReduction"),
        "patchmerger": Method.new(PatchMerger, "PatchMerger, 2022; JoakimHaurum/TokenReduction"),
        "pooling": Method.new(Pooling, "the structural baseline of DynamicViT, NeurIPS 2021"),
        "static": _row("static", "drop", "the static baseline of DynamicViT, NeurIPS 2021"),
        "sit": Method.new(SelfSlimming, "SiT, ECCV 2022; JoakimHaurum/TokenReduction"),
    },
)


def method(name: str, /, **options: Any) -> Method:
    """A row of `METHODS` with some options replaced.

    `score="shuffled"` keeps the method's own scorer and permutes its scores.
    Scores that need a block's attention move the site inside the block.

    Raises:
      UnknownNameError: unknown method, option, scorer or fusing rule.
    """
    row = METHODS[name]
    check_options(f"method {name!r}", options, _fields(row.make))
    if issubclass(row.make, ScoreSelectFuse):
        if options.get("score") in VARIANTS:
            options = {**options, "score": row["score"], **VARIANTS[options["score"]]}
        for kind, known in (("score", [*SCORERS, *VARIANTS]), ("fuse", FUSERS)):
            wrong = options.get(kind)
            if kind in options and wrong not in known:
                raise UnknownNameError(f"unknown {kind} {wrong!r}: {suggest(str(wrong), known)}")
    made = dataclasses.replace(row, options=row.with_(**options).options)
    if reason := made.plain.refusal():
        raise ValueError(f"method {name!r}: {reason}")
    return made


def register_method(
    name: str, make: type[Reducer] = ScoreSelectFuse, /, *, source: str = "", **options: Any
) -> None:
    """Adds a method, the first part of a model's name: a choice of rules, or a `Reducer` of its own.

    Args:
      name: of the method.
      make: the reducer class; what it declares decides where its sites lie.
      source: paper and repository it follows.
      **options: its fields, as `score` and `fuse`.

    Raises:
      UnknownNameError: no such field, scorer or fusing rule.
      ValueError: a name that is taken, no reducer class, or declarations that
        contradict each other.
    """
    if not (isinstance(make, type) and issubclass(make, Reducer)):
        raise ValueError(f"method {name!r} must be a subclass of dyntoken.Reducer, got {make!r}")
    check_options(f"method {name!r}", options, _fields(make))
    if name.partition("_")[0] in (architectures.CASCADE, architectures.MULTIEXIT):
        raise ValueError(f"method {name!r}: names of models with exits begin like this, choose another name")
    row = Method.new(make, source, **options)
    check_declared(f"method {name!r}", row.plain.needs, row.published)
    if reason := row.plain.refusal():
        raise ValueError(f"method {name!r}: {reason}")
    METHODS.register(name, row)


def _fields(make: type[Reducer]) -> set[str]:
    """Fields of a reducer that a method may set."""
    return {field.name for field in dataclasses.fields(make)} - {*OF_SITE}


def make_reducer(preset: str, /, *, keep: int, form: str = "auto", **options: Any) -> Reducer:
    """One reducer for a ViT of your own.

    Args:
      preset: row of `METHODS`.
      keep: static number of patch tokens that stay.
      form: "auto", "mask" or "gather".
      **options: replace the method's own (`fuse="mean"`) or set `Reducer`
        fields (`stage=1`, `name="reducer_1"`).

    Returns:
      A linen module; call it as `reducer(tokens, seen, train)` with
      `Tokens.start(x, prefix=1, grid=(14, 14))`.
    """
    of_site = ("current", "ratio", "stage", "block", "depth", "name")
    fields = {k: options.pop(k) for k in of_site if k in options}
    return method(preset, **options)(keep=keep, form=form, **fields)


def make_sites(
    body: Any,
    name: str,
    options: Mapping[str, Any],
    *,
    keep: Any,
    at: Sequence[int],
    form: str,
    arch: str,
    keep_round_to: int | None = None,
) -> tuple[Site, ...]:
    """The sites of a method in a backbone, with their static counts.

    Args:
      body: the backbone, see `nn.reduction_sites.ReductionSites`.
      name, options: row of `METHODS`, replacements of its own fields.
      keep, at, form, keep_round_to: see `models.Model`.
      arch: what messages call the backbone.

    Raises:
      ValueError: a site outside the depth, a keep that leaves no token, or a
        method that the backbone refuses.
    """
    at = tuple(at)
    if list(at) != sorted(set(at)) or not at or at[0] < 0 or at[-1] >= body.depth:
        raise ValueError(
            f"at={at} must be increasing {body.site_noun} indices between 0 and {body.depth - 1}"
        )
    row = method(name, **options)
    if reason := row.refusal(body, at):
        working = [other for other, able in METHODS.items() if able.refusal(body, at) is None]
        verb = "works" if len(working) == 1 else "work"
        instead = f"{', '.join(working)} {verb} there" if working else "no method works there"
        raise ValueError(f"method {name!r} at {at} makes no sense in {arch}: {reason}; {instead}")
    plain = row.plain
    counts = site_counts(body, plain, keep, at, relative=row.relative, round_to=keep_round_to)
    of_body = {field: getattr(body, field) for field in plain.of_body}
    of_body |= {"form": form, "depth": body.depth}
    if plain.per_head and plain.heads is None and isinstance(heads := getattr(body, "heads", None), int):
        row = dataclasses.replace(row, options=row.with_(heads=heads).options)
    return tuple(
        Site(
            index,
            row.with_(keep=kept, current=current, ratio=ratio, block=index, **of_body),
            row.inside,
        )
        for index, (current, kept, ratio) in zip(at, counts, strict=True)
    )
