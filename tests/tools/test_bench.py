"""The comparison of two models on known times, what stands beside it, and the real thing once."""

import dataclasses
import json
import pathlib
import shlex
import sys

import jax
import pytest

import dyntoken
from dyntoken.analysis import compiling, op_classes, timing
from dyntoken.tools import bench, bench_peers, bench_suite

TINY = ["--set", "width=8", "--set", "depth=2", "--set", "heads=2", "--batch=2", "--pairs=1"]
TIMES = timing.Times((0.03, 0.06, 0.09)), timing.Times((0.02, 0.03, 0.06))


@pytest.fixture
def known_times(monkeypatch):
    """Replaces the measurement, not the models: 60 ms against 30 ms at the median."""
    made = []

    def record(model, variables, images, **options):
        made.append((model, images.shape, options))
        return timing.Program(None, (images,))

    monkeypatch.setattr(timing, "in_turn", lambda runs, **_: [*TIMES, *(TIMES[1:] * 3)][: len(runs)])
    monkeypatch.setattr(timing, "evaluation", record)
    monkeypatch.setattr(timing, "training", record)
    monkeypatch.setattr(
        compiling,
        "compiled",
        lambda program, timed: compiling.Compiled(None, *((5.0, 1.0) if timed else (None, None)), 2**20),
    )
    return made


