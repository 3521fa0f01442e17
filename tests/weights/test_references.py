"""Constructor arguments of the official classes, and importing their state dicts."""

from __future__ import annotations

import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.weights import WeightsError, official, official_isotropic
from tests.golden.checkers.evit import call_sites

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
DYNAMICVIT = {**SMALL, "pruning_loc": [1, 2], "token_ratio": [0.7, 0.5]}


def build(repository, cls, **constructor):
    return official.build(repository, cls, {**SMALL, **constructor})


def backbone(reference):
    return dict(reference.model.backbone.options)


@pytest.mark.parametrize(
    ("repository", "cls", "row"),
    [
        ("huggingface/pytorch-image-models (timm 1.0.29)", "VisionTransformer", "timm/VisionTransformer"),
        ("timm", "VisionTransformerDistilled", "timm/VisionTransformerDistilled"),
        ("facebookresearch/deit", "VisionTransformer", "deit/VisionTransformer"),
        (
            "raoyongming/DynamicViT",
            "VisionTransformerTeacher (plain DeiT)",
            "dynamicvit/VisionTransformerTeacher",
        ),
        ("megvii-research/TPS-CVPR2023", "DynamicVit with TPSModule", "tps/DynamicVit"),
        ("youweiliang/evit", "EViT", "evit/EViT"),
        (
            "youweiliang/evit + megvii-research/TPS-CVPR2023",
            "EViT with Block.forward composed",
            "evit+tps/EViT",
        ),
    ],
)
def test_repositories_are_recognised(repository, cls, row):
    assert official.find_reference(repository, cls) == row


def test_unknown_repository_class_and_argument():
    with pytest.raises(WeightsError, match=r"repository 'someone/else' cannot be imported; known: .*evit"):
        build("someone/else", "EViT")
    with pytest.raises(WeightsError, match=r"class 'LVViT' .* known: timm/VisionTransformer"):
        build("timm", "LVViT")
    with pytest.raises(WeightsError, match="no constructor argument 'keeprate': did you mean keep_rate"):
        build("youweiliang/evit", "EViT", keeprate=[0.5])


@pytest.mark.parametrize(
    ("repository", "cls", "argument"),
    [
        ("timm", "VisionTransformer", {"attn_layer": "DiffAttention"}),
        ("timm", "VisionTransformer", {"global_pool": ""}),
        ("timm", "VisionTransformer", {"act_layer": "prelu"}),
        ("timm", "VisionTransformer", {"global_pool": "token", "class_token": False}),
        ("timm", "VisionTransformer", {"norm_layer": "RmsNorm"}),
        ("raoyongming/DynamicViT", "VisionTransformerTeacher", {"hybrid_backbone": "resnet"}),
        ("megvii-research/TPS-CVPR2023", "DynamicVit", {"block_layers": "Layer_scale_init_Block"}),
        ("megvii-research/TPS-CVPR2023", "DynamicVit", {"token_merge_module": "ToMe(r=3)"}),
        ("youweiliang/evit", "EViT", {"keep_rate": [0.5, 1]}),
        ("youweiliang/evit", "EViT", {"keep_rate": [0.5], "distilled": True}),
    ],
)
def test_what_is_not_implemented_is_refused(repository, cls, argument):
    with pytest.raises(WeightsError, match=next(iter(argument))):
        build(repository, cls, **argument)


def test_dynamicvit_arguments():
    reference = official.build("raoyongming/DynamicViT", "VisionTransformerDiffPruning", DYNAMICVIT)
    assert (reference.model.method, reference.model.at, reference.model.keep) == (
        "dynamicvit",
        (1, 2),
        (0.7, 0.5),
    )
    assert backbone(reference)["norm_eps"] == 1e-6
    assert backbone(reference)["qkv_bias"] is True


def test_tps_defaults_are_the_class_own():
    """A scalar ratio expands to powers; eps 1e-5, no qkv bias, no embedding for the class token."""
    reference = build("megvii-research/TPS-CVPR2023", "DynamicVit", prune_loc=[3, 1], keep_ratio=0.7)
    assert reference.model.at == (1, 3)
    assert reference.model.keep == (0.7, 0.7**2)
    assert reference.grid_only == 1
    assert backbone(reference)["norm_eps"] == 1e-5
    assert backbone(reference)["qkv_bias"] is False
    assert backbone(reference)["drop_path_rule"] == "constant"
    assert reference.model.method == "dynamicvit"


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (None, None),
        ("TPSModule", {"temperature": 1.0, "measure": "cosine"}),
        ("TPSModule(temperature=2)", {"temperature": 2.0, "measure": "cosine"}),
        ("TPSModule(l2_norm=False, temperature=4)", {"temperature": 4.0, "measure": "dot"}),
        ({"temperature": 0.5}, {"temperature": 0.5, "measure": "cosine"}),
    ],
)
def test_squeezing_module(module, options):
    assert official_isotropic.tps_options(module) == options
    reference = build("megvii-research/TPS-CVPR2023", "DynamicVit", prune_loc=[1], token_merge_module=module)
    assert reference.model.method == ("dynamicvit" if module is None else "dtps")
    assert dict(reference.model.method_options) == (options or {})


