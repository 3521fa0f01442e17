"""`Predictor` in Ray Data's workers: folders and Parquet in, Parquet out, a worker killed in the middle."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import dyntoken

pytestmark = pytest.mark.slow  # a local cluster, and workers that start and compile
ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
NAME = "etps_deit_tiny_patch16_224"
MODEL = {**TINY, "at": (1,), "keep": 0.5}
OPTIONS = {"model": NAME, "options": MODEL, "batch": 8, "features": True, "top": 2}
COUNT = 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, 61 pictures of several sizes, and a table with their encoded content, of which one is damaged."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    root, rng = tmp_path_factory.mktemp("ray"), np.random.default_rng(0)
    model = dyntoken.create_model(NAME, **MODEL)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    dyntoken.save_weights(root / "weights.safetensors", variables, model=model)
    for made in ("photos", "encoded"):
        (root / made).mkdir()
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (16 + number % 5, 20, 3), np.uint8)
        image.fromarray(pixels).save(root / "photos" / f"{number:03d}.png")
    paths = sorted((root / "photos").iterdir())
    content = [path.read_bytes() for path in paths]
    content[7] = b"no picture"
    for part in range(4):  # several files: several blocks
        rows = slice(part * 16, part * 16 + 16)
        table = pa.table({"path": [str(path) for path in paths[rows]], "bytes": content[rows]})
        parquet.write_table(table, root / "encoded" / f"{part}.parquet")
    return root


def python(*words, cwd=ROOT):
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["images", "bytes"])
def test_two_workers_of_which_one_is_killed(folder, kind):
    import ray.data  # noqa: F401 (registers the types of its columns)
    from pyarrow import parquet

    python("-m", "tests.ray_driver", str(folder), kind)
    found = parquet.read_table(folder / f"out_{kind}").sort_by("path").to_pydict()
    paths = [str(path) for path in sorted((folder / "photos").iterdir())]
    assert found["path"] == paths  # nothing lost, nothing twice
    pids = {name.name.split("_")[0] for name in (folder / f"seen_{kind}").iterdir()}
    assert len(pids) >= 2 and (folder / f"killed_{kind}").read_text() in pids
    here = dyntoken.Predictor(str(folder / "weights.safetensors"), **OPTIONS)(paths)
    good = [not text for text in found["error"]]
    assert [path for path, fine in zip(paths, good, strict=True) if not fine] == (
        [] if kind == "images" else paths[7:8]
    )
    for name in ("logits", "pooled", "top_prob"):
        column = np.array(found[name])
        assert column.dtype == np.float32
        np.testing.assert_allclose(column[good], here[name][good], atol=1e-5, err_msg=name)
        assert np.isnan(column[np.logical_not(good)]).all()
    assert np.array(found["class"])[good].tolist() == here["class"][good].tolist()


def test_the_documentation_works_as_it_is_written(folder, tmp_path):
    from pyarrow import parquet

    from dyntoken import train
    from tests.test_docs import BLOCKS
    from tests.train.tiny import tiny_config

    (block,) = (b for b in BLOCKS if str(b) == "features.md: Ray" and b.language == "python")
    train.run(tiny_config(steps=1), tmp_path / "runs" / "mine", log=lambda line: None)
    (tmp_path / "photos").symlink_to(folder / "photos")
    (tmp_path / "block.py").write_text(block.text)
    python("block.py", cwd=tmp_path)
    found = parquet.read_table(tmp_path / "features")
    assert len(set(found["path"].to_pylist())) == len(found) == COUNT and "pooled" in found.column_names
