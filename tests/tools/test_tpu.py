"""`tools.tpu`: arguments, requests and reports; the compilation itself only where libtpu is."""

import functools
import importlib.metadata
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from dyntoken.analysis import hlo
from dyntoken.tools import cli, tpu, tpu_report

TINY = ["dtps_deit_tiny_patch8_16", "--set=width=16", "--set=depth=2", "--set=heads=2", "--at=1"]
NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.fixture
def host(monkeypatch):
    """This machine's devices in the place of chips, and no libtpu to ask for its version."""
    monkeypatch.setattr(tpu, "devices", lambda topology: jax.devices()[: tpu.chips(topology)[1]])
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9" if name == "libtpu" else version(name)
    )


def _parsed(*argv):
    parser = cli.Parser("tpu", "")
    tpu.arguments(parser)
    return parser.parse_args([*argv, "--topology=v5e:2x2", "--batch=4"])


def _args(*more):
    return _parsed(*TINY, "--dtype=float32", *more)


def test_topologies():
    assert tpu.chips("v5e") == ("v5e:2x4", 8, 16)
    assert tpu.chips("pod") == ("v5e:16x16", 256, 16)
    assert tpu.chips("v5p:4x4x4") == ("v5p:4x4x4", 64, 95)
    for bad in ("v7", "v5e:2xa", "v5e:", "2x4"):
        with pytest.raises(ValueError, match=r"unknown topology .* as in v5e:4x4"):
            tpu.chips(bad)


@pytest.mark.skipif(not NO_LIBTPU, reason="libtpu is installed")
def test_one_clear_line_without_libtpu(capsys):
    assert tpu.main([*TINY]) == 1
    assert "error: libtpu is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give the NAME of a model, or --config=RECIPE"),
        ([*TINY, "--teacher"], "--teacher goes with NAME and --train"),
        (["--config=configs/tps_deit.py", "--teacher"], "--teacher goes with NAME and --train"),
        ([*TINY, "--topology=v9"], "unknown topology 'v9'"),
        (["--config=configs/nothing.py"], "no recipe configs/nothing.py"),
    ],
)
def test_bad_arguments_end_in_one_line(argv, message, capsys):
    assert tpu.main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_a_name_trains_with(host):
    run = tpu.make_run(_args("--train", "--teacher", "--scan", "--remat=dots_saveable", "--accumulate=2"))
    assert set(run.settings.losses) == {"ce", "keep_ratio", "logit_kl", "token_distill"}
    assert (run.settings.batch, run.settings.accumulate, run.mesh.size) == (16, 2, 4)
    body = run.model.plain()
    assert (body.scan, body.remat, body.width) == (True, "dots_saveable", 16)
    assert run.teacher.method is None and run.teacher.plain().scan


def test_a_recipe_says_all_itself(host):
    run = tpu.make_run(_parsed("--config=configs/tps_deit.py:tiny", "--train", "--scan"))
    assert run.settings.losses.keys() == {"ce", "keep_ratio"} and run.settings.batch == 16
    assert run.model.method == "dtps" and run.model.plain().scan
    assert run.model.plain().dtype == jnp.bfloat16


def test_another_request_is_compiled_anew(host, tmp_path):
    args = _args("--train")
    wanted = tpu.request(args, tpu.make_run(args))
    assert wanted["model"]["name"] == TINY[0] and wanted["versions"]["libtpu"] == "9"
    path = tmp_path / "report.json"
    assert tpu.stored(path, wanted) is None
    path.write_text(json.dumps({**wanted, "command": "x", "sorts": 0}))
    assert tpu.stored(path, wanted)["sorts"] == 0
    assert tpu.stored(path, {**wanted, "batch_per_chip": 8}) is None
    assert tpu.stored(path, {**wanted, "versions": {**wanted["versions"], "jax": "1"}}) is None
    assert tpu.slug(wanted) == (
        "dtps_deit_tiny_patch8_16_train_v5e-2x2_b4_at--1-_depth-2_float32_heads-2_width-16"
    )