def run(capsys, *argv):
    assert bench.main([*argv, *TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_dense_counterpart_is_the_default(known_times, capsys):
    got = run(capsys, "dtps_vit_mini_patch4_28", "--keep=0.5", "--at=1", "--dtype=bfloat16", "--compile")
    assert [row["name"] for row in got["models"]] == ["vit_mini_patch4_28", "dtps_vit_mini_patch4_28"]
    assert [row["images_per_s"] for row in got["models"]] == pytest.approx([2 / 0.06, 2 / 0.03])
    assert got["models"][1]["latency_ms"] == pytest.approx(30.0)
    assert got["models"][1]["latency_percentiles_ms"]["p50"] == pytest.approx(30.0)
    assert (got["ratio"], got["ratio_quartiles"]) == (1.5, [1.5, 1.75])
    assert [row["speed_up"] for row in got["models"]] == [1.0, 1.5]
    assert got["models"][0]["first_compile_s"] == 5.0 and got["models"][0]["cached_compile_s"] == 1.0
    assert got["gmac_ratio"] == pytest.approx(got["models"][0]["gmacs"] / got["models"][1]["gmacs"])
    assert got["share_of_ideal"] == pytest.approx(1.5 / got["gmac_ratio"])
    dense, reduced = (model for model, _, _ in known_times)
    assert (dense.method, reduced.method, reduced.keep, reduced.at) == (None, "dtps", 0.5, (1,))
    assert {str(dict(m.backbone.options)["dtype"]) for m in (dense, reduced)} == {"bfloat16"}
    assert {shape for _, shape, _ in known_times} == {(2, 28, 28, 1)}


def test_vs_names_another_baseline_without_the_options_of_the_method(known_times, capsys):
    got = run(capsys, "dtps_vit_mini_patch4_28", "--keep=0.5", "--at=1", "--vs", "topk_vit_mini_patch4_28")
    assert got["models"][0]["name"] == "topk_vit_mini_patch4_28"
    assert known_times[0][0].keep == 0.7


@pytest.mark.parametrize(("name", "masked"), [("dtps", True), ("evit", False)])
def test_training_in_mask_form_has_no_ideal(known_times, capsys, name, masked):
    got = run(capsys, f"{name}_vit_mini_patch4_28", "--at=1", "--train")
    assert got["mode"] == "train" and known_times[0][2] == {"optimizer": False}
    assert (got["share_of_ideal"] is None) == masked


def test_several_batches_are_several_results(known_times, capsys):
    assert bench.main(["dtps_vit_mini_patch4_28", *TINY, "--batch=1,16", "--train=step", "--json"]) == 0
    assert [one["batch"] for one in json.loads(capsys.readouterr().out)] == [1, 16]
    assert known_times[0][2] == {"optimizer": True}


def test_the_dense_model_teaches_the_other(known_times, capsys):
    got = run(capsys, "dtps_vit_mini_patch4_28", "--at=1", "--train", "--teacher")
    (dense, _, alone), (_, _, taught) = known_times
    assert got["teacher"] and alone == {"optimizer": False} and taught["teacher"][0] is dense
    assert jax.tree.leaves(taught["teacher"][1])


def test_peers_stand_in_the_same_turns(known_times, capsys, monkeypatch):
    monkeypatch.setattr(bench_peers, "exported", lambda *_: lambda: {})
    argv = ["dtps_deit_tiny_patch16_224", "--img_size=32", "--vs-torch", "--vs-onnx", "--at=1"]
    for name in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    got = run(capsys, *argv)
    rows = [(row["name"].partition("_")[0], row["runtime"].partition(" ")[0]) for row in got["models"]]
    assert rows == [
        ("deit", "jax"),
        ("dtps", "jax"),
        ("deit", "torch"),
        ("deit", "onnxruntime"),
        ("dtps", "onnxruntime"),
    ]


def fails(capsys, status, *argv):
    try:
        assert bench.main([*argv]) == status
    except SystemExit as error:
        assert error.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_wrong_is_one_line(capsys, monkeypatch):
    name = "dtps_vit_mini_patch4_28"
    assert "'0': give a whole number of at least 1, or several" in fails(capsys, 2, name, "--batch=0")
    assert "dtps_vit_mini_patch4_28" in fails(capsys, 1, "dtps_vit_mini_patch4_29x")
    assert "is dense: name a second model" in fails(capsys, 1, "vit_mini_patch4_28")
    assert "give its NAME, or --suite" in fails(capsys, 2)
    assert "leave NAME out" in fails(capsys, 2, name, "--suite")
    assert "have no training" in fails(capsys, 2, name, "--train", "--vs-onnx")
    assert "add --train" in fails(capsys, 2, name, "--teacher")
    alone = ("vit_mini_patch4_28", "--train", "--teacher", "--profile")
    assert "give the model to be taught" in fails(capsys, 2, *alone)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--vs-openvino needs onnx: pip install onnx openvino" in fails(capsys, 1, name, "--vs-openvino")
    assert "--vs-torch-compile needs torch: pip install torch" in fails(capsys, 1, name, "--vs-torch-compile")


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_a_full_memory_is_one_line(known_times, capsys, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(timing, "in_turn", full)
    line = fails(capsys, 1, "dtps_vit_mini_patch4_28", *TINY)
    assert line.endswith("batch 2 does not fit into memory: take a smaller one")


def test_a_plan_beyond_the_memory_is_refused():
    compiling.check_memory(2**20, "batch 2")
    compiling.check_memory(None, "batch 2")
    with pytest.raises(
        ValueError, match=r"batch 2 needs 1048576.0 GiB of memory, of .*: take a smaller batch"
    ):
        compiling.check_memory(2**50, "batch 2")


@pytest.mark.thorough
def test_the_real_thing_prints_a_table(capsys):
    assert bench.main(["dtps_vit_mini_patch4_28", "--keep=5", "--at=1", *TINY, "--profile", "--compile"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("evaluation, random weights, batch 2, float32, ")
    assert "vit_mini_patch4_28 " in text and "% of ideal" in text
    assert "(quartiles " in text and "of 1 pairs" in text
    for name in ("attention", "MLP", "score", "squeeze"):
        assert f"\n{name} " in text


def test_classes_of_instructions():
    text = """HloModule jit_f
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %dot.1 = f32[2]{0} dot(%p, %p), metadata={op_name="jit(f)/Model/blocks_0.feed_forward/mlp/fc1/dot_general"}
}
%moves (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  ROOT %t = f32[2]{0} transpose(%q), dimensions={0}, metadata={op_name="jit(f)/Model/blocks_0.attend/attn/transpose"}
}
ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %ynn = f32[2]{0} fusion(%a), kind=kCustom, calls=%fused
  %turn = f32[2]{0} fusion(%a), kind=kLoop, calls=%moves
  %norm = f32[2]{0} add(%a, %a), metadata={op_name="jit(f)/Model/blocks_0.attend/norm1/add"}
  %soft = f32[2]{0} add(%a, %a), metadata={op_name="jit(f)/Model/blocks_0.attend/attn/add"}
  %sort = f32[2]{0} sort(%a), metadata={op_name="jit(f)/Model/trunk._reduce/reducer_0/reducer_0.reduce/select/sort"}
  %pred = f32[2]{0} add(%a, %a), metadata={op_name="jit(f)/Model/reducer_0/reducer_0.reduce/predictor/in_norm/add"}
  ROOT %other = f32[2]{0} add(%a, %a)
}
"""
    found = op_classes.by_instruction(text)
    wanted = {"ynn": "MLP", "turn": "copies", "norm": "norms", "soft": "attention", "sort": "select"}
    assert {name: found[name] for name in wanted} == wanted
    assert (found["pred"], found["other"]) == ("score", "rest")


def test_the_dense_model_in_torch_has_the_parameters_of_ours():
    torch = pytest.importorskip("torch")
    small = {"width": 8, "depth": 2, "heads": 2, "img_size": 32, "num_classes": 10}
    model = dyntoken.create_model("deit_tiny_patch16_224", **small)
    net = bench_peers._module(model.plain(), 3, 10)
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(timing.random_variables(model)))
    assert net(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    bench_peers.torch_vit(model, 2, train=True, dtype="float32")()
    assert bench_peers.torch_vit(model, 2, train=False, dtype="bfloat16")().shape == (2, 10)
    for name in ("pvt_tiny", "vit_mini_patch4_28"):  # the second has a stem of convolutions
        with pytest.raises(ValueError, match=rf"has plain ViTs such as .*; {name} is none"):
            bench_peers.torch_vit(dyntoken.create_model(name), 2, train=False, dtype="float32")


def test_the_suite_writes_its_files(known_times, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_suite,
        "COMMANDS",
        ("dtps_vit_mini_patch4_28 --keep=0.5 --at=1 --batch=1,2 --set width=8 --set heads=2",),
    )
    monkeypatch.setattr(bench_suite, "DENSE", "vit_mini_patch4_28")
    assert bench.main([f"--suite={tmp_path}", "--pairs=3"]) == 0
    assert "| evaluation | dtps_vit_mini_patch4_28 | keep=0.5 at=1 | jax | 2 |" in capsys.readouterr().out
    rows = bench_suite.read(tmp_path / "speed.csv")
    assert [(row["model"].partition("_")[0], row["batch"]) for row in rows] == [
        ("vit", "1"),
        ("dtps", "1"),
        ("vit", "2"),
        ("dtps", "2"),
    ]
    assert rows[1]["command"].endswith("--set heads=2 --pairs=3") and "jax " in rows[1]["versions"]
    assert float(rows[1]["speed_up"]) == 1.5 and rows[0]["share_of_ideal"] == ""
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert "no command of the suite contains 'zz'" in fails(capsys, 1, "--suite", "--only=zz")


def test_the_commands_of_the_suite_parse():
    parser = bench.cli.Parser("bench", "")
    bench.arguments(parser)
    for command in bench_suite.COMMANDS:
        args = parser.parse_args(shlex.split(command))
        assert dyntoken.create_model(args.name, **bench.cli.overrides(args))


def test_the_table_of_the_docs_is_that_of_the_file():
    root = pathlib.Path(__file__).resolve().parents[2]
    text = (root / "docs" / "speed.md").read_text()
    file = root / "results" / "speed.csv"
    shown = bench_suite.markdown(bench_suite.read(file)) if file.exists() else bench_suite.NOT_YET
    assert text.split(bench_suite.START)[1].split(bench_suite.END)[0] == shown


def test_a_program_is_timed_as_it_is():
    program = timing.Program(lambda a, b: a + b, (1, 2))
    assert program() == 3 and dataclasses.replace(program, args=(2, 2))() == 4
