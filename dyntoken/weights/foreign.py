"""Key layouts of other libraries, as tables that lead to timm's names (which `keys` knows).

A row is `(their name, timm's name)`, without the block's number and, where it is a layer, without
its leaf. Of their name, "|" separates spellings and `{a,b}` the parts that timm holds as one array.
transformers has two sets of names: those of its files (and of version 4), and version 5's in memory.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from dyntoken.weights.errors import WeightsError, first_line
from dyntoken.weights.files import Bundle

Rows = tuple[tuple[str, str], ...]
Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The key names of one library or repository.

    Attributes:
      words: what messages call it.
      marks: patterns that keys must match, each at least one; what stands before the first is
        what wrappers and task classes put ahead of all of the model's keys.
      block: pattern of what stands before the names of a block, with its number as a group.
      blocks, others: rows of a block's names, and of the names outside.
      heads: rows of names outside the model's prefix.
      config: the `model_type` that its files most often have, see `configs`; None: it has none.
      family: row of `shapes.FAMILIES`; "": as the arrays tell.
      finish: what names alone do not say.
      resize: how its code resizes position embeddings, a row of `resample.METHODS`, by the arrays in timm's names.
    """

    words: str
    marks: tuple[str, ...]
    block: str
    blocks: Rows
    others: Rows
    heads: Rows = ()
    config: str | None = None
    family: str = ""
    finish: Callable[[Tensors], None] = lambda tensors: None
    resize: Callable[[Tensors], str] = lambda tensors: "bicubic"


def _one_head(tensors: Tensors) -> None:
    """DeiT without a second classifier: nothing reads the distillation token, which is a register then."""
    if "head_dist.weight" not in tensors and "dist_token" in tensors:
        tensors["reg_token"] = tensors.pop("dist_token")


def fold_class_row(tensors: Tensors) -> None:
    """DINOv2 with registers: positions hold a row for the class token and none for the registers.

    What it adds to the class token is made part of that, as timm's files have it.
    """
    if "reg_token" in tensors and "pos_embed" in tensors:
        first = tensors["pos_embed"][:, :1]
        tensors["cls_token"] = tensors["cls_token"] + first
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]


def _gated(tensors: Tensors) -> None:
    """DINOv3's MLP: its second layer is `fc1` or, beside a gate, `fc1_x`; one bias or none for all layers."""
    for key in [key for key in tensors if key.endswith(("mlp.fc1.weight", "mlp.fc1.bias"))]:
        layer, _, leaf = key.rpartition("fc1.")
        if f"{layer}fc1_g.weight" in tensors:
            tensors[f"{layer}fc1_x.{leaf}"] = tensors.pop(key)
    layers = [key for key in tensors if re.search(r"(attn\.proj|mlp\.fc\w+)\.weight$", key)]
    biases = {key: f"{key.removesuffix('weight')}bias" for key in layers}
    if any(bias in tensors for bias in biases.values()):
        for key, bias in biases.items():
            tensors.setdefault(bias, np.zeros(len(tensors[key]), np.float32))


def _masked(tensors: Tensors) -> None:
    """The official DINOv3's bias of keys is masked: those of queries and values alone are added."""
    for key in [key for key in tensors if key.endswith("qkv.bias_mask")]:
        bias, mask = tensors.pop(key.removesuffix("_mask")), tensors.pop(key)
        q, k, v = np.split(np.where(mask == 0, 0, bias).astype(np.float32), 3)
        if k.any():
            tensors[key.removesuffix("_mask")] = np.concatenate([q, k, v])
        else:
            layer = key.removesuffix("qkv.bias_mask")
            tensors |= {f"{layer}q_bias": q, f"{layer}v_bias": v}
    tensors.pop("rope_embed.periods", None)  # in bfloat16; timm and transformers compute them in float32


