"""A module outside the package (`mine`) whose names work in training and in every tool."""

import functools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dyntoken
from dyntoken import losses, main, optim, train, weights
from dyntoken.analysis import macs
from dyntoken.backbones import BACKBONES
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.nn.reduction_sites import added
from dyntoken.ops import fuse
from dyntoken.reducers import METHODS, SCORERS
from dyntoken.registry import UnknownNameError, load_plugins
from dyntoken.tools import bench, flops, show
from dyntoken.train import settings
from dyntoken.weights import runs
from scripts import pairings
from tests.plugins.conftest import PLUGIN
from tests.train.tiny import tiny_config

DEIT = "deit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
TINY = {"width": 8, "depth": 2, "heads": 2, "patch_size": 8}
SITES = {"at": (0, 1, 2), "keep": 0.7}
OPTIONS = [f"--set={key}={value}" for key, value in SMALL.items() if key != "img_size"]
COMMAND = [*OPTIONS, "--img_size=16", "--at=0,1,2", "--keep=0.7", f"--plugins={PLUGIN}"]
NEW = ("learnt_linear", "attended", "keynorm", "longrows")
SLOW_LR = 0.01  # of the backbone


@pytest.fixture(autouse=True)
def mine():
    load_plugins(PLUGIN)


@functools.cache
def _model(method, **more):
    return dyntoken.create_model(f"{method}_{DEIT}", **SMALL, **SITES, **more)


@functools.cache
def _images():
    return np.random.default_rng(7).normal(size=(4, 16, 16, 3)).astype(np.float32)


def _variables(model):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), _images()))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)


def _config(name, **more):
    """A run of mine on my data; a keyword `a__b=x` sets `config.a.b = x`."""
    config = tiny_config(steps=2, plugins=(PLUGIN,), optim__backbone_lr_scale=SLOW_LR, **more)
    config.model = {"name": name, **TINY, "at": (1,), "keep": 0.6}
    config.data.name, config.data.options = "stripes", {"train": 32, "test": 16}
    return config


def _moved(result, config):
    """path -> largest change of a parameter in a run."""
    start = train.build(config).new_state().params
    pairs = zip(optim.leaves(start), jax.tree.leaves(result.state.params), strict=True)
    return {path: float(np.abs(np.asarray(a) - np.asarray(b)).max()) for (path, a), b in pairs}


@pytest.mark.thorough
def test_a_learnt_scorer_trains_at_the_rate_of_new_parameters(tmp_path):
    losses = {"ce": {}, "keep_ratio": {"weight": 2.0}, "sharpness": {"weight": 0.1, "power": 2.0}}
    config = _config(f"learnt_linear_{DEIT}", losses=losses)
    result = train.run(config, str(tmp_path))
    moved = _moved(result, config)
    mine = {path: change for path, change in moved.items() if "scorer_" in path}
    assert len(mine) == 4  # scale and bias of the norm, kernel and bias of the layer
    lr = config.optim.lr
    assert min(mine.values()) > 0.5 * lr  # Adam's first steps are as long as the rate
    backbone = [change for path, change in moved.items() if not added(path)]
    assert 0 < max(backbone) < 3 * SLOW_LR * lr
    groups = optim.groups(result.state.params, backbone_lr_scale=SLOW_LR)
    assert all((groups[path].lr_scale == 1.0) == added(path) for path in groups)


def test_a_scorer_draws_in_evaluation_too():
    model = _model("dtps", score="dice")
    variables = _variables(model)
    run = jax.jit(lambda rngs: model.apply(variables, _images(), rngs=rngs).reductions[0].scores)
    twice, other = [run({}) for _ in range(2)], run({"policy": jax.random.key(1)})
    np.testing.assert_array_equal(*twice)
    assert not np.allclose(twice[0], other)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (f"attended_{DEIT}", {}),
        ("keynorm_tiled_tiny", {"pool": "mean"}),
        (f"longrows_{DEIT}", {"power": 1.0}),
        pytest.param(f"etps_{DEIT}", {"score": "received", "fuse": "pooled"}, marks=pytest.mark.slow),
    ],
)
def test_the_others_train_too(name, options, tmp_path):
    config = _config(name, losses={"ce": {}, "sharpness": {"weight": 0.1}})
    config.model.update(options)
    result = train.run(config, str(tmp_path))
    assert result.finished and min(_moved(result, config).values()) > 0
    found = dyntoken.load_run(tmp_path).model
    assert name.startswith(found.method) and found.sites()[0].reducer.make is METHODS[found.method].make