@pytest.mark.parametrize(("fuse", "method"), [(True, "evit"), (False, "topk")])
def test_evit_sites_are_the_blocks_below_one(fuse, method):
    reference = build("youweiliang/evit", "EViT", keep_rate=[1, 0.7, 1, 0.5], fuse_token=fuse)
    assert (reference.model.method, reference.model.at) == (method, (1, 3))
    assert [site.reducer(stage=0).keep for site in reference.model.sites()] == [12, 7 if fuse else 6]


def test_evit_call_time_overrides():
    """A call's rate counts only where the block's own is below 1; `tokens` prunes anywhere."""
    rates = (1, 0.7, 1, 0.7)
    assert call_sites(rates, call=0.4) == {"at": (1, 3), "keep": (0.4, 0.4)}
    assert call_sites(rates, call=1) == {"at": (), "keep": ()}
    assert call_sites(rates, tokens=[None, 9, 5, None]) == {
        "at": (1, 2, 3),
        "keep": (9, 5, 0.7),
    }
    with pytest.raises(ValueError):
        call_sites(rates, call=[0.4])


@pytest.mark.parametrize(
    ("text", "eps"),
    [
        (None, 1e-6),
        ("LayerNorm(eps=1e-6)", 1e-6),
        ("partial(nn.LayerNorm, eps=1e-12)", 1e-12),
        ("LayerNorm", 1e-5),
    ],
)
def test_layer_norm_epsilon(text, eps):
    assert backbone(build("timm", "VisionTransformer", norm_layer=text))["norm_eps"] == eps


def test_image_size_as_pair():
    assert build("timm", "VisionTransformer", img_size=[16, 32]).model.input_shape == (16, 32, 3)


def _state_dict(repository, cls, constructor):
    reference = official.build(repository, cls, constructor)
    key_map = weights.reference_keys(reference.model, no_embed_class=bool(reference.grid_only))
    rng = np.random.default_rng(0)
    shapes = weights.shapes_of(reference.model)
    return {
        entry.key: entry.to_reference(rng.normal(size=shapes[entry.path]).astype(np.float32))
        for entry in key_map.entries
    }


def test_import_uses_every_key():
    tensors = _state_dict("raoyongming/DynamicViT", "VisionTransformerDiffPruning", DYNAMICVIT)
    arguments = ("raoyongming/DynamicViT", "VisionTransformerDiffPruning", DYNAMICVIT)
    model, variables = dyntoken.import_reference(*arguments, tensors)
    back = weights.export_reference(model, variables)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)
    with pytest.raises(WeightsError, match=r"missing: norm.bias; left over: extra"):
        tensors["extra"] = tensors.pop("norm.bias")
        dyntoken.import_reference(*arguments, tensors)


def test_import_refuses_other_shapes():
    tensors = _state_dict("timm", "VisionTransformer", SMALL)
    with pytest.raises(WeightsError, match=r"weights of another shape: head/cls/bias \[5\] \(model: \[6\]\)"):
        dyntoken.import_reference("timm", "VisionTransformer", {**SMALL, "num_classes": 6}, tensors)


def test_import_without_class_row():
    """TPS's default adds the embedding before the class token; its gradient has no such row either."""
    arguments = ("megvii-research/TPS-CVPR2023", "DynamicVit", {**SMALL, "prune_loc": [1]})
    tensors = _state_dict(*arguments)
    assert tensors["pos_embed"].shape == (1, 16, 16)
    assert "blocks.0.attn.qkv.bias" not in tensors
    model, variables = dyntoken.import_reference(*arguments, tensors)
    assert variables["params"]["backbone"]["pos_embed"].shape == (1, 17, 16)
    back = weights.export_reference(model, variables, no_embed_class=True)
    np.testing.assert_array_equal(back["pos_embed"], tensors["pos_embed"])


def test_dvt_keys_and_layouts():
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    repository = "github.com/blackfeather-wang/Dynamic-Vision-Transformer"
    cls = "models_deit.DVT_Deit_small_model over timm.models.vision_transformer.VisionTransformer"
    found = weights.reference_keys(official.build(repository, cls, small).model).by_key
    assert (
        found["normal_token.blocks.1.feature_resuse_mlp.1.fc2.weight"].path == "reuse_2/context_1/fc2/kernel"
    )
    assert found["less_token.blocks.0.feature_resuse_mlp.0.bias"].path == "reuse_1/context_0/norm/bias"
    assert found["less_less_token.head.weight"].path == "exit_0/head/cls/kernel"
    assert not any("resuse" in key or "relation" in key for key in found if key.startswith("less_less"))
    mixing = found["less_token.relation_reuse_conv.0.weight"]
    kernel = np.arange(48.0).reshape(4, 12)
    exported = mixing.to_reference(kernel)
    assert exported.shape == (12, 4, 1, 1) and exported[5, 2, 0, 0] == kernel[2, 5]
    np.testing.assert_array_equal(mixing.from_reference(exported), kernel)
    with pytest.raises(WeightsError, match="img_size=384"):
        official.build(repository, cls, {**small, "img_size": 384})
