"""`create_model`: backbone x method x head, by name."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken import architectures, reducers, schema
from dyntoken.backbones import BACKBONES
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.cascade import Cascade
from dyntoken.classifier import Classifier
from dyntoken.features import Features
from dyntoken.heads import AttentionPool, ClassHead, PatchRefinement, Representation, with_dense
from dyntoken.multiexit import MultiExit, default_exits
from dyntoken.nn import images as guard
from dyntoken.nn import layers
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import slices
from dyntoken.reducers.base import Form
from dyntoken.reducers.methods import OF_SITE, make_sites
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.schema import Count, Keep, Rate
from dyntoken.types import Output, Tokens

Array = jax.Array
KINDS: dict[str, type[Cascade | MultiExit]] = {
    architectures.CASCADE: Cascade,
    architectures.MULTIEXIT: MultiExit,
}
OF_NAME = ("arch", "backbone", "method", "reducer", "method_options", "parent", "name")  # no keywords
OF_SITES = {"keep", "at", "form", "keep_round_to"}  # keywords that say where and how much a method reduces
OF_METHODS = OF_SITES | {"fuse", "score", "dropped"}  # what a dense model is often told by mistake
OF_BACKBONE = ("sites", "context", "parent", "name")  # fields of a backbone that are no keywords


class Model(Classifier):
    """A classifier: backbone, reducers at their sites, head.

    Built by `create_model`. `model.clone(keep=...)`, `clone(at=...)` and
    `clone(form=...)` run the same variables another way (`at` may not change
    the number of sites of a method with parameters).

    Attributes (besides those of `Classifier`):
      method: row of `reducers.METHODS`, or None for a dense model.
      method_options: replacements of the method's own fields.
      keep: keep rate or counts, see `reducers.keep.keep_counts`.
      at: 0-based block indices of the sites.
      form: "auto", "mask" or "gather".
      keep_round_to: rows behind every site, prefix included, are the nearest multiple of this
        number (of 8 or 128 for hardware that computes in such lanes); None: counts as `keep` says.
      representation_size: see `heads.ClassHead`.
      fc_norm: a norm on the pooled features, with the backbone's epsilon.
      representation_act, pool_prefix, head_dropout, token_head: see `heads.ClassHead` (`prefix_too`, `dropout`).
    """

    method: str | None = None
    method_options: tuple[tuple[str, Any], ...] = ()
    keep: Keep = 0.7
    at: tuple[int, ...] = ()
    form: Form = "auto"
    keep_round_to: Count | None = None
    representation_size: Count | None = None
    fc_norm: bool = False
    representation_act: Representation = "tanh"
    token_head: bool = False
    pool_prefix: bool = False
    head_dropout: Rate = 0.0

    attends = True
    RECORDS = ("features", "dense", "embed", "blocks", "stages")

    def validate(self) -> None:
        """Raises ValueError for fields that do not fit together."""
        super().validate()
        body = self.plain()
        if self.token_head and not (body.prefix and getattr(body, "class_token", True)):
            raise ValueError(f"token_head=True classifies the class token, and {self.arch} has none")

    def sites(self) -> tuple[Site, ...]:
        """The reduction sites with their static counts."""
        if self.method is None:
            return ()
        body, options = self.plain(), dict(self.method_options)
        return make_sites(
            body,
            self.method,
            options,
            keep=self.keep,
            at=self.at,
            form=self.form,
            arch=self.arch,
            keep_round_to=self.keep_round_to,
        )

    def setup(self) -> None:
        self.body = self.backbone(sites=self.sites(), name="backbone")
        body = self.plain()
        self.head = ClassHead(
            self.num_classes,
            self.pool,
            self.backbone.get("distilled", False),
            self.representation_size,
            body.norm_eps if self.fc_norm else None,
            self.representation_act,
            self.head_dropout,
            self.pool_prefix,
            self._attention_pool(body),
            body.norm_eps if self.token_head else None,
        )
        if self.aux_weight is not None:
            self.aux_head = layers.dense(self.num_classes)

    def _attention_pool(self, body: Any) -> Spec | None:
        if self.pool == "prr":
            return Spec.of(PatchRefinement, heads=body.heads, token=getattr(body, "class_token", True))
        if self.pool != "map":
            return None
        act = "silu" if body.activation == "swiglu" else body.activation  # its MLP has no gate
        options = {"heads": body.heads, "mlp_ratio": body.mlp_ratio, "norm_eps": body.norm_eps}
        return Spec.of(AttentionPool, act=act, **options)

    @property
    def aux_weight(self) -> float | None:
        """Share of LV-ViT's auxiliary head in the evaluation logits; None without one."""
        return getattr(self.plain(), "aux_weight", None) if self.num_classes else None

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        ids: Array | None = None,
        noise: Sequence[Array] | None = None,
        decisions: Sequence[Array] | None = None,
        record: Sequence[str] = (),
    ) -> Output:
        """Classifies images.

        Args:
          images: `[B, H, W, C]` float, normalised (`dyntoken.preprocess`).
          train: training mode: dropout, and learnt decisions are sampled.
          ids: `[B]` global example indices that key every random draw; by
            default the position in this batch.
          noise: per site `[B, n, 2]`, replaces the Gumbel draws.
          decisions: per site `[B, n]` 0/1, replaces the site's own choice.
          record: "features" (final tokens), "dense" (`Output.dense`: LV-ViT's
            auxiliary logits), "embed" (rows entering block 0), "blocks" (rows
            after each block), "stages" (rows before and after each site).
        """
        self._check_record(record)
        if "dense" in record and self.aux_weight is None:
            raise ValueError(
                f"{self.arch} has no auxiliary head to record 'dense' from: LV-ViT has, unless aux_weight is None"
            )
        for what, given in (("noise", noise), ("decisions", decisions)):
            if given is not None and len(given) != len(self.at):
                raise ValueError(f"{what} has {len(given)} entries for {len(self.at)} sites")
        plain = not (train or record) and noise is None and decisions is None
        if plain and (out := self._in_slices(images, ids)) is not None:
            return out
        context = self._context(images, ids, train, noise=noise, decisions=decisions, record=tuple(record))
        tokens, reductions, records = self.body(images, context)
        logits, heads, dense = self._classify(tokens, context, "dense" in record)
        return Output(
            logits=logits,
            heads=heads,
            reductions=reductions,
            tokens=tokens if "features" in record else None,
            records=records,
            dense=dense if "dense" in record else None,
            mixed=tokens.mixed,
            state=tokens.state,
        )

    def _in_slices(self, images: Array, ids: Array | None) -> Output | None:
        """A plain evaluation of a batch that is better run in slices, see `ops.slices`; None for another."""
        size = slices.size(images.shape)
        drawn = self.has_rng("policy") or self.is_mutable_collection("intermediates")
        if not size or self.is_initializing() or drawn:
            return None
        guard.check(images)
        ids = jnp.arange(images.shape[0], dtype=jnp.int32) if ids is None else ids
        free, variables = self.clone(parent=None), self.variables
        out = slices.run(lambda images, ids: free.apply(variables, images, ids=ids), images, ids, size)
        if out.state is not None or any(site.learnt is not None for site in out.reductions):
            return None  # not all of it is per image
        heads = None if out.heads is None else slices.joined(out.heads, axis=1)
        return jax.tree.map(slices.joined, out.replace(heads=None)).replace(heads=heads)

    def _classify(
        self, tokens: Tokens, context: Context, dense: bool = False
    ) -> tuple[Array, Array | None, Array | None]:
        """`logits`, `heads` and `dense` of `Output`."""
        logits, heads = self.head(tokens, context.dropout, train=context.train)
        if self.aux_weight is None or (context.train and not dense):
            return logits, heads, None
        auxiliary = self.aux_head(tokens.patches.astype(jnp.float32))
        if not context.train:
            logits = with_dense(logits, auxiliary, tokens.alive, self.aux_weight)
        return logits, heads, auxiliary

    def features(
        self,
        images: Array,
        *,
        blocks: Sequence[int] = (),
        norm: bool = False,
        logits: bool = False,
        ids: Array | None = None,
    ) -> Features:
        """What the head classifies, and the tokens: `model.apply(variables, images, method="features")`.

        Args (images and ids as in a call):
          blocks: numbers of the blocks whose tokens to return, too (static; from 0, negative
            ones from the end). In a backbone with stages they number its stages.
          norm: pass these through the final norm, as timm's `forward_intermediates(norm=True)`.
          logits: classify, too.

        Raises:
          ValueError: no such block, or a norm that does not fit it.
        """
        asked = self._taps(blocks, norm)
        context = self._context(images, ids, False, taps=asked)
        tokens, _, records = self.body(images, context)
        fields = {"pooled": self.head(tokens, classify=False)[0], "tokens": tokens}
        if logits:
            fields["logits"] = self._classify(tokens, context)[0]
        return self._features(self.body, records.get("taps", {}), asked, norm, **fields)


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, by `fnmatch` pattern.

    Any patch size and resolution can be asked for besides those listed.
    """
    listed = architectures.listed()
    reduced = [f"{m}_{n}" for n in listed for m, reason in pairings(n).items() if reason is None]
    cascades = [f"{architectures.CASCADE}_{n}" for n in architectures.CASCADES]
    cascades += [
        f"{architectures.CASCADE}_{m}_{n}" for m in reducers.METHODS for n in architectures.REDUCED_CASCADES
    ]
    multiexits = [f"{architectures.MULTIEXIT}_{n}" for n in listed if _isotropic(n) and _exits_alike(n)]
    known = [*listed, *reduced, *cascades, *multiexits]
    return sorted(fnmatch.filter(known, pattern))


def pairings(arch_name: str) -> dict[str, str | None]:
    """For each method, why it makes no sense in a backbone, or None if it works there.

    Args:
      arch_name: a name without a method, "deit_small_patch16_224".
    """
    arch = architectures.get(arch_name)
    body = _backbone(arch, arch.options, {})(parent=None)
    return {name: method.refusal(body) for name, method in reducers.METHODS.items()}


def split_name(name: str) -> tuple[str | None, str]:
    """`"dtps_deit_small_patch16_224"` to `("dtps", "deit_small_patch16_224")`.

    The first part of a cascade's name is "dvt", or "dvt_dtps" with a method; of a
    model with exits at several depths "multiexit".

    Raises:
      UnknownNameError: with the nearest names.
    """
    if architectures.parse(name) is not None:
        return None, name
    cascaded = f"{architectures.CASCADE}_"
    methods = (architectures.CASCADE, architectures.MULTIEXIT, *reducers.METHODS)
    for method in (*methods, *(cascaded + inner for inner in reducers.METHODS)):
        arch = name.removeprefix(f"{method}_")
        if arch != name and architectures.parse(arch) is not None:
            return method, arch
    wrong, _, arch = name.removeprefix(cascaded).partition("_")
    if architectures.parse(arch) is not None:
        known = reducers.METHODS if name.startswith(cascaded) else methods
        raise UnknownNameError(f"unknown method {wrong!r}: {suggest(wrong, known)}")
    if os.path.isdir(name) or "://" in name:
        raise UnknownNameError(
            f"{name} is a folder, no model's name: dyntoken.load_run({name!r}) opens a run"
        )
    if os.path.isfile(name):
        raise UnknownNameError(
            f"{name} is a file, no model's name: dyntoken.load_weights(dyntoken.create_model(NAME), {name!r})"
        )
    raise UnknownNameError(f"unknown model {name!r}: {suggest(name, list_models())}")


def create_model(name: str, **overrides: Any) -> Model | Cascade | MultiExit:
    """Builds a model by name.

    `[method_]backbone_size_patchP_RES`, timm's spelling for the backbone part
    (without `_patchP_RES` it is 16 and 224), or `[method_]t2t_vit_14`; a cascade
    of exits is `dvt_deit_small`, `dvt_t2t_vit_12`, or with a method in each exit
    `dvt_dtps_deit_small`; a dense model with exits at several depths is
    `multiexit_deit_small`.

    Args:
      name: for instance "dtps_deit_small_patch16_224"; see `list_models`.
      **overrides: any field: of the model (`num_classes`, `keep`, `at`, `form`, `keep_round_to`,
        `pool`, `representation_size`, `fc_norm`), of the backbone (`img_size`, `in_chans`,
        `drop_path`, `dtype`, ...), of the method (`fuse`, `score`, `shuffle`,
        `temperature`, `tau`) or of the cascade (`exits`, `feature_reuse`,
        `relation_reuse`, ...). `dtype` may be a name ("bfloat16", "bf16").

    Returns:
      A linen module; `model.apply(variables, images)` returns an `Output`.

    Raises:
      UnknownNameError: unknown name or keyword, with the nearest valid ones.
      ValueError: a value of another type or out of range, or several that do not
        fit together.
    """
    kind, method, arch_name = _kind(name)
    if (
        method is None
        and kind is not MultiExit
        and (wrong := [key for key in overrides if key in OF_METHODS])
    ):
        other = f"{'dvt_' if kind is Cascade else ''}dtps_{arch_name}"
        raise UnknownNameError(
            f"{name} is dense and takes no {wrong[0]!r}: put a method into its name, as in {other}"
        )
    known = keywords(name)  # refuses a backbone of which no cascade can be made, before its values
    kind.check_options(overrides)
    overrides = schema.check(known, overrides, owner=name)
    arch = architectures.get(arch_name)
    options = {key: value for key, value in arch.options.items() if key not in kind.decides | kind.resets}
    backbone = _backbone(arch, options, overrides)
    own = schema.fields(kind, but=OF_NAME)
    fields = {"num_classes": arch.num_classes, **{k: v for k, v in arch.head.items() if k in own}}
    fields |= {k: _static(v) for k, v in overrides.items() if k in own}
    if kind is MultiExit:
        fields.setdefault("exits", default_exits(backbone(parent=None).depth))
    if method is not None:
        body = kind(arch=arch_name, backbone=backbone, **fields).plain()  # a cascade sets the grid itself
        fields |= _site_fields(method, fields.get("at"), overrides, body)
        fields["reducer" if kind is Cascade else "method"] = method
    model = kind(arch=arch_name, backbone=backbone, **fields)
    model.validate()
    return model


def reduced(model: Model, method: str, **options: Any) -> Model:
    """A dense model under a reduction method: the same variables, and what the method adds to them.

    Args:
      model: dense, from `create_model` or `load_pretrained`.
      method: row of `reducers.METHODS`.
      **options: `keep`, `at`, `form` and the method's own, see `create_model`.

    Raises:
      UnknownNameError: unknown method or option, with the nearest ones.
      ValueError: a model that is reduced already, or a method that its backbone refuses.
    """
    if not isinstance(model, Model) or model.method is not None:
        raise ValueError(
            "only a dense model of one exit can be reduced; model.clone(keep=...) changes counts"
        )
    own = schema.fields(Model, but=OF_NAME)
    known = {**{key: own[key] for key in sorted(OF_SITES)}, **of_method(method)}
    options = schema.check(known, options, owner=f"method {method!r}")
    fields = {key: _static(value) for key, value in options.items() if key in OF_SITES}
    fields |= _site_fields(method, fields.get("at"), options, model.plain())
    made = model.clone(method=method, **fields)
    made.validate()
    return made


def keywords(name: str) -> dict[str, Any]:
    """What `create_model(name)` takes: keyword -> annotation, see `schema`.

    Raises:
      UnknownNameError: no such model.
      ValueError: a backbone that the first part of the name does not go with.
    """
    kind, method, arch_name = _kind(name)
    body = schema.fields(BACKBONES[architectures.get(arch_name).backbone], but=OF_BACKBONE)
    if kind is MultiExit and not _isotropic(arch_name):
        raise ValueError(
            f"{name}: exits at several depths need blocks of one width; {arch_name} has stages. "
            f"multiexit_deit_small and all of list_models('{architectures.MULTIEXIT}_*') have one"
        )
    if kind is Cascade and "tokens" not in body:
        fitting = architectures.CASCADES
        raise ValueError(
            f"{name}: a cascade needs a backbone whose token grid can be chosen; those of "
            f"{', '.join(fitting[:2])}, ... and {fitting[-1]} can, {arch_name} cannot"
        )
    own = schema.fields(kind, but=OF_NAME)
    if method is None:
        own = {key: value for key, value in own.items() if key not in OF_METHODS}
    else:
        own |= {"at": own["at"] | None} | of_method(method)
    return {key: value for key, value in body.items() if key not in kind.decides} | own


def _kind(name: str) -> tuple[type[Model | Cascade | MultiExit], str | None, str]:
    """A model's name as its class, its reduction method and its backbone."""
    first, arch_name = split_name(name)
    prefix, _, reducer = (first or "").partition("_")
    if prefix in KINDS:
        return KINDS[prefix], reducer or None, arch_name
    return Model, first, arch_name