@pytest.mark.thorough
def test_the_gradient_of_a_learnt_scorer_is_not_zero():
    model = _model("learnt_linear")
    rngs = {"policy": jax.random.key(1)}
    loss = lambda v: (model.apply(v, _images(), train=True, rngs=rngs).logits ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(_variables(model))["params"]
    for path, leaf in optim.leaves(grads):
        assert float(jnp.abs(leaf).max()) > 0, path


@pytest.mark.thorough
def test_evits_arithmetic_under_other_names_is_evit():
    own, evit = _model("attended"), _model("evit")
    variables = _variables(evit)
    run = jax.jit(lambda model: model.apply(variables, _images()), static_argnums=0)
    a, b = run(own), run(evit)
    assert [r.count for r in a.reductions] == [r.count for r in b.reductions] == [13, 11, 9]
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-6)
    assert macs.count(own).total == macs.count(evit).total
    assert macs.count(own).tokens == macs.count(evit).tokens


@pytest.mark.thorough
@pytest.mark.parametrize("case", [*NEW, "etps+received"])
def test_both_forms_are_equal(case):
    method, _, score = case.partition("+")
    more = {"score": score} if score else {}
    variables = _variables(_model(method, **more))
    run = jax.jit(lambda model: model.apply(variables, _images()), static_argnums=0)
    gathered, masked = (run(_model(method, form=form, **more)) for form in ("gather", "mask"))
    np.testing.assert_allclose(masked.logits, gathered.logits, atol=2e-5)
    for g, m in zip(gathered.reductions, masked.reductions, strict=True):
        assert (g.count, g.ratio, g.grid) == (m.count, m.ratio, m.grid)
        assert g.place.shape[1] == g.count


@pytest.mark.parametrize(
    ("name", "options", "why", "works"),
    [
        ("keynorm_swin_tiny_patch4_window7_224", {}, "keys", "dynamicvit, static, longrows"),
        ("keynorm_cvt_13", {}, "keys", "learnt_linear"),
        ("keynorm_pvt_tiny", {"at": (0,)}, "only at stage 3", "longrows"),
        ("attended_tiled_tiny", {}, "class token", "keynorm"),
        ("attended_pvt_tiny", {"at": (1,)}, "class token", "dtps"),
        ("dtps_pvt_tiny", {"fuse": "pooled"}, "no cell on a map", "dtps"),
        ("dynamicvit_swin_tiny_patch4_window7_224", {"fuse": "pooled"}, "nothing to fuse", "longrows"),
        ("dynamicvit_convnext_tiny", {"score": "received"}, "attention between", "dynamicvit"),
        ("dynamicvit_convnext_tiny", {"score": "late"}, "inside a block", "dynamicvit"),
        ("learnt_linear_convnext_tiny", {}, "nothing to fuse", "dynamicvit, static, longrows"),
    ],
)
def test_pairings_that_cannot_work_are_refused_by_name(name, options, why, works):
    with pytest.raises(ValueError, match=f"makes no sense in .*{why}.*; .*{works}.* there"):
        dyntoken.create_model(name, **options)


def test_a_rule_moves_the_sites_of_a_method_and_exits_take_it():
    for name, inside in (("dtps", False), ("learnt_linear", False), ("keynorm", True)):
        model = dyntoken.create_model(f"dvt_{name}_deit_tiny", keep=0.7)
        assert [site.inside for site in model.sites()] == [inside] * 9
    moved = _model("dtps", score="received")  # counted as dTPS still: r, r^2, r^3 of the first patches
    assert [site.inside for site in moved.sites()] == [True] * 3
    assert [site.reducer["keep"] for site in moved.sites()] == [11, 7, 5]


def test_what_is_refused_is_not_listed():
    assert set(dyntoken.list_models("attended_*_tiny*")) > {
        f"attended_{DEIT}",
        "attended_pvt_tiny",
        "attended_tall_tiny",
    }
    assert not dyntoken.list_models("attended_tiled_tiny") and not dyntoken.list_models("keynorm_cvt*")


def test_dense_weights_load_and_what_the_method_adds_starts_fresh():
    """A backbone that extends ViT has timm's keys; a scorer's own parameters have none."""
    dense = dyntoken.create_model("tall_tiny", num_classes=5)
    timm = weights.export_reference(dense, _variables(dense))
    assert {"blocks.0.attn.qkv.weight", "pos_embed"} < set(timm)
    model = dyntoken.create_model("learnt_linear_tall_tiny", num_classes=5, at=(1,))
    _, report = dyntoken.load_weights(model, timm, return_report=True)
    assert len(report.loaded) == len(timm) and not report.unexpected
    assert {path.split("/")[3] for path in report.missing} == {"scorer_norm", "scorer_keep"}


