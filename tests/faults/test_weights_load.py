"""Public weights into a model: prefixes, arrays without a place, other channels, timm's resizing, flax layouts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.weights import WeightsError, files

DEIT = "deit_tiny_patch16_224"
SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "num_classes": 5, "img_size": 16}


def make(name=DEIT, **more):
    return dyntoken.create_model(name, **{**SMALL, **more})


def random_of(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = weights.shapes_of(model)
    return {"params": files.nest({p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()})}


def exported(model, seed=0):
    return weights.export_reference(model, random_of(model, seed))


def same(found, tree):
    """Whether loaded variables are those of an exported tree."""
    return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(tree)))


def refusal(model, source, **options):
    with pytest.raises(WeightsError) as error:
        weights.load_weights(model, source, **options)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.",
        "backbone.",
        "net.",
        "module.backbone.",
        "a.b.c.",
    ],
)
def test_a_prefix_of_all_keys_is_taken_off_and_said(prefix):
    model = make()
    source = {prefix + key: value for key, value in exported(model).items()}
    found, report = weights.load_weights(model, source, strict=True, return_report=True)
    assert same(found, random_of(model))
    assert prefix.split(".")[-2] in " ".join(report.notes)


@pytest.mark.parametrize("name", ["dtps_" + DEIT, "swin_tiny_patch4_window7_224", "dvt_deit_tiny"])
def test_a_prefix_before_other_families_keys(name):
    sizes = {
        "dtps_" + DEIT: {**SMALL, "at": (1,)},
        "swin_tiny_patch4_window7_224": {
            **{"img_size": 32, "window": 4, "width": 8, "depths": (1, 2), "heads": (1, 2), "num_classes": 5}
        },
        "dvt_deit_tiny": {
            "img_size": 16,
            "width": 8,
            "depth": 1,
            "heads": 2,
            "exits": (1, 2),
            "num_classes": 5,
        },
    }
    model = dyntoken.create_model(name, **sizes[name])
    source = {"model._orig_mod." + key: value for key, value in exported(model).items()}
    assert same(weights.load_weights(model, source, strict=True), random_of(model))


def test_a_dense_source_with_a_prefix_starts_a_cascade():
    dense = make(patch_size=8)
    cascade = dyntoken.create_model(
        "dvt_deit_tiny", img_size=16, width=16, depth=2, heads=2, exits=(1, 2), num_classes=5
    )
    source = {"model." + key: value for key, value in exported(dense).items()}
    found = weights.load_weights(cascade, source, return_report=True)[0]["params"]
    wanted = random_of(dense)["params"]["backbone"]["norm"]["scale"]
    np.testing.assert_array_equal(found["exit_1"]["backbone"]["norm"]["scale"], wanted)


def test_lightning_leaves_other_things_beside_the_model():
    model = make()
    source = {
        "state_dict": {
            **{"model." + key: value for key, value in exported(model).items()},
            "criterion.weight": np.ones(5, np.float32),
        }
    }
    found, report = weights.load_weights(model, source, return_report=True)
    assert same(found, random_of(model))
    assert "criterion.weight" in " ".join(report.notes)


@pytest.mark.parametrize(("prefer", "seed"), [("ema", 1), ("params", 2)])
def test_dino_holds_a_teacher_and_a_student(prefer, seed):
    """The teacher is the average; each has its backbone beside a projection head."""
    model = make()
    head = {f"head.{part}": np.ones((3, 3), np.float32) for part in ("mlp.0.weight", "last_layer.weight_v")}

    def network(seed):
        body = {f"backbone.{k}": v for k, v in exported(model, seed).items() if not k.startswith("head.")}
        return {f"module.{key}": value for key, value in {**body, **head}.items()}

    source = {"student": network(2), "teacher": network(1), "epoch": 3}
    found = weights.load_weights(model, source, prefer=prefer, head="reset")
    assert same(found["params"]["backbone"], random_of(model, seed)["params"]["backbone"])


@pytest.mark.parametrize(("prefer", "seed"), [("ema", 1), ("params", 2)])
def test_two_models_in_one_flat_dict(prefer, seed):
    model = make()
    source = {"ema_model." + key: value for key, value in exported(model, 1).items()}
    source |= {"model." + key: value for key, value in exported(model, 2).items()}
    assert same(weights.load_weights(model, source, prefer=prefer), random_of(model, seed))
    source = {f"{name}.{key}": value for name in "ab" for key, value in exported(model).items()}
    assert "a., b." in refusal(model, source)


def test_a_state_dict_under_any_name():
    model = make()
    assert same(weights.load_weights(model, {"my_weights": exported(model), "epoch": 1}), random_of(model))
    text = refusal(model, {"first": exported(model), "second": exported(model)})
    assert "first" in text and "second" in text


WIDE = np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        (["blocks.0.ls1.gamma", "blocks.1.ls2.gamma"], "layer_scale="),
        (["blocks.0.gamma_1"], "layer_scale="),
        (["reg_token"], "registers="),
        (["fc_norm.weight"], "fc_norm=True"),
        (["blocks.0.attn.q_norm.weight"], "qk_norm=True"),
        (["pre_logits.fc.weight"], "representation_size=16"),
        (["blocks.2.norm1.weight", "blocks.6.norm1.weight"], "depth=7"),
        (["norm_pre.weight"], "pre_norm=True"),
        (["something.new"], "unexpected='ignore'"),
    ],
)
def test_arrays_that_change_the_function_need_a_place(keys, remedy):
    model = make()
    source = {**exported(model), **dict.fromkeys(keys, WIDE)}
    text = refusal(model, source)
    assert keys[0] in text and remedy in text
    found, report = weights.load_weights(model, source, unexpected="ignore", return_report=True)
    assert set(report.unexpected) == set(keys) and same(found, random_of(model))


def test_the_remedies_work():
    scaled = make(layer_scale=0.1, representation_size=8)
    source = exported(scaled)
    assert "layer_scale=" in refusal(make(), source) and "representation_size=8" in refusal(make(), source)
    other = make(layer_scale=1e-5, representation_size=8)
    assert same(weights.load_weights(other, source), random_of(scaled))
    assert "depth=3" in refusal(make(), exported(make(depth=3)))
    assert "qkv_bias=True" in refusal(make(qkv_bias=False), exported(make()))
    more = make(registers=3, qk_norm=True, pre_norm=True)
    text = refusal(make(), exported(more))
    assert all(remedy in text for remedy in ("registers=3", "qk_norm=True", "pre_norm=True"))
    assert same(weights.load_weights(more, exported(more)), random_of(more))
    own = random_of(make(layer_scale=0.1))
    assert "layer_scale=" in refusal(make(), own)


@pytest.mark.parametrize(
    "key",
    [
        "mask_token",
        "decoder_blocks.0.norm1.weight",
        "decoder_pos_embed",
        "head_dist.weight",
        "score_predictor.0.in_conv.0.weight",
        "layers.0.attn_mask",
        "bn.num_batches_tracked",
        "blocks.0.attn.relative_position_index",
        "fc.weight",
        "dino_head.mlp.0.weight",
    ],
)
def test_what_changes_nothing_is_left_out(key):
    model = make()
    assert same(weights.load_weights(model, {**exported(model), key: WIDE}), random_of(model))


def test_old_heads_do_not_matter_to_a_new_one():
    model = make()
    source = {**exported(model), "pre_logits.fc.weight": WIDE, "aux_head.weight": WIDE}
    weights.load_weights(model, source, head="reset")


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("vit.encoder.layer.0.attention.attention.query.weight", "Hugging Face"),
        ("encoder.layer.0.norm1.weight", "DINOv2"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("blocks.0.attn.qkv.weight", "timm"),
    ],
)
def test_the_layout_of_another_model_is_named(key, layout):
    text = refusal(make(depth=4), {key: WIDE})
    assert layout in text and "convert" not in text


def test_quantised_arrays_are_no_weights():
    model = make()
    source = {**exported(model), "norm.weight": np.ones(16, np.int8)}
    assert "int8" in refusal(model, source)


def kernel_of(variables):
    return np.asarray(variables["params"]["backbone"]["patch_embed"]["proj"]["kernel"])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("old", [1, 3])
def test_the_stem_is_adapted_to_other_channels(old, channels):
    """timm's rule: the sum for one channel, else repeated in turn and scaled by old / new."""
    source, model = exported(make(in_chans=old)), make(in_chans=channels)
    if old != channels:
        text = refusal(model, source)
        assert "in_chans='adapt'" in text and f"in_chans={old}" in text
    found = kernel_of(weights.load_weights(model, source, in_chans="adapt"))
    kernel = kernel_of(random_of(make(in_chans=old)))
    if channels == 1:
        wanted = kernel.sum(2, keepdims=True)
    else:
        wanted = np.concatenate([kernel] * 6, axis=2)[:, :, :channels] * (old / channels)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_grey_image_gives_what_its_three_copies_gave():
    colour, grey = make(), make(in_chans=1)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    wanted = colour.apply(random_of(colour), np.repeat(images, 3, axis=-1)).logits
    found = grey.apply(weights.load_weights(grey, exported(colour), in_chans="adapt"), images).logits
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_channels_and_classes_at_once():
    model = make(in_chans=4, num_classes=3)
    text = refusal(model, exported(make()))
    assert "in_chans='adapt'" in text and "head='reset'" in text
    weights.load_weights(model, exported(make()), in_chans="adapt", head="reset")
    assert "'adapt'" in refusal(model, exported(make()), in_chans="sum")
    assert "1 or 3" in refusal(model, exported(make(in_chans=7)), in_chans="adapt")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (6, 9)), ((14, 14), (24, 24)), ((8, 8), (5, 3)), ((3, 3), (2, 4))]
)
def test_timm_resizes_with_antialias(old, new):
    torch = pytest.importorskip("torch")
    model = make(img_size=(4 * new[0], 4 * new[1]))
    source = exported(make(img_size=(4 * old[0], 4 * old[1])))
    grid = torch.tensor(source["pos_embed"][:, 1:]).reshape(1, *old, -1).permute(0, 3, 1, 2)
    rows = {}
    for antialias in (True, False):
        resized = torch.nn.functional.interpolate(
            grid, size=new, mode="bicubic", antialias=antialias, align_corners=False
        )
        rows[antialias] = resized.flatten(2).permute(0, 2, 1).numpy()
    for method, antialias in (("timm", True), ("bicubic", False)):
        found = weights.load_weights(model, source, resize=method, return_report=True)[0]
        found = np.asarray(found["params"]["backbone"]["pos_embed"])
        np.testing.assert_allclose(found[:, 1:], rows[antialias], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[:, 0], source["pos_embed"][:, 0])
    assert np.abs(rows[True] - rows[False]).max() > 0.1
    assert "timm" in refusal(model, source, resize="antialias")


