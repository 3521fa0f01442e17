"""The studies. Guesses were written down before anything was run, for a DINOv2 ViT-S/14 on CIFAR-10 at 84 pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dyntoken import architectures, models, reducers
from dyntoken.registry import Table
from dyntoken.studies.setting import Setting
from dyntoken.studies.trial import Study, Trial

KEEPS = (0.9, 0.7, 0.5, 0.3)
SCORES = {"predictor": "dynamicvit", "attention": "topk"}  # methods that drop the rest
# What they do in its place.
FUSES: dict[str, dict[str, str]] = {"drop": {}, "fuse": {"fuse": "one_token"}, "squeeze": {"fuse": "squeeze"}}
MIDDLE = 0.5

Trials = list[Trial]


def _fused(score: str, rest: str, keep: float, **more: Any) -> Trial:
    """A network of the first study, which others share."""
    name = f"{score}-{rest}-{keep:g}"
    place = {"series": f"{score} {rest}", "group": f"keep {keep:g}", **more}
    return Trial(name, SCORES[score], keep, model=FUSES[rest], **place)


def tokens(setting: Setting) -> Trials:
    """Study (a): dense, and every score with everything that can become of the rest, at every keep rate."""
    made = [_fused(score, rest, keep) for keep in KEEPS for score in SCORES for rest in FUSES]
    return [Trial("dense", group="dense"), *made]


def exchange(setting: Setting) -> Trials:
    """Study (b): the networks of `tokens` that drop."""
    return [_fused(score, "drop", keep) for keep in KEEPS[1:] for score in SCORES]


def robustness(setting: Setting) -> Trials:
    """Study (c): those of the middle keep rate, and as many that were trained with random scores."""
    own = [_fused(score, rest, MIDDLE, group=score) for score in SCORES for rest in FUSES]
    return own + [
        Trial(
            f"random-{rest}-{MIDDLE:g}",
            "topk",
            MIDDLE,
            model={"score": "random", **options},
            group="random",
        )
        for rest, options in FUSES.items()
    ]


SQUEEZES: dict[str, Mapping[str, Any]] = {
    "cosine": {},
    "temperature-0.1": {"temperature": 0.1},
    "temperature-10": {"temperature": 10.0},
    "mean": {"fuse": "mean"},
    "keys": {"similarity": "keys"},
    "queries": {"similarity": "queries"},
    "values": {"similarity": "values"},
    "measure-dot": {"measure": "dot"},
    "measure-l2": {"measure": "l2"},
    "measure-random": {"measure": "random"},
    "weight-mean": {"weight": "mean"},
    "weight-size": {"weight": "size"},
    "weight-score": {"weight": "score"},
}


def squeezes(setting: Setting) -> Trials:
    """Study (d): eTPS with one option after the other; what the backbone refuses is said when it is built."""
    return [Trial(name, "etps", MIDDLE, model=options, group="squeeze") for name, options in SQUEEZES.items()]


def sites(setting: Setting) -> Trials:
    """Study (e): one to all blocks reduce, at the cost of the middle keep rate."""
    depth = setting.dense.plain().depth
    quarter = max(1, depth // 4)
    places = {
        "one-early": (quarter,),
        "one-middle": (depth // 2,),
        "two": (quarter, depth // 2),
        "three": tuple(sorted({quarter, depth // 2, 3 * depth // 4})),
        "every": tuple(range(quarter, depth)),
    }
    return [
        Trial(f"{method}-{name}", method, cost_of=MIDDLE, at=at, series=method, group=method)
        for method in ("topk", "etps")
        for name, at in places.items()
    ]


def epochs(setting: Setting) -> Trials:
    """Study (f): from no fine-tuning to twice that of the recipe."""
    rows = {"attention-drop": "topk", "attention-squeeze": "etps", "predictor-squeeze": "dtps"}
    return [
        Trial(f"{name}-x{length:g}", method, MIDDLE, length=length, series=name, group=f"x{length:g}")
        for length in (0.0, 0.25, 0.5, 1.0, 2.0)
        for name, method in rows.items()
        if length or method != "dtps"  # a predictor that was never trained says nothing
    ]


def distillation(setting: Setting) -> Trials:
    """Study (g): without a teacher, by its logits, by its tokens too; three temperatures of the Gumbel noise."""
    logits, tokens_too = {"weight": 0.5}, {"weight": 0.5, "variant": "mse"}
    taught: dict[str, Mapping[str, Any]] = {
        "alone": {"logit_kl": None},
        "logits": {"logit_kl": logits},
        "logits-tokens": {"logit_kl": logits, "token_distill": tokens_too},
    }
    made = [
        Trial(f"{method}-{name}", method, MIDDLE, losses=losses, group=method)
        for method in ("dynamicvit", "dtps")
        for name, losses in taught.items()
    ]
    temperatures = [
        Trial(f"dtps-tau-{tau:g}", "dtps", MIDDLE, model={"tau": tau}, group="tau") for tau in (0.3, 1.0, 3.0)
    ]
    return made + temperatures


def grids(setting: Setting) -> Trials:
    """Study (h): trained at one grid, measured at others."""
    return [Trial("dense", length=0.0), *(Trial(method, method, 0.7) for method in ("topk", "etps"))]


def exits(setting: Setting) -> Trials:
    """Study (i): exits at several depths, and a cascade."""
    multiexit = setting.with_exits(architectures.MULTIEXIT)
    return [_with_exits("multiexit", multiexit), _with_exits("cascade", setting.cascade())]


def reuse(setting: Setting) -> Trials:
    """Study (j): a cascade with each of its ablations."""
    switches: dict[str, Mapping[str, Any]] = {
        "none": {"feature_reuse": False, "relation_reuse": False},
        "feature": {"relation_reuse": False},
        "relation": {"feature_reuse": False},
        "both": {},
        "feature-layerwise": {"relation_reuse": False, "feature_source": "layer"},
        "feature-class-token": {"relation_reuse": False, "feature_class_token": True},
        "feature-first-layer": {"relation_reuse": False, "feature_layers": "first"},
        "feature-no-norm": {"relation_reuse": False, "feature_norm": False},
        "relation-same-layer": {"feature_reuse": False, "relation_source": "layer"},
        "relation-last-layer": {"feature_reuse": False, "relation_source": "last"},
        "relation-linear": {"feature_reuse": False, "relation_mixer": "linear"},
        "relation-flat": {"feature_reuse": False, "relation_resize": "flat"},
    }
    cascade = setting.cascade()
    return [_with_exits(name, {**cascade, **more}) for name, more in switches.items()]


def _with_exits(name: str, model: Mapping[str, Any]) -> Trial:
    return Trial(name, model=model, group=name)


# Heads and sub-layers that an image leaves out save nothing in a fixed shape.
RIVALS: dict[str, Mapping[str, Any]] = {"adavit": {"choose_heads": False, "choose_layers": False}}


def rivals(setting: Setting) -> Trials:
    """Study (k): every method that the backbone takes at the cost of dTPS's middle keep rate, and random dropping.

    LTMP computes every row, whatever it keeps: its loss holds the rows alive to that cost. It is compared with none.
    """
    refused = models.pairings(setting.dense.arch)
    able = {
        name: "gather" in row.plain.forms for name, row in reducers.METHODS.items() if refused[name] is None
    }
    made = [
        Trial(name, name, cost_of=MIDDLE, model=RIVALS.get(name, {}), group="rivals" if saves else name)
        for name, saves in able.items()
    ]
    random = Trial("random", "topk", cost_of=MIDDLE, model={"score": "random"}, group="rivals")
    return [Trial("dense", group="dense"), *made, random]


def _guesses(rows: Iterable[str], values: str) -> dict[str, float]:
    return dict(zip(rows, map(float, values.split()), strict=True))


def _by_keep(name: str, values: str) -> dict[str, float]:
    return _guesses([f"{name}-{keep:g}" for keep in KEEPS], values)


STUDIES: Table = Table(
    "study",
    {
        "tokens": Study(
            "top-1 against cost: drop, fuse into one, squeeze",
            "at keep 0.9 all tie with the dense model; the fewer tokens, the further squeezing leads dropping "
            "(by about 6 points at 0.3), fusing into one token lies between; class attention leads a predictor "
            "that has few steps to learn; seeds spread by about 0.5",
            tokens,
            expected={
                "dense": 0.5,
                **_by_keep("attention-drop", "-0.3 -1.5 -5 -14"),
                **_by_keep("attention-fuse", "-0.2 -1.2 -4 -12"),
                **_by_keep("attention-squeeze", "-0.2 -1 -3 -8"),
                **_by_keep("predictor-drop", "-1 -4 -10 -25"),
                **_by_keep("predictor-fuse", "-1 -3.5 -9 -22"),
                **_by_keep("predictor-squeeze", "-0.5 -2 -5 -12"),
            },
        ),
        "exchange": Study(
            "the dropped tokens in place of the kept ones",
            "the dropped tokens alone classify far worse than the kept ones at keep 0.7 and about as well at 0.3, "
            "where they are more; they correct a fifth to a half of the errors of the kept ones",
            exchange,
            "exchange",
            {
                "attention-drop-0.7 dropped": -40,
                "attention-drop-0.5 dropped": -15,
                "attention-drop-0.3 dropped": -4,
                "predictor-drop-0.7 dropped": -30,
                "predictor-drop-0.5 dropped": -10,
                "predictor-drop-0.3 dropped": -4,
            },
        ),
        "robustness": Study(
            "bad scores: own, shuffled, random",
            "every method loses under bad scores, squeezing about a third of what dropping loses; networks trained "
            "with random scores lie between",
            robustness,
            "scores",
            {
                "attention-drop-0.5 shuffled": -10,
                "attention-fuse-0.5 shuffled": -8,
                "attention-squeeze-0.5 shuffled": -5,
                "predictor-drop-0.5 shuffled": -12,
                "predictor-fuse-0.5 shuffled": -10,
                "predictor-squeeze-0.5 shuffled": -6,
                "random-drop-0.5": -7,
                "random-fuse-0.5": -6,
                "random-squeeze-0.5": -4,
            },
        ),
        "squeezes": Study(
            "what the squeeze compares, and how it weighs",
            "cosine, dot product and L2 tie, a random host costs a point, a plain mean half a point",
            squeezes,
            expected={"cosine": -3, "measure-dot": -3, "mean": -3.5, "measure-random": -4},
        ),
        "sites": Study(
            "number and place of the sites at equal cost",
            "two or three sites tie and lead a single one by a point; one early site is worst",
            sites,
        ),
        "epochs": Study(
            "how long the fine-tuning is",
            "most of the gain comes in the first quarter; squeezing needs less of it than dropping",
            epochs,
        ),
        "distillation": Study(
            "with and without distillation, and the temperature of the Gumbel noise",
            "distillation gains half a point, tokens beside logits nothing more; the temperatures tie",
            distillation,
        ),
        "grids": Study(
            "one network at other token grids",
            "a grid smaller by a fifth per side costs two points, by two fifths ten; reduced networks lose more than "
            "the dense one",
            grids,
            "grids",
        ),
        "exits": Study(
            "exit rules and solvers, two kinds of exits",
            "confidence, margin and entropy tie, random is points behind; the exact solver leads the geometric one "
            "by less than half a point on held-out images",
            exits,
            "exit_rules",
        ),
        "reuse": Study(
            "what a cascade's exits take from one another",
            "feature and relation reuse each gain a point at the last exit, both together two; the first exit loses "
            "a little",
            reuse,
            "per_exit",
        ),
        "rivals": Study(
            "all methods at equal cost",
            "methods without parameters of their own that merge (tome, pitome, etps) lead with so short a training; "
            "clustering and slimming into mixtures (sinkhorn, patchmerger, sit) need far more of it and are last",
            rivals,
            expected={
                "dense": 0.5,
                **{
                    "dynamicvit": -10,
                    "dtps": -5,
                    "evit": -4,
                    "topk": -5,
                    "tome": -2,
                    "pitome": -3,
                    "tofu": -3,
                },
                **{"diffrate": -4, "mctf": -3, "etps": -3, "dpcknn": -4, "kmedoids": -5, "random": -7},
                **{"sinkhorn": -25, "patchmerger": -25, "sit": -25},
            },
        ),
    },
)
