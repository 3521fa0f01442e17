"""Checkpoints and records whose files fail: what is damaged, what only cannot be read, and what is lost by neither."""

from __future__ import annotations

import errno
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import checkpoints, train, workdirs
from dyntoken.checkpoints import Checkpoints, restore_from
from dyntoken.train import loop, sharding
from dyntoken.weights import WeightsError
from dyntoken.workdirs import CheckpointError
from tests.train.test_checkpoint import damage, files, make_state
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows, steps_kept
from tests.train.tiny import tiny_config

# After a read that failed, TensorStore's threads still answer to the event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(checkpoints, "RETRY_PAUSES_S", (0.0, 0.0), raising=False)


@pytest.fixture
def mesh():
    return sharding.data_mesh()


@pytest.fixture
def saved(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, make_state(step, mesh), seconds=1.0, config={"seed": 0})
    checkpoints.close()
    return tmp_path


def like(mesh):
    return sharding.abstract(make_state(0, mesh), mesh)


def restore(workdir, mesh):
    lines = []
    checkpoints = Checkpoints(workdir, log=lines.append)
    try:
        return checkpoints.restore(like(mesh)), lines
    finally:
        checkpoints.close()


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in files(folder) if not path.is_symlink()
    }


class TestUnreadable:
    """Storage that fails says nothing about what is stored."""

    def failing(self, monkeypatch, error, times):
        """`CheckpointManager.restore` fails some times."""
        real, left = checkpoints.ocp.CheckpointManager.restore, [times]

        def restore(*args, **kwargs):
            left[0] -= 1
            if left[0] >= 0:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", restore)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EIO, "Input/output error"),
            OSError(errno.ESTALE, "Stale file handle"),
            TimeoutError("timed out"),
            PermissionError(errno.EACCES, "Permission denied"),
            ValueError("UNAVAILABLE: the service is overloaded"),
            ValueError("DEADLINE_EXCEEDED: no answer"),
        ],
    )
    def test_nothing_is_moved(self, saved, mesh, monkeypatch, error):
        before = everything(saved / "checkpoints")
        with monkeypatch.context() as patch:
            self.failing(patch, error, 1000)
            with pytest.raises(OSError, match=r"checkpoints/6 cannot be read .*nothing was moved") as caught:
                restore(saved, mesh)
        assert "\n" not in str(caught.value)
        assert everything(saved / "checkpoints") == before and not (saved / "damaged").exists()
        assert restore(saved, mesh)[0].step == 6  # the storage is back

    def test_it_is_tried_again(self, saved, mesh, monkeypatch):
        self.failing(monkeypatch, OSError(errno.EIO, "Input/output error"), 2)
        found, lines = restore(saved, mesh)
        assert found.step == 6 and len(lines) == 2 and all("trying again" in line for line in lines)

    @pytest.mark.parametrize("part", ["state/d", "state/manifest.ocdbt", "meta/metadata"])
    def test_a_file_that_the_system_cannot_open(self, saved, mesh, part):
        """A link to itself: a real error (ELOOP) in TensorStore's reads and in ours."""
        place = saved / "checkpoints" / "6" / part
        for file in list(place.iterdir()) if place.is_dir() else [place]:
            file.unlink()
            file.symlink_to(file.name)
        with pytest.raises(OSError, match=r"checkpoints/6 cannot be read"):
            restore(saved, mesh)
        assert not (saved / "damaged").exists()
        assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "4", "6"]
        with pytest.raises(OSError, match=r"checkpoints/6 cannot be read"):
            restore_from(saved, like(mesh))

    def test_weights_say_the_same(self, saved):
        for file in (saved / "checkpoints" / "6" / "state" / "d").iterdir():
            file.unlink()
            file.symlink_to(file.name)
        with pytest.raises(WeightsError, match=r"cannot be read") as caught:
            workdirs_read(saved)
        assert "damaged" not in str(caught.value)


def workdirs_read(workdir):
    from dyntoken.weights import orbax

    return orbax.read(workdir)


FOUR = tiny_config(steps=4, checkpoint_steps=2)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ended")
    return train.run(FOUR, workdir, log=Log()), workdir


