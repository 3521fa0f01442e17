"""Checkpoints: whole or refused, whatever happens to the files."""

from __future__ import annotations

import asyncio
import gc
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyntoken import checkpoints
from dyntoken.checkpoints import Checkpoints, restore_from
from dyntoken.train import sharding
from dyntoken.train.state import create_state
from dyntoken.workdirs import CheckpointError

# After a read that failed, TensorStore's threads still answer to the event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step: int, mesh, width: int = 5, ema: bool = True):
    params = {
        "a": {"kernel": jnp.arange(4.0 * width).reshape(4, width) + step, "bias": jnp.ones(width) * step}
    }
    params["a"]["half"] = jnp.full((3,), 1.5 + step, jnp.bfloat16)
    variables = {"params": params, "batch_stats": {"mean": jnp.full((3,), 0.5 * step)}}
    state = create_state(variables, optax.chain(optax.clip(1.0), optax.adam(1e-3)), ema=ema)
    return sharding.replicate(state.replace(step=jnp.int32(step)), mesh)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def mesh():
    return sharding.data_mesh()


@pytest.fixture
def saved(tmp_path, mesh):
    """A workdir with checkpoints 2 and 4, and the lines logged since."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 4):
        checkpoints.save(step, make_state(step, mesh), seconds=1.5 * step, config={"seed": 0})
    checkpoints.close()
    return tmp_path


def restore(workdir, mesh, **options):
    lines = []
    checkpoints = Checkpoints(workdir, log=lines.append)
    try:
        return checkpoints.restore(sharding.abstract(make_state(0, mesh, **options), mesh)), lines
    finally:
        checkpoints.close()


def files(step_folder: pathlib.Path):
    return sorted(p for p in step_folder.rglob("*") if p.is_file())


def damage(step_folder: pathlib.Path, change) -> None:
    """Changes the bytes of every array file (some, left from merging, are never read)."""
    for file in step_folder.glob("state/**/d/*"):
        file.write_bytes(change(file.read_bytes()))


def flip(raw: bytes, place: float = 0.5, bit: int = 1) -> bytes:
    changed = bytearray(raw)
    changed[int(place * (len(raw) - 1))] ^= bit
    return bytes(changed)


def test_round_trip_keeps_the_newest(saved, mesh):
    found, lines = restore(saved, mesh)
    assert found.step == 4 and found.meta["seconds"] == 6.0 and found.meta["config"] == {"seed": 0}
    assert_equal(found.tree, make_state(4, mesh))
    assert isinstance(found.tree.opt_state[1][0], optax.ScaleByAdamState)
    assert lines == []
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "4"]


def test_nothing_there(tmp_path, mesh):
    assert restore(tmp_path, mesh) == (None, [])


def test_without_average(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3, mesh, ema=False))
    checkpoints.close()
    found, _ = restore(tmp_path, mesh, ema=False)
    assert found.tree.ema is None
    assert_equal(found.tree.params, make_state(3, mesh).params)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 2)])
def test_other_number_of_devices(tmp_path, before, after):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, make_state(7, sharding.data_mesh(jax.devices()[:before])))
    checkpoints.close()
    mesh = sharding.data_mesh(jax.devices()[:after])
    found, _ = restore(tmp_path, mesh)
    assert_equal(found.tree, make_state(7, mesh))
    assert found.tree.params["a"]["kernel"].sharding.mesh == mesh


def test_what_else_is_kept_and_forgotten(tmp_path, mesh):
    asked = []
    checkpoints = Checkpoints(tmp_path, keep=1, also=lambda steps: asked.append(steps) or {2, 3, 9})
    for step in range(1, 6):
        checkpoints.save(step, make_state(step, mesh))
    checkpoints.wait()
    assert asked[-1] == [2, 3, 4, 5]  # 4 goes, and was there until 5 was complete
    kept = tmp_path / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["2", "3", "5"]
    like = sharding.abstract(make_state(0, mesh), mesh)
    assert checkpoints.restore(like, among=lambda step: step % 2 == 0).step == 2
    assert checkpoints.restore(like, among=lambda step: step > 5) is None
    checkpoints.forget(2)
    assert [path.name for path in kept.iterdir()] == ["2"]
    checkpoints.save(3, make_state(3, mesh))
    checkpoints.close()
    assert restore(tmp_path, mesh)[0].step == 3


def test_saving_again_is_no_error(saved, mesh):
    checkpoints = Checkpoints(saved)
    checkpoints.restore(sharding.abstract(make_state(0, mesh), mesh))
    checkpoints.save(4, make_state(4, mesh))
    checkpoints.save(5, make_state(5, mesh))
    checkpoints.close()
    assert restore(saved, mesh)[0].step == 5


def test_bit_flip_in_the_newest(saved, mesh):
    damage(saved / "checkpoints" / "4", flip)
    found, lines = restore(saved, mesh)
    assert found.step == 2
    assert_equal(found.tree, make_state(2, mesh))
    assert len(lines) == 1 and "checkpoint 4" in lines[0] and "damaged" in lines[0]
    assert (saved / "damaged" / "4").is_dir() and not (saved / "checkpoints" / "4").exists()


def test_the_damaged_step_can_be_saved_again(saved, mesh):
    damage(saved / "checkpoints" / "4", lambda raw: b"")
    checkpoints = Checkpoints(saved, log=lambda line: None)
    checkpoints.restore(sharding.abstract(make_state(0, mesh), mesh))
    checkpoints.save(4, make_state(4, mesh))
    checkpoints.close()
    assert restore(saved, mesh)[0].step == 4


def test_any_flipped_byte_is_found_or_harmless(saved, mesh, tmp_path_factory):
    """Every file of a checkpoint, a byte at three places: the right state or the one before."""
    names = [p.relative_to(saved) for p in files(saved / "checkpoints" / "4")]
    caught = 0
    for name in names:
        raw = (saved / name).read_bytes()
        for place in (0.0, 0.5, 1.0) if raw else ():
            copy = tmp_path_factory.mktemp("flip") / "run"
            shutil.copytree(saved, copy)
            (copy / name).write_bytes(flip(raw, place, bit=0x10))
            found, lines = restore(copy, mesh)
            caught += found.step == 2
            assert found.step in (2, 4) and bool(lines) == (found.step == 2), (name, place)
            assert_equal(found.tree, make_state(found.step, mesh))
    assert caught >= 6  # the arrays and both descriptions at least


@pytest.mark.parametrize("item", ["state", "meta"])
def test_truncated(saved, mesh, item):
    folder = saved / "checkpoints" / "4"
    if item == "state":
        damage(folder, lambda raw: raw[: len(raw) // 2])
    else:
        target = folder / "meta" / "metadata"
        target.write_bytes(target.read_bytes()[:100])
    found, lines = restore(saved, mesh)
    assert found.step == 2 and len(lines) == 1


def test_a_lost_item(saved, mesh):
    shutil.rmtree(saved / "checkpoints" / "4" / "state")
    assert restore(saved, mesh)[0].step == 2


def test_an_edited_description(saved, mesh):
    """Valid JSON that is not what was written."""
    target = saved / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(target.read_text())
    target.write_text(json.dumps({**meta, "seconds": 0.0}))
    assert restore(saved, mesh)[0].step == 2


def test_none_intact(saved, mesh):
    for step in ("2", "4"):
        damage(saved / "checkpoints" / step, lambda raw: b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact.*another workdir"):
        restore(saved, mesh)


def test_another_model_is_named_not_set_aside(saved, mesh):
    with pytest.raises(
        CheckpointError, match=r"ema/params/a/bias is \[\[5\], 'float32'\] there, \[\[6\], 'float32'\]"
    ):
        restore(saved, mesh, width=6)
    with pytest.raises(CheckpointError, match=r"ema/.* 'float32'\] there, absent here"):
        restore(saved, mesh, ema=False)
    assert not (saved / "damaged").exists()


def test_from_another_run_leaves_it_untouched(saved, mesh):
    like = sharding.abstract(make_state(0, mesh), mesh)
    damage(saved / "checkpoints" / "4", lambda raw: b"")
    lines = []
    assert restore_from(saved, like, log=lines.append).step == 2
    assert len(lines) == 1 and (saved / "checkpoints" / "4").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoints in .*nowhere"):
        restore_from(saved / "nowhere", like)


def test_weights_are_read_whatever_the_optimizer_was(saved, mesh):
    state = make_state(4, mesh)
    like = sharding.abstract(state.replace(opt_state=None), mesh)
    found = restore_from(saved, like, leave_out="opt_state")
    assert found.step == 4 and found.tree.opt_state is None
    assert_equal(found.tree.variables, state.variables)
    assert_equal(found.tree.ema, state.ema)
    with pytest.raises(CheckpointError, match=r"opt_state/.* there, absent here"):
        restore_from(saved, like)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_errors_that_nobody_reads_any_more(caplog):
    """Orbax restores arrays in tasks; the first that fails is our line, the others are collected unread."""
    checkpoints.ignore_late_callbacks()
    for file, said in (("/site-packages/orbax/checkpoint/serialization.py", 0), ("/home/me/mine.py", 1)):
        names: dict = {}
        exec(compile("async def read():\n    raise ValueError('cut short')", file, "exec"), names)
        loop = asyncio.new_event_loop()
        task = loop.create_task(names["read"]())
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        caplog.clear()
        del task
        gc.collect()
        assert len(caplog.records) == said
    for error, said in (("OUT_OF_RANGE: no such bytes [tensorstore_spec='{}']", 0), ("cut short", 1)):
        loop = asyncio.new_event_loop()
        future = loop.create_future()
        future.set_exception(ValueError(error))
        loop.close()
        caplog.clear()
        del future
        gc.collect()
        assert len(caplog.records) == said
