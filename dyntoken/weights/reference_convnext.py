"""Constructor arguments of ConvNeXt (facebookresearch/ConvNeXt, timm) and of DynamicViT's ConvNeXt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.reference_vit import GELU, prune_sites
from dyntoken.weights.references import Arguments, Reference

SHARED = {
    "img_size": 224,  # no argument there: the classes take images of any size
    "in_chans": 3,
    "num_classes": 1000,
    "depths": (3, 3, 9, 3),
    "dims": (96, 192, 384, 768),
    "drop_path_rate": 0.0,
    "head_init_scale": 1.0,  # concerns fresh parameters only
}
CONVNEXT = {**SHARED, "layer_scale_init_value": 1e-6}
TIMM = {
    **SHARED,
    "global_pool": "avg",
    "output_stride": 32,
    "kernel_sizes": 7,
    "ls_init_value": 1e-6,
    "stem_type": "patch",
    "patch_size": 4,
    "head_norm_first": False,
    "head_hidden_size": None,
    "conv_mlp": False,
    "conv_bias": True,
    "use_grn": False,
    "act_layer": "gelu",
    "norm_layer": None,
    "norm_eps": None,
    "drop_rate": 0.0,
}


def convnext(constructor: Mapping[str, Any]) -> Reference:
    """`ConvNeXt` of facebookresearch/ConvNeXt."""
    return _create(None, _official(Arguments("ConvNeXt", constructor, CONVNEXT)))


def teacher(constructor: Mapping[str, Any]) -> Reference:
    """`ConvNeXt_Teacher` of raoyongming/DynamicViT: a plain ConvNeXt."""
    return _create(None, _official(Arguments("ConvNeXt_Teacher", constructor, CONVNEXT)))


def dynamicvit(constructor: Mapping[str, Any]) -> Reference:
    """`AdaConvNeXt` of raoyongming/DynamicViT."""
    cls = "AdaConvNeXt"
    own = {"sparse_ratio": (0.75, 0.5, 0.25), "pruning_loc": (1, 2, 3)}
    arguments = Arguments(cls, constructor, {**CONVNEXT, **own})
    sites = prune_sites(cls, arguments["pruning_loc"], arguments["sparse_ratio"])
    return _create("dynamicvit", {**_official(arguments), **sites})


def timm(constructor: Mapping[str, Any]) -> Reference:
    """timm's `ConvNeXt`."""
    arguments = Arguments("ConvNeXt", constructor, TIMM)
    arguments.only(
        global_pool=("avg",),
        output_stride=(32,),
        stem_type=("patch",),
        head_norm_first=(False,),
        head_hidden_size=(None,),
        conv_mlp=(False,),
        conv_bias=(True,),
        use_grn=(False,),
        act_layer=GELU,
        norm_layer=(None,),
        drop_rate=(0,),
    )
    kernel, eps = arguments["kernel_sizes"], arguments["norm_eps"]
    kernels = set(kernel) if isinstance(kernel, (list, tuple)) else {kernel}
    scale = arguments["ls_init_value"]
    fields = {
        **_fields(arguments),
        "patch_size": arguments.size("patch_size"),
        "layer_scale": None if scale is None else float(scale),
        "norm_eps": 1e-6 if eps is None else float(eps),
    }
    if len(kernels) == 1:
        fields["kernel"] = int(kernels.pop())
    else:
        arguments.only(kernel_sizes=(7,))
    return _create(None, fields)


def _official(arguments: Arguments) -> dict[str, Any]:
    scale = arguments.number("layer_scale_init_value")
    return {**_fields(arguments), "layer_scale": scale if scale > 0 else None}


def _fields(arguments: Arguments) -> dict[str, Any]:
    return {
        "img_size": arguments.size("img_size"),
        "in_chans": int(arguments["in_chans"]),
        "num_classes": int(arguments["num_classes"]),
        "depths": tuple(int(n) for n in arguments["depths"]),
        "widths": tuple(int(n) for n in arguments["dims"]),
        "drop_path": arguments.number("drop_path_rate"),
    }


def _create(method: str | None, fields: Mapping[str, Any]) -> Reference:
    # Every field that the size stands for is overridden.
    return Reference(create_model(f"{method}_convnext_tiny" if method else "convnext_tiny", **fields))
