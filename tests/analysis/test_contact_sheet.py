"""Contact sheets: whole pixels, nothing on top of anything else."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest

from dyntoken.analysis import contact_sheet
from dyntoken.analysis.contact_sheet import Cell, Group

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def checkers(side):
    """Black and white pixels in turn."""
    return (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)


def draw(groups, **more):
    return contact_sheet.sheet(groups, title="a title", **more)


def test_small_images_are_enlarged_by_a_whole_factor():
    figure = draw([Group("one", [[Cell(checkers(28))]])])
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    assert (box.width, box.height) == pytest.approx((84, 84))  # 3 x 28
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    pixels = np.asarray(Image.open(buffer).convert("L")).astype(int)
    top = pixels.shape[0] - round(box.y1)
    inside = pixels[top : top + 84, round(box.x0) : round(box.x0) + 84][6:-6, 6:-6]
    assert ((inside < 3) | (inside > 252)).all()  # no interpolated grey


def test_large_images_are_shrunk():
    figure = draw([Group("one", [[Cell(np.zeros((224, 112, 3)))]])])
    box = figure.axes[0].get_window_extent()
    assert (box.width, box.height) == pytest.approx((45, 90))


def test_places_captions_and_frames():
    image = checkers(28)
    groups = [
        Group(
            "exit 1",
            [[Cell(image, "sure", True), None], [Cell(image, "a very long class name", False), None]],
        ),
        Group("exit 2", [[None, Cell(image)]]),
    ]
    figure = draw(groups, columns=["cat", "dog"], note="a note")
    figure.canvas.draw()
    assert len(figure.axes) == 3
    colours = [axis.spines["top"].get_edgecolor()[:3] for axis in figure.axes]
    green, red, grey = (tuple(round(255 * c) for c in colour) for colour in colours)
    assert green[1] > green[0] and red[0] > red[1] and len(set(grey)) == 1
    texts = {text.get_text(): text for text in figure.texts}
    assert {"a title", "cat", "dog", "exit 1", "exit 2", "a note", "sure", "a very long cl…"} <= set(texts)
    boxes = [axis.get_window_extent() for axis in figure.axes]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="no image to draw"):
        draw([Group("one", [[None]])])
    with pytest.raises(ValueError, match=r"lines of \[1, 2\] cells, 0 column names"):
        draw([Group("one", [[Cell(checkers(4))], [None, None]])])