@pytest.mark.parametrize("method", NEW)
def test_flops_knows_the_names(method, capsys):
    assert flops.main([f"{method}_{DEIT}", *COMMAND, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"][-1] < found["tokens"][0]


def test_bench_and_pairings_know_the_names(capsys):
    assert (
        bench.main([f"longrows_{DEIT}", *COMMAND, "--set=power=1.0", "--batch=2", "--pairs=1", "--json"]) == 0
    )
    assert f"longrows_{DEIT}" in capsys.readouterr().out
    assert "tall_tiny" in pairings.pairings() and "keynorm" in pairings.markdown({"x": {"dtps": "yes"}})


def test_show_draws_a_method_of_mine(tmp_path, capsys):
    model = _model("attended")
    dyntoken.save_weights(tmp_path / "w.safetensors", _variables(model), model=model)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    given = [f"attended_{DEIT}", *COMMAND, f"--weights={tmp_path}/w.safetensors", f"--out={tmp_path}/out"]
    assert show.main([*given, str(tmp_path / "a.png")]) == 0
    assert list((tmp_path / "out").glob("*.png"))


def test_a_plugin_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        flops.main([DEIT, "--plugins=no.such.module"])
    assert stop.value.code == 2 and "no.such.module" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"no\.such\.module"):
        train.build({**_config(DEIT).to_dict(), "plugins": "no.such.module"})


def _size(tokens, seen, draws, stage, **_):
    return dyntoken.Scores(rank=tokens.size)


def _layer(tokens, seen, draws, stage, **_):
    return dyntoken.Scores(rank=nn.Dense(1)(tokens.patches)[..., 0])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("register", "error"),
    [
        (lambda: dyntoken.register_scorer("predictor", _size), "registered already"),
        (lambda: dyntoken.register_scorer("shuffled", _size), "registered already"),
        (lambda: dyntoken.register_scorer("two words", _size), "one word"),
        (lambda: dyntoken.register_scorer("x", "attended"), "must be a function"),
        (lambda: dyntoken.register_scorer("x", lambda tokens: None), "does not take"),
        (lambda: dyntoken.register_scorer("x", _size, needs="key"), "unknown need 'key'.*keys"),
        (lambda: dyntoken.register_scorer("x", _size, needs="cls", where="before"), "must be 'inside'"),
        (lambda: dyntoken.register_scorer("x", _size, where="after"), "'before' or 'inside'"),
        (lambda: dyntoken.register_fuser("squeeze", lambda *a, **k: None), "registered already"),
        (lambda: dyntoken.register_fuser("x", lambda a, b: None), "does not take"),
        (lambda: dyntoken.register_method("dtps", score="random", fuse="drop"), "registered already"),
        (lambda: dyntoken.register_method("x", score="entropy"), "unknown score 'entropy'"),
        (lambda: dyntoken.register_method("x", fusee="drop"), "unknown option 'fusee'.*fuse"),
        (lambda: dyntoken.register_method("x", object), "subclass of dyntoken.Reducer"),
        (lambda: dyntoken.register_method("x", Greedy), "needs is a tuple"),
        (lambda: dyntoken.register_method("dvt_x", score="random"), "another name"),
        (lambda: dyntoken.register_backbone("x", dict, {}), "must subclass"),
        (
            lambda: dyntoken.register_backbone("x", Isotropic, {}),
            "does not define grid, setup_stem, stem_rows",
        ),
        (
            lambda: dyntoken.register_backbone("x", _vit(), {"xvit": {"widht": 8}}),
            "unknown option 'widht'.*width",
        ),
        (lambda: dyntoken.register_backbone("x", _vit(), {"pvt_tiny": {}}), "registered already"),
        (lambda: dyntoken.register_backbone("vit", _vit(), {"xvit": {}}), "registered already"),
        (lambda: dyntoken.register_loss("ce", lambda output, batch: None), "registered already"),
        (lambda: dyntoken.register_loss("x", lambda output: None), "does not take"),
        (lambda: dyntoken.register_loss("x", lambda o, b: None, needs=("taecher",)), "unknown need.*teacher"),
        (lambda: dyntoken.register_loss("x", lambda o, b: None, exits="all"), "exits must be"),
        (lambda: dyntoken.register_data("fake", lambda name, data_dir: None), "registered already"),
        (lambda: dyntoken.register_data("x", lambda name: None), "does not take"),
    ],
)
def test_a_wrong_registration_says_what_is_wrong_and_adds_nothing(register, error):
    before = dyntoken.list_models()
    with pytest.raises(ValueError, match=error):
        register()
    assert dyntoken.list_models() == before and "x" not in METHODS


class Greedy(dyntoken.Reducer):
    """Declares a word where a tuple belongs."""

    needs = "keys"
    where = "inside"


def _vit():
    return BACKBONES["vit"]