class FlaxBlock(nn.Module):
    """A block as AugReg or big_vision spell it."""

    big: bool

    @nn.compact
    def __call__(self, x, _=None):
        first, second, attention, mlp = (0, 1, 0, 0) if self.big else (0, 2, 1, 3)
        y = nn.LayerNorm(name=f"LayerNorm_{first}", epsilon=1e-6)(x)
        x = x + nn.MultiHeadDotProductAttention(2, name=f"MultiHeadDotProductAttention_{attention}")(y)
        y = nn.LayerNorm(name=f"LayerNorm_{second}", epsilon=1e-6)(x)
        return x + FlaxMlp(name=f"MlpBlock_{mlp}")(y), None


class FlaxMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(4 * 16, name="Dense_0")(x), approximate=False)
        return nn.Dense(16, name="Dense_1")(x)


class FlaxEncoder(nn.Module):
    big: bool
    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.big:
            x = x + FlaxPositions(name="posembed_input")(x)
        if self.scan:
            scanned = nn.scan(FlaxBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = scanned(self.big, name="encoderblock")(x, None)
        else:
            for index in range(2):
                x, _ = FlaxBlock(self.big, name=f"encoderblock_{index}")(x)
        return nn.LayerNorm(name="encoder_norm", epsilon=1e-6)(x)


class FlaxPositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.param("pos_embedding", nn.initializers.normal(1.0), (1, *x.shape[1:]))


class FlaxViT(nn.Module):
    big: bool
    scan: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), (4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, 16)
        if self.big:  # before the class token
            x = x + self.param("pos_embedding", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = FlaxEncoder(self.big, self.scan, name="Transformer")(x)[:, 0]
        if not self.big:
            x = jnp.tanh(nn.Dense(8, name="pre_logits")(x))
        return nn.Dense(5, name="head", kernel_init=nn.initializers.normal(1.0))(x)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("big", "scan", "root"), [(False, False, ""), (True, False, "params/"), (True, True, "params/")]
)
def test_googles_flax_layouts(tmp_path, big, scan, root):
    """AugReg's and big_vision's `.npz`: the same logits as the flax model that wrote them."""
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    theirs = FlaxViT(big, scan)
    variables = jax.jit(theirs.init)(jax.random.key(0), images)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), variables)
    flat = {root + key: value for key, value in files.flatten(variables["params"]).items()}
    more = {"opt/0/count": np.zeros((), np.int32), "opt/0/mu/cls": WIDE} if root else {}
    files.write_npz(tmp_path / "w.npz", {**flat, **more})
    model = make(representation_size=None if big else 8)
    found, report = weights.load_weights(model, tmp_path / "w.npz", strict=True, return_report=True)
    np.testing.assert_allclose(
        jax.jit(model.apply)(found, images).logits,
        jax.jit(theirs.apply)(variables, images),
        rtol=1e-4,
        atol=1e-4,
    )
    assert "0.5" in " ".join(report.notes)  # its normalisation is not ImageNet's


