"""The committed golden cases pass, damaged ones do not, and the exit status tells.

`DYNTOKEN_GOLDEN` (folders joined by the path separator) points at more cases;
kinds that are not built are skipped there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden.__main__ import main
from tests.golden.case import Case, find
from tests.golden.check import FAIL, KINDS, PASS, UNSUPPORTED, check
from tests.golden.ledger import Ledger

CASES = Path(__file__).parent / "golden" / "cases"
COMMITTED = sorted(path.parent for path in CASES.glob("*/case.json"))


def _more() -> list[Path]:
    """Cases in `DYNTOKEN_GOLDEN`, without those that are committed here byte for byte."""
    arguments = [path for path in os.environ.get("DYNTOKEN_GOLDEN", "").split(os.pathsep) if path]
    folders, _, errors = find(arguments)
    if errors:
        raise ValueError("DYNTOKEN_GOLDEN: " + "; ".join(errors))
    return [folder for folder in folders if not _same(folder, CASES / folder.name)]


def _same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if not other.is_dir() or names != sorted(path.name for path in other.iterdir()):
        return False
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def _copy(name: str, target: Path) -> Path:
    return Path(shutil.copytree(CASES / name, target / name))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_committed_case_passes(folder):
    result = check(folder)
    assert result.status == PASS, "\n".join(result.lines)


@pytest.mark.parametrize("folder", _more(), ids=lambda path: path.name)
def test_further_case_passes(folder):
    result = check(folder)
    if result.status == UNSUPPORTED:
        pytest.skip(result.lines[0])
    assert result.status == PASS, "\n".join(result.lines)


def test_committed_selection_is_small():
    assert sum(path.stat().st_size for path in CASES.rglob("*") if path.is_file()) <= 15_000_000
    assert len(COMMITTED) >= 9


@pytest.mark.parametrize("key", ["blocks.2.mlp.fc2.weight", "norm.weight"])
def test_one_weight_off_by_two_percent_fails(tmp_path, key):
    folder = _copy("deit", tmp_path)
    tensors = load_file(folder / "weights.safetensors")
    tensors[key] = tensors[key] * np.float32(1.02)
    save_file(tensors, folder / "weights.safetensors")
    result = check(folder)
    assert result.status == FAIL
    assert any("BAD eval.logits" in line for line in result.lines)


def test_missing_weight_fails_and_names_the_key(tmp_path):
    folder = _copy("deit", tmp_path)
    tensors = load_file(folder / "weights.safetensors")
    del tensors["blocks.0.norm1.bias"]
    save_file(tensors, folder / "weights.safetensors")
    result = check(folder)
    assert result.status == FAIL
    assert "missing: blocks.0.norm1.bias; left over: none" in "\n".join(result.lines)


def test_unknown_constructor_argument_fails(tmp_path):
    folder = _copy("deit", tmp_path)
    info = json.loads((folder / "case.json").read_text())
    info["constructor"]["qk_norms"] = True
    (folder / "case.json").write_text(json.dumps(info))
    result = check(folder)
    assert result.status == FAIL
    assert "no constructor argument 'qk_norms'" in "\n".join(result.lines)


def test_every_output_must_be_compared(tmp_path):
    """An output that no checker knows is a failure, not a silent pass."""
    folder = _copy("pos_embed_resize", tmp_path)
    info = json.loads((folder / "case.json").read_text())
    info["arrays"]["grad_extra"] = {"role": "grad", "shape": [1], "dtype": "float32", "what": "?"}
    (folder / "case.json").write_text(json.dumps(info))
    result = check(folder)
    assert result.status == FAIL
    assert "grad_extra: never compared" in "\n".join(result.lines)


def test_exit_status_0_with_a_note_about_plain_files(capsys):
    assert main([str(CASES / "pos_embed_resize"), str(Path(__file__))]) == 0
    printed = capsys.readouterr().out
    assert "plain file" in printed
    assert "pos_embed_resize: PASS" in printed
    assert "8 arrays compared" in printed
    assert "1 PASS, 0 FAIL, 0 UNSUPPORTED" in printed


def test_exit_status_1_for_a_failure_and_for_an_unsupported_kind(tmp_path, capsys):
    folder = _copy("pos_embed_resize", tmp_path)
    arrays = dict(np.load(folder / "io.npz"))
    arrays["4to6.bicubic"] = arrays["4to6.bicubic"] * np.float32(1.02)
    np.savez(folder / "io.npz", **arrays)
    assert main([str(tmp_path)]) == 1
    assert "BAD 4to6.bicubic" in capsys.readouterr().out
    (folder / "case.json").write_text(json.dumps({"kind": "sorcery"}))
    assert main([str(folder)]) == 1
    assert "UNSUPPORTED kind 'sorcery'" in capsys.readouterr().out


def test_a_case_built_in_part_neither_passes_nor_fails(tmp_path, capsys):
    """What there is was compared; what is not built is named and keeps the exit status at 1."""
    folder = _copy("schedules", tmp_path)
    info = json.loads((folder / "case.json").read_text())
    info["dynamicvit.parameter_groups"]["groups"]["dyfuture"] = {}
    (folder / "case.json").write_text(json.dumps(info))
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "schedules: UNSUPPORTED in part" in printed and "0 PASS, 0 FAIL, 1 UNSUPPORTED" in printed
    assert "not built dynamicvit.parameter_groups dyfuture" in printed
    info["dynamicvit.parameter_groups"]["groups"]["dynamicvit_deit"]["decay"]["weight_decay"] = 0.06
    (folder / "case.json").write_text(json.dumps(info))
    assert check(folder).status == FAIL  # what is built and wrong still fails


@pytest.mark.parametrize("argument", ["empty", "absent", "broken"])
def test_exit_status_2_for_what_is_no_case(tmp_path, capsys, argument):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "case.json").write_text("{")
    assert main([str(tmp_path / argument)]) == 2
    assert argument in capsys.readouterr().err


def test_exit_status_1_when_nothing_was_checked(capsys):
    assert main([str(Path(__file__))]) == 1
    assert "0 PASS" in capsys.readouterr().out


def _ledger() -> Ledger:
    return Ledger(Case(CASES / "pos_embed_resize"))


def test_limits_of_the_ledger():
    """Activations 5e-5 (of the largest value above 1), losses 1e-5, gradients 1e-3 relative L2."""
    for value, passed in ((4.9e-5, True), (5.1e-5, False)):
        ledger = _ledger()
        ledger.close("x", np.array([0.5 + value]), expected=np.array([0.5]))
        assert ledger.passed is passed
    for value, passed in ((0.9e-5, True), (1.1e-5, False)):
        ledger = _ledger()
        ledger.close("x", 0.5 + value, 1e-5, expected=np.float64(0.5))
        assert ledger.passed is passed
    for factor, passed in ((1.0009, True), (1.0011, False)):
        ledger = _ledger()
        ledger.gradient("g", np.ones(4) * factor, np.ones(4))
        assert ledger.passed is passed


def test_negligible_gradient_compares_absolutely():
    ledger = _ledger()
    ledger.gradient("g", np.array([3e-9]), np.array([1e-9]), floor=1e-8)
    assert ledger.passed
    ledger.gradient("h", np.array([3e-7]), np.array([1e-9]), floor=1e-8)
    assert not ledger.passed


def test_non_finite_values_and_other_shapes_fail():
    for ours, theirs in ((np.array([np.nan]), np.zeros(1)), (np.zeros(2), np.zeros(1))):
        ledger = _ledger()
        ledger.close("x", ours, expected=theirs)
        assert not ledger.passed


def test_index_sets_compare_in_any_order():
    ledger = _ledger()
    ledger.same_sets("s", np.array([[2, 0, 1]]), np.array([[0, 1, 2]]))
    assert ledger.passed
    ledger.same_sets("t", np.array([[2, 0, 3]]), np.array([[0, 1, 2]]))
    assert not ledger.passed


def test_every_kind_of_the_core_is_built():
    assert set(KINDS) >= {
        "deit", "deit_distilled", "dynamicvit_deit", "dynamicvit_tps_repo", "dtps_deit", "tps_module",
        "evit_deit", "etps_deit", "pos_embed_resize", "schedules", "flops", "lvvit", "dylvvit", "psvit",
    }  # fmt: skip
