"""Constructor arguments of CvT (microsoft/CvT, lib/models/cls_cvt.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.registry import suggest
from dyntoken.weights.files import WeightsError
from dyntoken.weights.references import Arguments, Reference

CLASS = "ConvolutionalVisionTransformer"
CVT = {
    "in_chans": 3,
    "num_classes": 1000,
    "act_layer": "QuickGELU",  # as its own builder sets it
    "norm_layer": None,
    "init": "trunc_norm",  # only concerns fresh parameters
    "spec": None,
    "img_size": 224,
}
# Keys of the spec, one value per stage -> our field.
FIELDS = {
    "PATCH_SIZE": "patch_sizes",
    "PATCH_STRIDE": "patch_strides",
    "PATCH_PADDING": "patch_paddings",
    "DIM_EMBED": "widths",
    "NUM_HEADS": "heads",
    "DEPTH": "depths",
    "MLP_RATIO": "mlp_ratios",
    "DROP_RATE": "dropout",
    "ATTN_DROP_RATE": "attn_dropout",
    "DROP_PATH_RATE": "drop_path",
    "QKV_BIAS": "qkv_bias",
    "CLS_TOKEN": "class_tokens",
    "KERNEL_QKV": "kernels",
    "STRIDE_KV": "kv_strides",
    "PADDING_KV": "kv_paddings",
}
FIXED = {"QKV_PROJ_METHOD": "dw_bn", "STRIDE_Q": 1}
UNREAD = ("INIT", "POS_EMBED")  # its code reads the first for fresh parameters only, the second never


def cvt(constructor: Mapping[str, Any]) -> Reference:
    """`ConvolutionalVisionTransformer`.

    The class takes images of any size; ours is built for one, which may be given
    as `img_size`.
    """
    arguments = Arguments(CLASS, constructor, CVT)
    arguments.only(act_layer=("QuickGELU", None))
    fields = _fields(arguments["spec"])
    model = create_model(
        "cvt_13",  # every field that the size stands for is overridden
        img_size=arguments.size("img_size"),
        in_chans=int(arguments["in_chans"]),
        num_classes=int(arguments["num_classes"]),
        norm_eps=arguments.epsilon(1e-5),
        pool="token" if fields["class_tokens"][-1] else "mean",
        **fields,
    )
    return Reference(model)


def _fields(spec: Mapping[str, Any] | None) -> dict[str, tuple[Any, ...]]:
    """The spec in our words."""
    if not spec:
        raise WeightsError(f"{CLASS} needs its spec: the MODEL.SPEC of its yaml files")
    known = ("NUM_STAGES", *FIELDS, *FIXED, "PADDING_Q", *UNREAD)
    for name in spec:
        if name not in known:
            raise WeightsError(f"{CLASS}: the spec has no entry {name!r}: {suggest(name, known)}")
    missing = [name for name in ("NUM_STAGES", *FIELDS, *FIXED, "PADDING_Q") if name not in spec]
    if missing:
        raise WeightsError(f"{CLASS}: the spec lacks {', '.join(missing)}")
    stages = range(int(spec["NUM_STAGES"]))
    for name, value in FIXED.items():
        if any(spec[name][stage] != value for stage in stages):
            raise WeightsError(
                f"{CLASS}: {name}={spec[name]} cannot be imported: only {value!r} is implemented"
            )
    for stage in stages:
        if spec["KERNEL_QKV"][stage] != 2 * spec["PADDING_Q"][stage] + 1:
            raise WeightsError(
                f"{CLASS}: KERNEL_QKV={spec['KERNEL_QKV']} with PADDING_Q={spec['PADDING_Q']} changes the size "
                "of the queries' map, so that no residual can be added"
            )
    return {field: tuple(spec[name][stage] for stage in stages) for name, field in FIELDS.items()}