def test_bfloat16_in_an_npz_is_two_bytes_without_a_name(tmp_path):
    values = jnp.array([1.5, -2.0], jnp.bfloat16)
    np.savez(tmp_path / "w.npz", x=values)
    with np.load(tmp_path / "w.npz") as archive:
        assert archive["x"].dtype == "V2"
    assert files.read(tmp_path / "w.npz").tensors["x"].tolist() == [1.5, -2.0]


def test_only_what_is_missing_is_initialised():
    """A new head on a deep model costs no forward pass of it; the values are those of a whole init."""
    model = make(num_classes=7)
    found = weights.load_weights(model, exported(make()), head="reset", seed=3)
    wanted = jax.jit(model.init)(jax.random.key(3), np.zeros((1, 16, 16, 3), np.float32))
    np.testing.assert_array_equal(
        found["params"]["head"]["cls"]["kernel"], wanted["params"]["head"]["cls"]["kernel"]
    )
    compiled = []
    real = jax.jit

    def spy(function, **options):
        return lambda *arguments: (
            compiled.append(real(function, **options).lower(*arguments))
            or real(function, **options)(*arguments)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", spy)
        weights.load_weights(model, exported(make()), head="reset")
    whole = jax.jit(model.init).lower(jax.random.key(3), np.zeros((1, 16, 16, 3), np.float32)).compile()
    assert len(compiled) == 1 and len(jax.tree.leaves(compiled[0].out_info)) == 2
    assert len(compiled[0].compile().as_text()) < len(whole.as_text()) / 4
