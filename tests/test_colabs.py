"""The notebooks run from top to bottom, and are committed without outputs."""

from __future__ import annotations

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

# What each prints.
SAYS = {
    "quickstart": ("GMACs", "logits (8, 10)"),
    "own_method": ("keynorm (yours)", "random, squeezed"),
    "pretrained": ("etps     keep 0.7", "cosine to the dense features"),
    "early_exit": ("GMACs up to each exit", "exits taken:", "of 100 images"),
    "finetune": ("top-1", "10 classes: Ankle boot"),
    "export": ("read back: 0.0 apart", "jax.export: logits (8, 10)", "model.tpu.jax"),
}
FOLDER = pathlib.Path(__file__).parent.parent / "colabs"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SAYS)


def test_each_has_its_picture_on_a_page():
    page = (FOLDER.parent / "docs" / "notebooks.md").read_text()
    for name in SAYS:
        assert f"`{name}.ipynb`" in page and f"(images/notebooks/{name}.png)" in page
        assert (FOLDER.parent / "docs" / "images" / "notebooks" / f"{name}.png").stat().st_size < 100_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


# The kernel's start-up and its sockets warn by themselves, in this process.
@pytest.mark.filterwarnings("default")
@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("DYNTOKEN_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    text = "".join(output.get("text", "") for output in outputs)
    assert not [words for words in SAYS[path.stem] if words not in text], text
    assert not [output for output in outputs if output.output_type == "error"]
