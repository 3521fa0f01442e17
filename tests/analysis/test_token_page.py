"""The page: what it holds, and its slider, pointer and keys in a real browser."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from dyntoken.analysis import token_page, token_strips
from tests import browser
from tests.analysis.test_token_strips import RGB, STAGES, reduction

pytest.importorskip("PIL.Image")

NEEDS_BROWSER = pytest.mark.skipif(browser.BINARY is None, reason="no chromium here (apt install chromium)")
KEEP = reduction(range(6), range(6), range(6))  # nothing is lost


def make(rates=(0.9, 0.5)):
    images = RGB, np.full((40, 60, 1), 90, np.uint8)
    few, many = (STAGES, ["block 1", "block 2"]), ([KEEP, STAGES[0]], ["block 1", "block 2"])
    views = []
    for number, image in enumerate(images):
        name = f"picture {number}"
        of_first = [token_strips.row(image, *of, label="a </script>", name=name) for of in (many, few)]
        of_second = [token_strips.row(image, *of, label="b", name=name, caption=name) for of in (many, many)]
        views.append([of_first, of_second])
    return token_page.page(views, rates, start=1, title="a <b> & {{data}}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(make())
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    tab = browser.Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield tab
    tab.close()


def test_what_the_page_holds():
    text = make()
    assert "<title>a &lt;b&gt; &amp; {{data}}</title>" in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text.partition('type="application/json">')[0])
    packed = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    data = json.loads(packed)
    assert data["models"] == ["a </script>", "b"] and data["rates"] == [0.9, 0.5]
    assert all(picture["src"].startswith("data:image/jpeg;base64,/9j/") for picture in data["pictures"])
    stage = data["views"][0][0][1]["stages"][0]
    assert stage == {"name": "block 1", "grid": [2, 3], "tokens": [0, 0, 0, 3, -4, -4], "scores": "z7es0l"}
    assert data["views"][0][0][1]["stages"][1]["tokens"] == [0, 0, 0, -1, -3, -3]
    assert data["views"][0][0][1]["stages"][1]["scores"] == "zzz0.."


def counts(tab):
    return tab.run("[...document.querySelectorAll('canvas')].map((c) => c.dataset.tokens)")


def lit(tab, number=0):
    return tab.run(f"document.querySelectorAll('canvas')[{number}].dataset.lit")


def middle(tab, selector):
    """Where an element is, from its left upper corner: a function of shares of width and height."""
    script = f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
    left, top, width, height = tab.run(f"{script} return [b.left, b.top, b.width, b.height]; }})()")
    return lambda x=0.5, y=0.5: (left + x * width, top + y * height)


@NEEDS_BROWSER
def test_slider_pointer_and_keys(tab, page, tmp_path):
    tab.open(page)
    assert counts(tab) == ["2", "3"]  # the last stage at the second rate
    on_slider = middle(tab, "#keep")
    tab.click(*on_slider(0.02))  # the slider's left end
    assert counts(tab) == ["3", "3"] and tab.run("document.getElementById('rate').textContent") == "0.9"
    tab.press("ArrowRight")
    assert counts(tab) == ["2", "3"] and tab.run("document.getElementById('rate').textContent") == "0.5"
    on_canvas = middle(tab, "canvas")
    tab.move(*on_canvas(0.5, 0.25))  # patch 1, which patch 0 absorbed
    assert lit(tab) == "0 1 2"
    said = "document.querySelector('.said').textContent"
    assert tab.run(said).startswith("Patch in row 1, column 2 is carried by the token in row 1, column 1")
    tab.screenshot(tmp_path / "hover.png")
    tab.move(*on_canvas(0.1, 0.75))
    assert lit(tab) == "" and "dropped" in tab.run(said) and lit(tab, 1) == "3"
    tab.move(*on_canvas(0.9, 0.75))
    assert lit(tab) == "4 5" and "2 that are fused" in tab.run(said)
    tab.move(*on_canvas(0.5, 1.3))
    assert lit(tab) == "" and tab.run(said) == ""
    # By keys alone: from the slider on to stages, modes and the picture.
    tab.run("document.getElementById('keep').focus()")
    tab.press("Tab", "ArrowLeft")
    assert counts(tab) == ["3", "6"]  # one stage earlier
    tab.press("Tab", "ArrowRight", "Tab", "ArrowDown")
    assert tab.run("document.activeElement.tagName") == "CANVAS" and lit(tab) == "4 5"
    tab.press("ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert lit(tab) == "0 1 2" and "stands for 2 other patches" in tab.run(said)
    tab.press("Escape")
    assert lit(tab) == ""


@NEEDS_BROWSER
def test_another_picture_the_input_and_no_network(tab, page):
    tab.events.clear()
    tab.open(page)
    before = tab.run("document.querySelector('canvas').toDataURL()")
    tab.click(*middle(tab, "#pictures label:nth-child(2)")())
    assert tab.run("document.querySelector('canvas').toDataURL()") != before
    assert tab.run("document.querySelectorAll('.said')[1].textContent") == "picture 1"
    tab.click(*middle(tab, "#stages label")())
    assert counts(tab) == ["6", "6"]
    seen = {tab.run("document.querySelector('canvas').toDataURL()")}
    for number in (2, 3):
        tab.click(*middle(tab, f"#modes label:nth-child({number})")())
        seen.add(tab.run("document.querySelector('canvas').toDataURL()"))
    assert len(seen) == 3
    urls = [
        event["params"]["request"]["url"]
        for event in tab.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith(("data:", page.as_uri())) for url in urls)
    assert not [event for event in tab.events if event["method"] == "Runtime.exceptionThrown"]
