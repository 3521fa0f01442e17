"""Key maps: paths of our parameter tree <-> key names of the public checkpoints.

A map is mechanical and invertible. Rules turn a path such as
"backbone/trunk/blocks_0/attn/qkv/kernel" into the reference's key
("blocks.0.attn.qkv.weight"); the leaf's name and rank fix the order of axes. So the
same map reads a checkpoint, writes one, and exports gradients in the
reference's own names and order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dyntoken.nn.reduction_sites import added
from dyntoken.ops import windows
from dyntoken.registry import Table
from dyntoken.weights.dialects import USUAL, Dialect

# Leaf names of linen layers as torch spells them.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Entries of a torch state dict that are no parameters: counters and index buffers.
BUFFERS = re.compile(  # a mask token is read in pretraining alone
    r"(mask_token|num_batches_tracked|relative_position_index|relative_coords_table|attn_mask|point_coord|out_zero_mask)$"
)

# (pattern of our path, replacement): first match wins, applied before the leaf is renamed.
VIT_RULES = (
    (r"^backbone/(cls_token|dist_token|reg_token|pos_embed)$", r"\1"),
    (r"^backbone/patch_embed/proj/", r"patch_embed/proj/"),
    (r"^backbone/trunk/blocks_(\d+)/", r"blocks/\1/"),
    (r"^backbone/trunk/reducer_(\d+)/predictor/(in|out)_conv_(\d+)/", r"score_predictor/\1/\2_conv/\3/"),
    (r"^backbone/trunk/reducer_(\d+)/token_select/", r"blocks/\1/attn/token_select/mlp_head/"),
    (r"^backbone/trunk/reducer_(\d+)/(head|layer)_select/", r"blocks/\1/\2_select/mlp_head/"),
    (r"^backbone/trunk/reducer_(\d+)/(merge|prune)_masker/", r"blocks/\1/\2_masker/"),
    (r"^backbone/trunk/reducer_(\d+)/head_predictor/senet_(\d)/", r"score_predictor/\1/senet/\2/"),
    (
        r"^backbone/trunk/reducer_(\d+)/head_predictor/(in|out)_conv_(\d+)/",
        r"score_predictor/\1/\2_conv/0/\3/",
    ),
    (r"^backbone/trunk/reducer_(\d+)/(norm/|score/|queries$|v$)", r"cluster_layers/\1/\2"),
    (r"^backbone/trunk/reducer_(\d+)/weight_(\d)/", r"cluster_layers/\1/weight/\2/"),
    # As one part: a leaf called "scale" would be a norm's.
    (r"^backbone/trunk/reducer_(\d+)/gain$", r"cluster_layers.\1.scale"),
    (r"^backbone/(norm|norm_pre)/", r"\1/"),
    (r"^head/norm/", r"fc_norm/"),
    (r"^head/attn_pool/", r"attn_pool/"),
    (r"^head/cls/", r"head/"),
    (r"^head/dist/", r"head_dist/"),
    (r"^head/token/", r"head_token/"),
    (r"^head/token_norm/", r"head_token_norm/"),
    (r"^head/pre_logits/", r"pre_logits/fc/"),
)
EVA_RULES = ((r"^backbone/trunk/blocks_(\d+)/ls([12])/gamma$", r"blocks/\1/gamma_\2"), *VIT_RULES)
T2T_RULES = (
    # The performer's MLP is a torch Sequential.
    (r"^backbone/tokens_to_token/(attention\d)/mlp_(\d)/", r"tokens_to_token/\1/mlp/\2/"),
    (r"^backbone/tokens_to_token/", r"tokens_to_token/"),
    *VIT_RULES,
)
LVVIT_RULES = ((r"^backbone/patch_embed/", r"patch_embed/"), (r"^aux_head/", r"aux_head/"), *VIT_RULES)
PSVIT_RULES = (
    (r"^backbone/pos_layer/", r"pos_layer/"),
    (r"^backbone/stem/conv/", r"stem/0/"),
    (r"^backbone/stem/bn/", r"stem/1/"),
    (r"^backbone/stem/bottleneck_0/downsample_(\d)/", r"stem/4/downsample/\1/"),
    (r"^backbone/stem/bottleneck_1/downsample_(\d)/", r"stem/5/downsample/\1/"),
    (r"^backbone/stem/bottleneck_0/", r"stem/4/"),
    (r"^backbone/stem/bottleneck_1/", r"stem/5/"),
    (r"^backbone/sampling_(\d+)/block/", r"ps_layers/\1/transformer_layer/"),
    (r"^backbone/sampling_(\d+)/offset_layer/", r"ps_layers/\1/offset_layer/"),
    (r"^backbone/trunk/blocks_(\d+)/", r"trans_layers/\1/"),
    *VIT_RULES,
)
PVT_RULES = (
    # Its stages count from 1; there are 4 in every published one.
    *(
        (rf"^backbone/stage_{i}/{ours}", theirs.format(i + 1))
        for i in range(8)
        for ours, theirs in (
            ("pos_embed$", "pos_embed{}"),
            ("patch_embed/", "patch_embed{}/"),
            (r"trunk/blocks_(\d+)/", r"block{}/\1/"),
        )
    ),
    (r"^backbone/stage_\d+/cls_token$", "cls_token"),
    *VIT_RULES,
)
CVT_RULES = (
    (r"^backbone/stage_(\d+)/trunk/blocks_(\d+)/", r"stage\1/blocks/\2/"),
    (r"^backbone/stage_(\d+)/(patch_embed/|cls_token$)", r"stage\1/\2"),
    *VIT_RULES,
)
SWIN_RULES = (
    (r"^backbone/absolute_pos_embed$", "absolute_pos_embed"),
    (r"^backbone/patch_embed_norm/", r"patch_embed/norm/"),
    (r"^backbone/merge_(\d+)/", r"layers/\1/downsample/"),
    (r"^backbone/stage_(\d+)/blocks_(\d+)/fastmlp_(\d)/", r"layers/\1/blocks/\2/fastmlp/fc1/\3/"),
    (r"^backbone/stage_(\d+)/blocks_(\d+)/", r"layers/\1/blocks/\2/"),
    (
        r"^backbone/stage_(\d+)/reducer_(\d+)/predictor/(in|out)_conv_(\d+)/",
        r"layers/\1/score_predictor/\2/\3_conv/\4/",
    ),
    *VIT_RULES,
)
CONVNEXT_RULES = (
    (r"^backbone/stem_conv(_0)?/", r"downsample_layers/0/0/"),
    (r"^backbone/stem_conv_1/", r"downsample_layers/0/conv2/"),
    (r"^backbone/stem_norm/", r"downsample_layers/0/1/"),
    (r"^backbone/downsample_(\d+)_norm/", r"downsample_layers/\1/0/"),
    (r"^backbone/downsample_(\d+)_conv/", r"downsample_layers/\1/1/"),
    (r"^backbone/stage_(\d+)/blocks_(\d+)/fast_path_(\d)/", r"stages/\1/\2/fast_path/\3/"),
    (r"^backbone/stage_(\d+)/blocks_(\d+)/", r"stages/\1/\2/"),
    (
        r"^backbone/stage_\d+/reducer_(\d+)/predictor/(in|out)_conv_(\d+)/",
        r"score_predictor/\1/\2_conv/\3/",
    ),
    *VIT_RULES,
)
# Other spellings of a reference key that some published files use.
VIT_ALIASES = (
    (r"^blocks\.(\d+)\.gamma_([12])$", r"blocks.\1.ls\2.gamma"),  # DeiT-III
    # SPViT lists the one network of its heads once per head.
    (r"^(score_predictor\.\d+\.(?:in|out)_conv)\.\d+(\.\d+\.\w+)$", r"\1.0\2"),
)
EVA_ALIASES = ((r"^blocks\.(\d+)\.ls([12])\.gamma$", r"blocks.\1.gamma_\2"),)
# Keys that some checkpoints hold in parts along the first axis: the pattern, and the parts in order.
UNFUSED = (
    (r"(?<=\.attn\.)qkv(?=\.)", ("q_proj", "k_proj", "v_proj")),
    (r"(?<=\.attn\.)q_bias$", ("q_proj.bias",)),
    (r"(?<=\.attn\.)v_bias$", ("v_proj.bias",)),
)
PSVIT_ALIASES = ((r"^ps_layers\.\d+\.position_layer\.(\w+)$", r"pos_layer.\1"),)  # one layer, listed again
SWIN_ALIASES = ((r"^head\.fc\.(\w+)$", r"head.\1"),)  # timm
CONVNEXT_ALIASES = (  # timm
    (r"^stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(?:mlp\.)?", r"stages.\1.\2."),
    (r"^(?:head\.norm|norm_pre)\.", r"norm."),
    (r"^head\.pre_logits\.", r"pre_logits."),
    (r"^head\.fc\.", r"head."),
)

# Exits of blackfeather-wang/Dynamic-Vision-Transformer, and what exit i takes from the one before.
DVT_EXITS = ("less_less_token", "less_token", "normal_token")
DVT_REUSE = (
    (r"^context_(\d+)/norm/", r"blocks/\1/feature_resuse_mlp/0/"),
    (r"^context_(\d+)/(fc\d)/", r"blocks/\1/feature_resuse_mlp/1/\2/"),
    (r"^relation/fc1/", r"relation_reuse_conv/0/"),
    (r"^relation/fc2/", r"relation_reuse_conv/2/"),
)


def _merging_first(names: Iterable[str]) -> dict[str, str]:
    """timm's Swin merges patches at the start of a layer, the official one at the end of the one before.

    One and the same key means another layer in the two, so the whole list has to
    tell: only timm's first layer merges nothing and its last one does.
    """
    merging = [(name, re.match(r"layers\.(\d+)\.downsample\.", name)) for name in names]
    found = {name: hit for name, hit in merging if hit}
    if not found or any(int(hit[1]) == 0 for hit in found.values()):
        return {}
    return {name: f"layers.{int(hit[1]) - 1}.downsample.{name[hit.end() :]}" for name, hit in found.items()}


def _sampling_buffers(body: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PS-ViT's starting points, and the position layer that each of its iterations lists once more."""
    layer = {leaf: tensors[f"pos_layer.{leaf}"] for leaf in ("weight", "bias")}
    again = {
        f"ps_layers.{step}.position_layer.{leaf}": value
        for step in range(body.iterations)
        for leaf, value in layer.items()
    }
    return {**again, "point_coord": body.official_points()}