def _split_query(tensors: Tensors) -> None:
    """SigLIP's pooling holds query, key and value as one product, timm the query apart.

    Its image classifier reads the mean of the patches and leaves the pooling unused.
    """
    if "head.weight" in tensors:
        for key in [key for key in tensors if key.startswith("attn_pool.")]:
            del tensors[key]
    for leaf in ("weight", "bias"):
        whole = tensors.pop(f"attn_pool.in_proj_{leaf}", None)
        if whole is not None:
            rows = len(whole) // 3
            tensors[f"attn_pool.q.{leaf}"], tensors[f"attn_pool.kv.{leaf}"] = whole[:rows], whole[rows:]


def _projection(tensors: Tensors) -> None:
    """CLIP's projection has no bias; openai's is stored the other way round."""
    if (turned := tensors.pop("proj", None)) is not None:
        tensors["head.weight"] = turned.T
    if "classifier.weight" in tensors:  # of transformers, on the patches' mean ahead of the last norm
        for leaf in ("weight", "bias"):
            tensors[f"head.{leaf}"] = tensors.pop(f"classifier.{leaf}")
            del tensors[f"norm.{leaf}"]
    if "head.weight" in tensors and "head.bias" not in tensors:
        tensors["head.bias"] = np.zeros(len(tensors["head.weight"]), np.float32)