def test_the_stored_command_names_no_folder():
    argv = ["deit", "--hlo=/a/b", "--train", "--results", "/c", "--json", "--again", "--keep=0.7"]
    assert tpu.command(argv) == "python -m dyntoken.tools.tpu deit --train --keep=0.7"
    assert tpu.command(["--set", "heads=2", "deit"]).endswith("tpu --set heads=2 deit")


@functools.cache
def _measured():
    step = jax.jit(lambda x: jnp.sort(x @ x, axis=1)).lower(jnp.ones((8, 8))).compile()
    return {"memory": tpu.memory(step), **hlo.summary(step.as_text())}


def _report(**more):
    request = {"model": {"name": "deit", "scan": True, "dtype": "bfloat16"}, "step": "train"}
    request |= {"losses": ["ce"], "teacher": None, "topology": "v5e:2x4", "chips": 8, "batch_per_chip": 128}
    request |= {"accumulate": 2, "shard": "none", "hbm_gib": 16, "versions": {"jax": "1"}, "compile_s": 9.5}
    request["compile_cpu_s"] = 7.0
    return {**request, **more}


def test_what_the_compiler_answers():
    found = _measured()
    assert found["sorts"] == 1 and found["collectives"] == [] and found["gathers"] == 0
    assert found["memory"]["arguments"] == 8 * 8 * 4
    assert found["memory"]["total"] >= 2 * 8 * 8 * 4


def test_a_report_as_text():
    gib = {"arguments": 2**30, "held": 2**30, "temporary": 3 * 2**30, "code": 0, "total": 4 * 2**30}
    collectives = [{"kind": "all-reduce", "count": 2, "bytes": 88 * 2**20}]
    estimate = [
        {"group": "matrix products and convolutions", "count": 10, "cycles": 3_000_000, "estimated": 10},
        {"group": "collectives", "count": 2, "cycles": 0, "estimated": 0},
    ]
    found = _report(**{**_measured(), "memory": gib, "collectives": collectives, "estimate": estimate})
    lines = tpu_report.text(found).splitlines()
    assert lines[0].startswith("deit (dtype=bfloat16, scan=True): training step for 8 chips v5e:2x4")
    assert lines[1] == "losses ce; accumulate=2"
    assert "25 % of the chip's 16 GiB" in lines
    assert any(line.split() == ["all-reduce", "2", "88.00", "MiB"] for line in lines)
    assert any(line.endswith("3.00  100.0 %") for line in lines)
    row = tpu_report.table([found]).splitlines()[-1]
    assert row.startswith(
        "| `deit` train, dtype=bfloat16, scan | v5e:2x4 | 128 | 4.00 of 16 | 2 x 44.00 MiB | 1 |"
    )


def test_what_does_not_fit_is_a_report():
    found = _report(refused="Ran out of memory in memory space hbm")
    assert "does not fit into 16 GiB: Ran out of memory" in tpu_report.text(found)
    assert "| more than 16 |" in tpu_report.table([found])


def test_a_program_that_cannot_be_written_out_ends_in_one_line():
    class Step:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    run = types.SimpleNamespace(eval_step=Step())
    with pytest.raises(ValueError, match="compiled, but the compiler cannot write it out: INTERNAL"):
        tpu.compiled(_args(), run)


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu (extra [aot])")
def test_a_real_compilation(tmp_path, capsys):
    argv = [*TINY, "--train", "--scan", "--batch=8", "--topology=v5e:2x2", f"--results={tmp_path}", "--json"]
    assert tpu.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert {c["kind"] for c in found["collectives"]} == {"all-reduce"} and found["sorts"] == 0
    assert sum(cost["cycles"] for cost in found["estimate"]) > 0
    assert tpu.main(argv) == 0  # from the file
    assert json.loads(capsys.readouterr().out) == found