class TestAllDamaged:
    CONFIG = FOUR

    @pytest.fixture
    def broken(self, ended, tmp_path):
        workdir = tmp_path / "run"
        shutil.copytree(ended[1], workdir)
        for step in (2, 4):
            damage(workdir / "checkpoints" / str(step), lambda raw: raw[: len(raw) // 2])
        return workdir

    def test_the_same_command_goes_on_refusing(self, broken):
        record = (broken / "metrics.jsonl").read_text()
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact.*--restart") as caught:
                train.run(self.CONFIG, broken, log=Log())
            assert "\n" not in str(caught.value)
            assert (broken / "metrics.jsonl").read_text() == record
        assert steps_kept(broken) == [2, 4]

    def test_those_that_were_set_aside_before_count(self, broken):
        """As an older version left a workdir, and as somebody's own hands may."""
        (broken / "damaged").mkdir()
        for step in (2, 4):
            (broken / "checkpoints" / str(step)).rename(broken / "damaged" / str(step))
        with pytest.raises(CheckpointError, match=r"damaged.*2, 4.*--restart"):
            train.run(self.CONFIG, broken, log=Log())

    def test_restart_moves_the_old_run_aside(self, broken, ended):
        before = everything(broken)
        log = Log()
        again = train.run(self.CONFIG, broken, restart=True, log=log)
        assert_identical(again.state, ended[0].state)
        assert rows(broken) == rows(ended[1]) and steps_kept(broken) == [2, 4]
        assert any(f"{broken}/old/1" in line for line in log)
        assert everything(broken / "old" / "1") == before
        train.run(self.CONFIG, broken, restart=True, log=Log())  # nothing is overwritten
        assert everything(broken / "old" / "1") == before
        found = train.evaluate(self.CONFIG, broken / "old" / "2", log=Log())  # a workdir like any other
        assert found["step"] == 4 and found["top1"] == again.metrics["top1"]

    def test_restart_of_nothing(self, tmp_path, ended):
        result = train.run(self.CONFIG, tmp_path / "new", restart=True, log=Log())
        assert result.metrics == ended[0].metrics and not (tmp_path / "new" / "old").exists()


RECORDED = tiny_config(steps=5, eval_steps=1, keep_best=1, keep_checkpoints=1)
SCORES = (0.1, 0.9, 0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("died") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CrashError):
        calls = iter(SCORES)
        patch.setattr(loop, "measure", lambda *_: {"top1": next(calls), "loss": 1.0})
        train.run(RECORDED, workdir, log=Log("step 5/5", crash))
    return workdir


@pytest.fixture(scope="module")
def best_by_loss(tmp_path_factory):
    """A whole run whose `best_metric` is no default: (result, workdir)."""
    workdir, calls = tmp_path_factory.mktemp("by_loss") / "run", iter(SCORES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure", lambda *_: {"top1": 0.5, "loss": 1 - next(calls)})
        config = {**RECORDED.to_dict(), "best_metric": "loss"}
        return train.run(config, workdir, log=Log()), workdir


class TestRecord:
    """metrics.jsonl and config.json are files that people touch; the checkpoints carry what matters."""

    CONFIG = RECORDED

    @pytest.fixture
    def half(self, died, tmp_path, monkeypatch):
        """A run that died after step 4 of 5, whose best checkpoint is that of step 2; step 5 will score less."""
        monkeypatch.setattr(loop, "measure", lambda *_: {"top1": SCORES[-1], "loss": 1.0})
        workdir = shutil.copytree(died, tmp_path / "run")
        assert steps_kept(workdir) == [2, 4]
        return workdir

    BAD = (
        b"\xff\xfe\x00not text",
        b"some text",
        b"null",
        b"[1, 2]",
        b'"a string"',
        b"12",
        b'{"step": "three", "kind": "eval", "top1": 5}',
        b'{"step": null, "kind": "train"}',
        b"{" * 20000,
    )

    @pytest.mark.parametrize("bad", [BAD, BAD[:1], BAD[2:3]])
    def test_bad_lines_are_left_out(self, half, bad):
        path = half / "metrics.jsonl"
        good = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([good[0], *bad, *good[1:], b""]))
        log = Log()
        result = train.run(self.CONFIG, half, log=log)
        assert result.finished
        assert [row["step"] for row in rows(half) if row["kind"] == "train"] == [1, 2, 3, 4, 5]
        assert [line for line in log if line.startswith(f"{len(bad)} damaged line(s) in ")]
        assert len([line for line in log if "damaged line" in line]) == 1
        assert steps_kept(half) == [2, 5]

    @pytest.mark.parametrize("loss", ["emptied", "absent", "zeros"])
    def test_a_lost_record_costs_no_best_checkpoint(self, half, loss):
        path = half / "metrics.jsonl"
        path.write_bytes(b"\0" * 900 if loss == "zeros" else b"")
        if loss == "absent":
            path.unlink()
        result = train.run(self.CONFIG, half, log=Log())
        assert steps_kept(half) == [2, 5]
        assert restore_from(half, result.run.abstract_state, step="best").step == 2

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"best_metric": 3}', "\0" * 20, None])
    def test_a_damaged_config(self, best_by_loss, tmp_path, text):
        result, workdir = best_by_loss[0], shutil.copytree(best_by_loss[1], tmp_path / "run")
        path = workdir / "config.json"
        path.unlink()
        if text is not None:
            path.write_text(text)
        assert restore_from(workdir, result.run.abstract_state, step="best").step == 2
        loaded = dyntoken.load_weights(result.model, workdir, step="best")
        assert_identical(
            loaded["params"], restore_from(workdir, result.run.abstract_state, step=2).tree.params
        )


class TestOtherVersions:
    """Descriptions that are intact, but of another version."""

    def change(self, workdir, change):
        path = workdir / "checkpoints" / "6" / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["checksum"]
        change(meta)
        path.write_text(json.dumps({**meta, "checksum": workdirs_checksum(meta)}))

    @pytest.mark.parametrize("leaves", [None, {}, {"params/a/bias": 7}, {"params/a/bias": {"crc": 1}}, [1]])
    def test_without_checksums_of_the_arrays(self, saved, mesh, leaves):
        self.change(saved, lambda meta: meta.pop("leaves") if leaves is None else meta.update(leaves=leaves))
        with pytest.raises(CheckpointError, match=r"checkpoints/6 ") as caught:
            restore(saved, mesh)
        assert "\n" not in str(caught.value) and "workdir" in str(caught.value)
        assert not (saved / "damaged").exists()

    def test_what_has_a_default(self, tmp_path):
        config = tiny_config(steps=4, checkpoint_steps=2)
        with pytest.raises(CrashError):
            train.run(config, tmp_path, log=Log("step 3/4", crash))
        path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
        meta = {"leaves": json.loads(path.read_text())["leaves"]}
        path.write_text(json.dumps({**meta, "checksum": workdirs_checksum(meta)}))
        log = Log()
        result = train.run(config, tmp_path, log=log)
        assert result.finished and "resuming at step 2 of 4" in log
        assert any("another version" in line for line in log)

    @pytest.mark.parametrize("lost", ["file", "folder", "leaves"])
    def test_load_weights_says_that_nothing_was_verified(self, saved, lost):
        place = saved / "checkpoints" / "6" / "meta"
        if lost == "leaves":
            self.change(saved, lambda meta: meta.pop("leaves"))
        elif lost == "folder":
            shutil.rmtree(place)
        else:
            (place / "metadata").unlink()
        with pytest.warns(UserWarning, match=r"nothing verified"):
            trees = workdirs_read(saved)
        np.testing.assert_array_equal(trees["params"]["a"]["bias"], jnp.full(5, 6.0))


def workdirs_checksum(meta):
    import zlib

    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def test_rows_and_scores_by_hand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "kind": "eval", "top1": null}\n{"step": 2, "kind": "eval", "top1": 0.5}\n{"st'
    )
    told = []
    found = workdirs.read_rows(path, told.append)
    assert [row["step"] for row in found] == [1, 2] and told == []  # killed while it wrote
    assert workdirs.scores(found, "top1") == {2: 0.5}