class Undeclared(dyntoken.Reducer):
    """Adds a row and does not say so."""

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision):
        row = dyntoken.make_reducer("evit", keep=self.keep, score="random", name="inner")
        return row(tokens, seen, train, draws=draws)


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ({"score": "fixed_layer"}, "learns=True"),
        ({"score": "silent"}, "no log_probs"),
        ({"score": "sly_reader"}, "does not declare: needs='keys'"),
        ({"fuse": "sly_row"}, "adds_row=False"),
        ({"fuse": "sly_host"}, "merges=False"),
        ({}, "Undeclared leaves 11 rows, not 10"),
    ],
)
def test_what_a_rule_does_must_be_what_it_declares(rules, error):
    if "silent" not in SCORERS:
        dyntoken.register_scorer("fixed_layer", _layer)
        dyntoken.register_scorer("silent", _size, learns=True)
        dyntoken.register_scorer("sly_reader", lambda t, seen, draws, stage, **_: seen.keys)
        dyntoken.register_fuser("sly_row", fuse.one_token)
        dyntoken.register_fuser("sly_host", fuse.mean)
        dyntoken.register_method("undeclared", Undeclared)
    method = "dynamicvit" if rules else "undeclared"
    model = dyntoken.create_model(f"{method}_{DEIT}", **SMALL, at=(1,), keep=(10,), **rules)
    with pytest.raises(ValueError, match=error):
        jax.eval_shape(lambda: model.init(jax.random.key(0), _images()))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--config.losses.sharpness.powr=2", "did you mean config.losses.sharpness.power?"),
        ("--config.model.powr=2", "did you mean config.model.power?"),
        ("--config.data.options.trian=2", "did you mean config.data.options.train?"),
        ("--config.plugins=no.such.module", "plugin 'no.such.module' does not import"),
    ],
)
def test_the_command_line_imports_plugins_before_it_reads_other_keys(word, says):
    words = [
        f"--config.plugins={PLUGIN}",
        "--config.model.name=longrows_tall_tiny",
        "--config.data.name=stripes",
    ]
    given = ["--config=configs/tps_deit.py:demo", *words, word]
    done = subprocess.run([sys.executable, "-m", "dyntoken.main", *given], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and says in done.stderr


def test_the_command_line_sets_options_of_mine():
    config = _config(f"longrows_{DEIT}", losses={"ce": {}, "sharpness": {}})
    words = ["--config.model.power=1", "--config.losses.sharpness.power=3", "--config.data.options.train=48"]
    settings.override(config, main.split_changes(["program", *words])[0])
    assert config.model.power == 1 and config.losses.sharpness.power == 3 and config.data.options.train == 48
    with pytest.raises(ValueError, match=r"config\.model\.power is 'fast'"):
        settings.override(config, [("model.power", "fast")])


class Curved:
    """A loss that is no plain function."""

    def __call__(self, output, batch, *, power: "NoSuchType" = 1, form: "3" = None):  # noqa: F821
        return output.logits.sum() * power, jnp.float32(1)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("curved", Curved()),
        ("curved_method", Curved().__call__),
        ("curved_part", functools.partial(Curved())),
    ],
)
def test_options_of_mine_need_no_annotation_that_can_be_read(name, loss):
    dyntoken.register_loss(name, loss)
    assert losses.Objective({name: {"power": (1, "a"), "form": {}}}).terms[0].options == {
        "power": (1, "a"),
        "form": {},
    }
    with pytest.raises(UnknownNameError, match="power"):
        losses.Objective({name: {"powr": 1}})


def test_a_run_of_a_plugin_that_is_not_imported_names_it():
    meta = {"config": {"plugins": ["my_methods"]}, "run": {"model": {"name": "gone_deit_tiny_patch16_224"}}}
    with pytest.raises(UnknownNameError, match="my_methods"):
        runs.model_of(meta)


def test_an_unknown_rule_lists_those_of_mine():
    with pytest.raises(UnknownNameError, match=r"recieved.*received"):
        _model("etps", score="recieved")


def _product(*arguments):
    """The product tests in a process of their own that loads the plugin."""
    files = ["tests/test_models.py", "tests/backbones/test_product.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, *arguments]
    environment = {**os.environ, "DYNTOKEN_PLUGINS": PLUGIN}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_product_tests_pick_up_methods_rules_and_backbones():
    cases = _product("--collect-only", "-m", "slow or not slow")
    for method in NEW:
        assert f"test_both_forms_have_one_tree[{method}]" in cases
        assert f"[{method}_tall_tiny]" in cases and f"[{method}_lvvit_t]" in cases
    assert "[longrows_tiled_tiny]" in cases and "[attended_tiled_tiny]" not in cases
    assert "test_both_forms_have_one_tree[dynamicvit+received]" in cases


@pytest.mark.slow
def test_product_tests_of_the_plugin_pass():
    mine = " or ".join((*NEW, "received", "tiled", "tall"))
    assert "passed" in _product("-m", "slow or not slow", "-k", mine)