def _window_buffers(body: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Swin's index table of every block, and the mask of those whose windows move."""
    found = {}
    for stage, depth in enumerate(body.depths):
        side = body.window_of(stage)
        for index in range(depth):
            block, shift = f"layers.{stage}.blocks.{index}", body.shift_of(stage, index)
            table = windows.relative_position_index(side).reshape(side**2, side**2)
            found[f"{block}.attn.relative_position_index"] = table.astype(np.int64)
            if shift:
                found[f"{block}.attn_mask"] = windows.shift_mask(body.grid_of(stage), side, shift)
    return found


def _overlapping_stem(names: Iterable[str]) -> dict[str, str]:
    """timm's ConvNeXt with two convolutions in its stem: which number is which depends on an activation between."""
    hits = {name: hit for name in names if (hit := re.match(r"stem\.(\d)\.", name))}
    numbers = sorted({hit[1] for hit in hits.values()})
    if len(numbers) != 3:
        return {}
    parts = dict(zip(numbers, ("0", "conv2", "1"), strict=True))
    return {name: f"downsample_layers.0.{parts[hit[1]]}.{name[hit.end() :]}" for name, hit in hits.items()}


@dataclasses.dataclass(frozen=True)
class Naming:
    """The keys of one family of checkpoints.

    Attributes:
      rules: (pattern of our path, replacement): first match wins.
      aliases: (pattern of a key, replacement): other spellings of the reference's keys.
      parts: (pattern in a key, replacements): the reference has several keys, see `UNFUSED`; as
        whole ones they are read all the same (`layouts.fused`).
      pointwise: pattern of paths whose linear layers are 1x1 convolutions there.
      respell: all keys of a file -> those that mean another of the reference's keys.
      buffers: a backbone and its exported arrays -> what else the state dict holds.
    """

    rules: tuple[tuple[str, str], ...]
    aliases: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pointwise: str = "/relation/"
    respell: Callable[[Iterable[str]], dict[str, str]] = lambda names: {}
    buffers: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda body, tensors: {}


# Row: `naming` of a backbone.
RULES = Table(
    "weight family",
    {
        "vit": Naming(VIT_RULES, VIT_ALIASES),
        "eva": Naming(EVA_RULES, EVA_ALIASES),
        "eva_unfused": Naming(EVA_RULES, EVA_ALIASES, UNFUSED),
        "t2t": Naming(T2T_RULES),
        "lvvit": Naming(LVVIT_RULES),
        "psvit": Naming(PSVIT_RULES, PSVIT_ALIASES, buffers=_sampling_buffers),
        "pvt": Naming(PVT_RULES),
        "cvt": Naming(CVT_RULES),
        "swin": Naming(SWIN_RULES, SWIN_ALIASES, respell=_merging_first, buffers=_window_buffers),
        "convnext": Naming(
            CONVNEXT_RULES, CONVNEXT_ALIASES, pointwise="/predictor/", respell=_overlapping_stem
        ),
    },
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: our path, the reference's key, and how the order of their axes differs.

    Attributes:
      path: "/"-joined path of our tree ("batch_stats/..." for statistics).
      key: the reference's key.
      axes: "same", "linear" ([in, out] <-> [out, in]), "pointwise" ([in, out]
        <-> [out, in, 1, 1]), "conv" (HWIO <-> OIHW), or "grid_only" (a position
        embedding without the prefix rows).
      prefix: number of prefix rows, for "grid_only".
    """

    path: str
    key: str
    axes: str = "same"
    prefix: int = 0

    def to_reference(self, value: Any) -> np.ndarray:
        """Our array in the reference's axis order (also right for its gradient)."""
        value = np.asarray(value)
        if self.axes == "linear":
            return np.ascontiguousarray(value.T)
        if self.axes == "pointwise":
            return np.ascontiguousarray(value.T[:, :, None, None])
        if self.axes == "conv":
            return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        if self.axes == "grid_only":
            return np.ascontiguousarray(value[:, self.prefix :])
        return value

    def from_reference(self, value: np.ndarray) -> np.ndarray:
        """The reference's array in our axis order."""
        if self.axes == "linear" and (
            value.ndim == 2 or value.shape[2:] == (1, 1)
        ):  # also as a 1x1 convolution
            return np.ascontiguousarray(value.reshape(value.shape[:2]).T)
        if self.axes == "pointwise" and value.ndim == 4:
            return np.ascontiguousarray(value[:, :, 0, 0].T)
        if self.axes == "conv" and value.ndim == 4:
            return np.ascontiguousarray(value.transpose(2, 3, 1, 0))
        if self.axes == "grid_only":
            # Rows added before the prefix is concatenated: the same sum, with zeros at the prefix.
            rows = np.zeros((1, self.prefix, value.shape[-1]), value.dtype)
            return np.concatenate([rows, value], axis=1)
        return value


class KeyMap:
    """The entries of one model, searchable from both sides."""

    def __init__(self, entries: Iterable[Entry], naming: Naming = Naming(()), dialect: Dialect = USUAL):
        self.entries = tuple(entries)
        self.naming, self.dialect = naming, dialect
        self.by_key = {entry.key: entry for entry in self.entries}
        self.by_path = {entry.path: entry for entry in self.entries}
        if len(self.by_key) != len(self.entries):
            raise ValueError("two parameters share a reference key")

    def find(self, key: str) -> Entry | None:
        """The entry of a reference key, other known spellings included."""
        if key in self.by_key:
            return self.by_key[key]
        for pattern, replacement in self.naming.aliases:
            other, count = re.subn(pattern, replacement, key)
            if count and other in self.by_key:
                return self.by_key[other]
        return None

    def spelled(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A whole file with every key in the reference's meaning."""
        other = self.naming.respell(tensors)
        respelled = {other.get(key, key): value for key, value in tensors.items()}
        return self.dialect.read(respelled, self.by_key)

    def export(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Our flat tree (parameters or gradients) under the reference's keys, its axes in their order."""
        found = {
            self.by_path[path].key: self.by_path[path].to_reference(value) for path, value in flat.items()
        }
        parts = {name: part for key, value in found.items() for name, part in self._parts(key, value)}
        return self.dialect.write(parts)

    def _parts(self, key: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """A key and its array as the reference's own keys and arrays."""
        for pattern, names in self.naming.parts:
            if re.search(pattern, key):
                arrays = np.split(value, len(names))
                return [(re.sub(pattern, name, key), part) for name, part in zip(names, arrays, strict=True)]
        return [(key, value)]


def key_map(
    shapes: Mapping[str, tuple[int, ...]],
    naming: Naming,
    *,
    grid_only: int = 0,
    dialect: Dialect = USUAL,
) -> KeyMap:
    """Builds the key map of a model.

    Args:
      shapes: flat tree, path to shape.
      naming: row of `RULES`.
      grid_only: number of prefix rows, if the reference's position embedding has
        none for them (timm's and TPS's `no_embed_class`); else 0.
      dialect: how the official class of the method spells these keys.

    Raises:
      ValueError: a path that no rule names.
    """
    entries = []
    for path, shape in shapes.items():
        key = reference_key(path, naming.rules)
        if grid_only and key == "pos_embed":
            entries.append(Entry(path, key, "grid_only", grid_only))
        else:
            entries.append(Entry(path, key, axis_order(path, shape, naming.pointwise)))
    return KeyMap(entries, naming, dialect)


def reference_key(path: str, rules: Iterable[tuple[str, str]]) -> str:
    """The reference's key of one of our paths."""
    part = re.match(r"(exit|reuse)_(\d+)/", path)
    if part and int(part[2]) < len(DVT_EXITS):
        inner = rules if part[1] == "exit" else DVT_REUSE
        return f"{DVT_EXITS[int(part[2])]}.{reference_key(path[part.end() :], inner)}"
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, path.removeprefix("batch_stats/"))
        if count:
            *parents, leaf = name.split("/")
            return ".".join([*parents, LEAVES.get(leaf, leaf)])
    if added(path):  # by a method that no reference has
        return path
    raise ValueError(
        f"no key rule for parameter {path}: this model has no counterpart in the reference's format"
    )


def axis_order(path: str, shape: tuple[int, ...], pointwise: str) -> str:
    """Layout of a leaf: kernels are transposed, everything else is the same."""
    if path.rsplit("/", 1)[-1] != "kernel":
        return "same"
    if re.search(pointwise, path):
        return "pointwise"
    return {2: "linear", 4: "conv"}.get(len(shape), "same")


def is_buffer(key: str) -> bool:
    """Whether a state-dict entry is a counter or index buffer, not a parameter."""
    return BUFFERS.search(key) is not None
