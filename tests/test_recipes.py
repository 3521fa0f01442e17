"""The tables in the recipes' headers: every row parses, builds, and costs what it says."""

import re

import pytest

import dyntoken
from dyntoken import config as recipes
from dyntoken import train
from dyntoken.analysis import macs
from dyntoken.train import settings as train_settings

TABLES = {  # recipe -> rows its header must have at least
    "deit": 6,
    "dynamicvit_deit": 19,
    "evit_deit": 20,
    "tps_deit": 30,
    "dynamicvit_lvvit": 4,
    "tps_lvvit": 2,
    "dynamicvit_swin": 3,
    "dynamicvit_convnext": 6,
}
STAGED = {"dynamicvit_swin": "2-4-6", "dynamicvit_convnext": "3-6-9"}  # with stages: sites of sizes s and b
ROW = re.compile(r"^ {4}(\S+=\S+) +(\d+\.\d+) +(no number found|\d+\.\d+)", re.MULTILINE)


def rows(recipe):
    """(argument, GMACs, top-1 or None) of each line of a header's table."""
    header = recipes.locate(f"configs/{recipe}.py").read_text().split('"""')[1]
    return [
        (a, float(cost), None if top.startswith("no") else float(top)) for a, cost, top in ROW.findall(header)
    ]


ROWS = [pytest.param(recipe, *row, id=f"{recipe}:{row[0]}") for recipe in TABLES for row in rows(recipe)]


def model_of(c):
    """The model of a config at full size, without its data."""
    options = c.model.to_dict()
    classes = 1010 if c.data.name == "i_naturalist2019" else 1000
    return dyntoken.create_model(options.pop("name"), num_classes=classes, img_size=c.data.size, **options)


@pytest.mark.parametrize("recipe", TABLES)
def test_a_header_has_every_published_row_once(recipe):
    arguments = [argument for argument, _, _ in rows(recipe)]
    assert len(arguments) == len(set(arguments)) >= TABLES[recipe]


@pytest.mark.parametrize("recipe, argument, gmacs, top1", ROWS)
def test_a_row_is_the_model_it_names(recipe, argument, gmacs, top1):
    c = recipes.load(f"configs/{recipe}.py:{argument}")
    train_settings.read(c)
    model = model_of(c)
    given = dict(part.split("=") for part in argument.split(","))
    size = given.get("size", "s")
    width = {"t": 192, "s": 384, "m": 512, "b": 768}[size]
    if recipe in STAGED:
        assert model.plain().widths[0] == (128 if size == "b" else 96)
        assert model.plain().depths[2] == {"dynamicvit_swin": 6, "dynamicvit_convnext": 9}[recipe] * (
            1 if size == "t" else 3
        )
    else:
        assert model.backbone["width"] == width
    assert model.input_shape[0] == int(given.get("pixels", 224))
    if model.method:
        assert model.keep == float(given["keep"]) and len(model.sites()) == len(model.at)
        usual = "3-6-9" if recipe.endswith("_deit") else "4-8-12" if width == 384 else "5-10-15"
        if recipe in STAGED:
            usual = "1-2-3" if size == "t" else STAGED[recipe]
        assert model.at == tuple(int(i) for i in given.get("at", usual).split("-"))
    assert bool(c.teacher.name) == any(
        loss in c.losses for loss in ("logit_kl", "token_distill", "dense_distill")
    )
    assert given.get("distill") != "false" or not c.teacher.name
    assert 0.4 < gmacs < 56 and (top1 is None or 60 < top1 < 90)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, argument, gmacs, top1", ROWS)
def test_a_row_costs_what_it_says(recipe, argument, gmacs, top1):
    model = model_of(recipes.load(f"configs/{recipe}.py:{argument}"))
    assert macs.count(model).total / 1e9 == pytest.approx(gmacs, abs=0.0051)


def kinds():
    """The first row of each kind: rows that differ in size, keep rate and sites alone are one kind."""
    first = {}
    for recipe in TABLES:
        for argument, _, _ in rows(recipe):
            parts = [part for part in argument.split(",") if part.split("=")[0] not in ("size", "keep", "at")]
            first.setdefault((recipe, *parts), (recipe, argument))
    return list(first.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe, argument", kinds())
def test_a_kind_of_row_trains_at_tiny_size(recipe, argument, tmp_path):
    result = train.run(recipes.load(f"configs/{recipe}.py:{argument},tiny"), tmp_path / "run")
    assert result.finished and int(result.state.step) == 2 and result.metrics["count"] == 24


def test_inaturalist_starts_from_its_own_dense_model():
    c = recipes.load("configs/dynamicvit_deit.py:inat,keep=0.7")
    assert c.data.name == "i_naturalist2019" and c.init.path.endswith(
        "deit_small_patch16_224_inat2019.safetensors"
    )
    dense = recipes.load("configs/deit.py:inat,size=b")
    assert dense.init.path == "weights/deit_base_patch16_224.safetensors" and dense.init.head == "reset"
    assert (dense.batch, dense.epochs, dense.mix.erase) == (768, 360.0, 0.1)
    assert dense.optim.lr == pytest.approx(7.5e-5)
    dense.batch = 1536
    assert dense.optim.lr == pytest.approx(1.5e-4)


def test_more_pixels_start_from_224():
    c = recipes.load("configs/deit.py:size=b,pixels=384")
    assert (
        c.model.name == "deit_base_patch16_384" and c.init.path == "weights/deit_base_patch16_224.safetensors"
    )
    assert c.optim.lr == c.optim.min_lr == pytest.approx(5e-6) and c.optim.weight_decay == 1e-8
    c = recipes.load("configs/tps_deit.py:pixels=384")
    assert c.init.path == c.teacher.weights == "weights/deit_small_patch16_384.safetensors"


def test_what_distill_takes():
    assert recipes.load("configs/tps_deit.py:size=t,distill=true").teacher.name == "deit_tiny_patch16_224"
    with pytest.raises(ValueError, match="distill=yes is not one of auto, true, false"):
        recipes.load("configs/tps_deit.py:distill=yes")


def test_gather_form_leaves_out_what_holds_the_keep_rate():
    c = recipes.load("configs/tps_deit.py:form=gather")
    assert c.model.form == "gather" and "keep_ratio" not in c.losses and "logit_kl" in c.losses
    assert "form" not in c.teacher and "form" not in recipes.load("configs/tps_deit.py").model
    with pytest.raises(ValueError, match="form=gathr is not one of auto, mask, gather"):
        recipes.load("configs/tps_deit.py:form=gathr")