EMBEDDINGS: Rows = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection|embeddings.patch_embeddings", "patch_embed.proj"),
)
ATTENTION: Rows = (
    ("attention.attention.{query,key,value}|attention.{q_proj,k_proj,v_proj}", "attn.qkv"),
    ("attention.output.dense|attention.o_proj", "attn.proj"),
)
DINO: Rows = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)
TOWER: Rows = (  # of CLIP and SigLIP
    ("self_attn.{q_proj,k_proj,v_proj}", "attn.qkv"),
    ("self_attn.out_proj", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
TOWER_EMBEDDINGS: Rows = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("post_layernorm", "norm"),
)
CLIP = Layout(
    "Hugging Face's CLIP layout",
    marks=(r"pre_layrnorm\.weight$", r"encoder\.layers\.\d+\.self_attn\.q_proj\.weight$"),
    block=r"encoder\.layers\.(\d+)\.",
    blocks=TOWER,
    others=(*TOWER_EMBEDDINGS, ("pre_layrnorm", "norm_pre")),
    heads=(("visual_projection", "head"), ("classifier", "classifier")),
    config="clip_vision_model",
    family="clip",
    finish=_projection,
)
LAYOUTS = (
    Layout(
        "Hugging Face's ViT layout",
        marks=(r"(?:encoder\.layer|layers)\.\d+\.layernorm_before\.weight$",),
        block=r"(?:encoder\.layer|layers)\.(\d+)\.",
        blocks=(
            *ATTENTION,
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense|mlp.fc1", "mlp.fc1"),
            ("output.dense|mlp.fc2", "mlp.fc2"),
        ),
        others=(*EMBEDDINGS, ("layernorm", "norm"), ("pooler.dense", "pre_logits.fc")),
        heads=(("classifier|cls_classifier", "head"), ("distillation_classifier", "head_dist")),
        config="vit",
        family="vit",
        finish=_one_head,
    ),
    Layout(
        "Hugging Face's DINOv2 layout",
        marks=(r"encoder\.layer\.\d+\.layer_scale1\.lambda1$",),
        block=r"encoder\.layer\.(\d+)\.",
        blocks=(
            *ATTENTION,
            *DINO,
            ("mlp.fc1|mlp.weights_in|mlp.{gate_proj,up_proj}", "mlp.fc1"),
            ("mlp.fc2|mlp.weights_out|mlp.down_proj", "mlp.fc2"),
        ),
        others=(*EMBEDDINGS, ("layernorm", "norm")),
        heads=(("classifier", "head"),),
        config="dinov2",
        family="dinov2",
        finish=fold_class_row,
        resize=lambda tensors: "timm" if "reg_token" in tensors else "bicubic",
    ),
    Layout(
        "Hugging Face's DINOv3 layout",
        marks=(r"embeddings\.patch_embeddings\.weight$", r"(?:model\.)?layer\.\d+\.layer_scale1\.lambda1$"),
        block=r"(?:model\.)?layer\.(\d+)\.",
        blocks=(
            *ATTENTION,
            *DINO,
            ("mlp.gate_proj", "mlp.fc1_g"),
            ("mlp.up_proj", "mlp.fc1"),
            ("mlp.down_proj", "mlp.fc2"),
        ),
        others=EMBEDDINGS,
        heads=(("classifier", "head"),),
        config="dinov3_vit",
        family="dinov3",
        finish=_gated,
    ),
    CLIP,
    Layout(
        "Hugging Face's SigLIP layout",
        marks=(
            r"embeddings\.position_embedding\.weight$",
            r"encoder\.layers\.\d+\.self_attn\.q_proj\.weight$",
        ),
        block=r"encoder\.layers\.(\d+)\.",
        blocks=TOWER,
        others=(
            *TOWER_EMBEDDINGS,
            ("head.probe", "attn_pool.latent"),
            ("head.attention.in_proj_weight", "attn_pool.in_proj_weight"),
            ("head.attention.in_proj_bias", "attn_pool.in_proj_bias"),
            ("head.attention.out_proj", "attn_pool.proj"),
            ("head.layernorm", "attn_pool.norm"),
            ("head.mlp.fc1", "attn_pool.mlp.fc1"),
            ("head.mlp.fc2", "attn_pool.mlp.fc2"),
        ),
        heads=(("classifier", "head"),),
        config="siglip_vision_model",
        family="siglip",
        finish=_split_query,
    ),
    Layout(
        "OpenAI's CLIP layout",
        marks=(r"transformer\.resblocks\.\d+\.ln_1\.weight$", r"class_embedding$"),
        block=r"transformer\.resblocks\.(\d+)\.",
        blocks=(
            ("attn.in_proj_weight", "attn.qkv.weight"),
            ("attn.in_proj_bias", "attn.qkv.bias"),
            ("attn.out_proj", "attn.proj"),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ),
        others=(
            ("class_embedding", "cls_token"),
            ("positional_embedding", "pos_embed"),
            ("conv1", "patch_embed.proj"),
            ("ln_pre", "norm_pre"),
            ("ln_post", "norm"),
            ("proj", "proj"),
        ),
        config="clip_vision_model",
        family="clip",
        finish=_projection,
    ),
    Layout(
        "torchvision's ViT layout",
        marks=(r"encoder\.layers\.encoder_layer_\d+\.ln_1\.weight$",),
        block=r"encoder\.layers\.encoder_layer_(\d+)\.",
        blocks=(
            ("self_attention.in_proj_weight", "attn.qkv.weight"),
            ("self_attention.in_proj_bias", "attn.qkv.bias"),
            ("self_attention.out_proj", "attn.proj"),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            ("mlp.linear_1|mlp.0", "mlp.fc1"),
            ("mlp.linear_2|mlp.3", "mlp.fc2"),
        ),
        others=(
            ("class_token", "cls_token"),
            ("encoder.pos_embedding", "pos_embed"),
            ("conv_proj", "patch_embed.proj"),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
        ),
    ),
    Layout(  # timm's names but for the giant's MLP and the registers; training files number chunks of blocks, too
        "the official DINOv2 layout",
        marks=(r"mask_token$", r"blocks\.\d+\.(?:\d+\.)?ls1\.gamma$", r"pos_embed$"),
        block=r"blocks\.(?:\d+\.)?(\d+)\.",
        blocks=(("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2")),
        others=(("register_tokens", "reg_token"),),
        finish=fold_class_row,
        resize=lambda tensors: "timm" if "reg_token" in tensors else "dinov2",
    ),
    Layout(
        "the official DINOv3 layout",
        marks=(r"storage_tokens$", r"blocks\.\d+\.ls1\.gamma$"),
        block=r"blocks\.(\d+)\.",
        blocks=(("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2")),
        others=(("storage_tokens", "reg_token"),),
        config="dinov3_vit",
        family="dinov3",
        finish=_masked,
    ),
)


def layout_of(names: Mapping[str, object]) -> tuple[Layout, str] | None:
    """The layout of a source's keys and what stands ahead of the model's; None: of no other library."""
    for layout in LAYOUTS:
        roots: list[str] = []
        for mark in layout.marks:
            hit = re.compile(rf"((?:.*?\.)??){mark}")
            found = [root[1] for name in names if "text_model." not in name and (root := hit.match(name))]
            roots = [root for root in roots if root in found] if roots else found
            if not roots:
                break
        else:
            return layout, min(roots, key=len)
    return None


def translated(bundle: Bundle) -> Bundle:
    """The source under timm's names, if it is in a layout of `LAYOUTS`; any other as it is.

    What has no counterpart keeps its name.

    Raises:
      WeightsError: arrays that a layout has are missing or of other dimensions.
    """
    found = None if bundle.own else layout_of(bundle.tensors)
    if found is None:
        return bundle
    layout, root = found
    heads = spelled(layout.heads)
    inside = {
        key: value
        for key, value in bundle.tensors.items()
        if key.startswith(root) or any(part in heads for part in key.split("."))
    }
    try:
        tensors = renamed(inside, layout, root)
        layout.finish(tensors)
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{bundle.origin}: has the names of {layout.words}, but not its arrays ({first_line(error)}); "
            "look whether the file is whole"
        ) from error
    notes = bundle.notes
    if left := [key for key in bundle.tensors if key not in inside]:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        notes = (*notes, f"{len(left)} arrays beside the model's ({root}*) left out ({shown})")
    return dataclasses.replace(bundle, tensors=tensors, layout=layout, notes=notes)


