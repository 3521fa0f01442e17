import pytest

import dyntoken
from dyntoken.reducers import METHODS
from dyntoken.reducers.keep import keep_counts, keep_rate_schedule, quantize_keep_rates


@pytest.mark.parametrize(
    ("keep", "relative", "fused", "counts"),
    [
        (0.7, False, False, (137, 96, 67)),  # DynamicViT, DeiT
        (0.5, False, False, (98, 49, 24)),
        (0.7, True, True, (138, 98, 70)),  # EViT: the fused token of earlier sites counts
        (0.7, True, False, (138, 97, 68)),  # eTPS
        (0.5, True, True, (98, 50, 26)),
        ((150, 100, 50), False, False, (150, 100, 50)),
        ((1.0, 0.5, 0.25), False, False, (196, 98, 49)),
        ((0.9, 1.0, 0.5), True, True, (177, 178, 89)),
    ],
)
def test_keep_counts_of_196(keep, relative, fused, counts):
    got = keep_counts(keep, 3, 196, relative=relative, fused=fused)
    assert tuple(count for count, _ in got) == counts


def test_keep_counts_follow_the_python_float_product():
    # The official list is [r, r**2, r**3]; 100 * 0.7**2 is 48.99..., cut to 48.
    assert [c for c, _ in keep_counts(0.7, 3, 100, relative=False)] == [70, 48, 34]
    assert keep_counts(0.55, 1, 100, relative=True)[0][0] == 56  # ceil(55.00000000000001)


def test_target_ratios():
    assert [r for _, r in keep_counts(0.5, 3, 49, relative=False)] == [0.5, 0.25, 0.125]
    assert keep_counts(49, 1, 196, relative=False) == ((49, 0.25),)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.001, "leaves 0 of 16"),
        ((0.5, 0.5), "2 entries for 3 sites"),
        (1.5, "not in"),
        ((4, 9, 2), "leaves 9 of 4"),
        ("0.5", "must be a number"),
        (True, "must be a number"),
    ],
)
def test_bad_keep(keep, message):
    with pytest.raises(ValueError, match=message):
        keep_counts(keep, 3, 16, relative=False)


@pytest.mark.parametrize(
    ("relative", "fused", "multiple", "counts"),
    [
        (False, False, 8, (135, 95, 71)),  # with the class token 136, 96, and 72 of 64 and 72
        (True, True, 8, (142, 102, 70)),  # with class and fused token 144, 104, 72
    ],
)
def test_rounded_counts_of_196(relative, fused, multiple, counts):
    got = keep_counts(0.7, 3, 196, relative=relative, fused=fused, round_to=multiple, prefix=1)
    assert tuple(count for count, _ in got) == counts
    assert [ratio for _, ratio in got] == [count / 196 for count in counts]


def test_what_rounding_leaves_alone():
    assert keep_counts(1.0, 1, 196, relative=False, round_to=8) == ((196, 1.0),)  # nothing is dropped
    assert keep_counts(0.99, 1, 31, relative=False, round_to=32, prefix=1)[0][0] == 31  # all are a multiple
    assert (
        keep_counts((1, 1), 2, 15, relative=False, round_to=8, prefix=1)[0][0] == 7
    )  # not 0: none would stay
    with pytest.raises(ValueError, match="keep_round_to=32: no multiple of it keeps between 1 and 15"):
        keep_counts(0.5, 1, 15, relative=False, round_to=32, prefix=1)


@pytest.mark.parametrize("method", ["dtps", "evit", "spvit", "tome"])
def test_all_rows_behind_a_site_are_a_multiple(method):
    arch = f"{method}_deit_tiny_distilled_patch16_224"
    for site in dyntoken.create_model(arch, keep_round_to=8).sites():
        assert (2 + site.reducer["keep"] + METHODS[method].plain.adds_row) % 8 == 0
    model = dyntoken.create_model("dtps_pvt_tiny", keep_round_to=8)  # only its last stage has a class token
    assert [(site.at == 3) + site.reducer["keep"] for site in model.sites()] == [2192, 552, 136, 32]


EVIT = {"base": 0.7, "steps_per_epoch": 5, "warmup_epochs": 2, "total_epochs": 8}


def test_keep_rate_schedule():
    rates = [keep_rate_schedule(step, **EVIT) for step in range(45)]
    assert rates[:11] == [1.0] * 11
    assert rates[11] == pytest.approx(0.999178284305241, rel=1e-14)
    assert rates[25] == pytest.approx(0.85, rel=1e-14)
    assert rates[39] == pytest.approx(0.7008217156947589, rel=1e-14)
    assert rates[40:] == [0.7] * 5


@pytest.mark.parametrize("levels", [2, 4, 7])
def test_quantized_keep_rates_stay_near_the_schedule(levels):
    plan = quantize_keep_rates(**EVIT, levels=levels)
    steps, rates = zip(*plan, strict=True)
    assert len(plan) == levels and steps[0] == 0 and rates[0] == 1.0 and rates[-1] == 0.7
    assert list(steps) == sorted(set(steps)) and list(rates) == sorted(rates, reverse=True)
    for step in range(60):
        held = [rate for first, rate in plan if first <= step][-1]
        assert abs(held - keep_rate_schedule(step, **EVIT)) <= 0.3 / (levels - 1) / 2 + 1e-9


def test_quantized_keep_rates_at_the_limits():
    assert quantize_keep_rates(**{**EVIT, "base": 1.0}) == [(0, 1.0)]
    assert quantize_keep_rates(**{**EVIT, "warmup_epochs": 8}) == [(0, 1.0), (40, 0.7)]
    assert quantize_keep_rates(**{**EVIT, "warmup_epochs": 0, "total_epochs": 0}) == [(0, 0.7)]
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        keep_rate_schedule(0, **{**EVIT, "base": 1.1})
    with pytest.raises(ValueError, match="warmup_epochs=9"):
        keep_rate_schedule(0, **{**EVIT, "warmup_epochs": 9})
    with pytest.raises(ValueError, match="levels=1"):
        quantize_keep_rates(**EVIT, levels=1)