def _isotropic(arch_name: str) -> bool:
    """Whether all blocks of a backbone have one width."""
    return issubclass(BACKBONES[architectures.get(arch_name).backbone], Isotropic)


def _exits_alike(arch_name: str) -> bool:
    """Whether the head of a name is one that an exit at any depth can have: no second token, no pooling of its own."""
    arch = architectures.get(arch_name)
    plain = {"pool"} >= arch.head.keys() and arch.head.get("pool") in (None, "mean")
    return plain and not arch.options.get("distilled")


def of_method(method: str) -> dict[str, Any]:
    """Keywords that a method takes, with their annotations."""
    # What the backbone says is no keyword of the method.
    return schema.fields(reducers.METHODS[method].make, but=(*OF_SITE, "predictor_eps", "heads"))


def _site_fields(method: str, at: Any, overrides: dict[str, Any], body: Any) -> dict[str, Any]:
    """`at` (by default the backbone's) and the method's own options."""
    options = tuple(sorted((k, _static(v)) for k, v in overrides.items() if k in of_method(method)))
    plain = reducers.method(method, **dict(options)).plain
    if at is None or at == ():
        at = body.sites_of(plain)
    fields = {"at": (at,) if isinstance(at, int) else tuple(at), "method_options": options}
    if "keep" not in overrides and plain.default_keep is not None:
        fields["keep"] = plain.default_keep
    return fields


def _backbone(arch: architectures.Arch, options: dict[str, Any], overrides: dict[str, Any]) -> Spec:
    """The recipe of a backbone: the name's options, then the user's."""
    of_backbone = schema.fields(BACKBONES[arch.backbone])
    options = {**options, **{k: _static(v) for k, v in overrides.items() if k in of_backbone}}
    return Spec.of(BACKBONES[arch.backbone], **schema.check(of_backbone, options))  # names hold numbers, too


def _static(value: Any) -> Any:
    """Config lists to tuples: module fields must be hashable."""
    return tuple(_static(v) for v in value) if isinstance(value, (list, tuple)) else value