def renamed(tensors: Mapping[str, np.ndarray], layout: Layout, root: str) -> Tensors:
    """Arrays under timm's names; parts that timm holds as one are joined, an absent bias among them as 0."""
    blocks, others, heads = (spelled(rows) for rows in (layout.blocks, layout.others, layout.heads))
    result: Tensors = {}
    joined: dict[tuple[str, str], dict[int, np.ndarray]] = collections.defaultdict(dict)
    counts: dict[tuple[str, str], int] = {}
    for key, value in tensors.items():
        name, table, start = key, heads, ""
        if key.startswith(root):
            name, table = key.removeprefix(root), {**heads, **others}
            if block := re.match(layout.block, name):
                name, table, start = name[block.end() :], blocks, f"blocks.{block[1]}."
        stem, _, leaf = name.rpartition(".")
        if name in table:
            stem, leaf = name, ""
        elif stem not in table and not key.startswith(root):
            stem = stem.rpartition(".")[2]  # a wrapper's name before a head
        if stem not in table:
            result[f"{start}{name}"] = value
            continue
        new, part, count = table[stem]
        new = f"{start}{new}"
        if count == 1:
            result[".".join(filter(None, (new, leaf)))] = value
        else:
            joined[new, leaf][part], counts[new, leaf] = value, count
    for (new, leaf), parts in joined.items():
        none = np.zeros_like(next(iter(parts.values())))
        if leaf == "bias" and new.endswith("qkv") and 1 not in parts:  # keys have none: DINOv3
            layer = new.removesuffix("qkv")
            result |= {f"{layer}q_bias": parts.get(0, none), f"{layer}v_bias": parts.get(2, none)}
            continue
        rows = [parts.get(n, none if leaf == "bias" else None) for n in range(counts[new, leaf])]
        result[f"{new}.{leaf}"] = np.concatenate([row for row in rows if row is not None])
    for name in ("cls_token", "pos_embed", "attn_pool.latent"):  # CLIP and SigLIP store plain rows
        if name in result and result[name].ndim < 3 and result[name].size:
            result[name] = result[name].reshape(1, -1, result[name].shape[-1])
    if "reg_token" in result and not result["reg_token"].size:  # no registers: an array of no rows
        del result["reg_token"]
    return result


def spelled(rows: Rows) -> dict[str, tuple[str, int, int]]:
    """Every spelling of their names -> timm's, which part of it this is, and of how many."""
    table = {}
    for theirs, ours in rows:
        for spelling in theirs.split("|"):
            start, _, rest = spelling.partition("{")
            parts = rest.rstrip("}").split(",")
            table |= {start + part: (ours, at, len(parts)) for at, part in enumerate(parts)}
    return table
