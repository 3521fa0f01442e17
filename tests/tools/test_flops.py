"""The tables and the JSON of `tools.flops`."""

from __future__ import annotations

import json

from dyntoken.tools import flops

MINI = ["--set", "depth=6", "--set", "width=64", "--set", "heads=2"]


def run(capsys, *argv):
    assert flops.main(list(argv)) == 0
    return capsys.readouterr().out


def test_json_of_a_reduced_model(capsys):
    got = json.loads(run(capsys, "dtps_deit_small_patch16_224", "--keep=0.7", "--at=3,6,9", "--json"))
    assert abs(got["gmacs"] - 2.992) < 6e-4
    assert got["params"] == 22_774_414
    assert got["tokens"] == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3
    assert (got["keep"], got["at"], got["image"]) == ([137, 96, 67], [3, 6, 9], [224, 224, 3])
    assert got["conv"] + got["dot"] == round(got["gmacs"] * 1e9) == sum(got["modules"].values())
    assert [block["name"] for block in got["blocks"]][:2] == [
        "backbone/trunk/blocks_0",
        "backbone/trunk/blocks_1",
    ]
    assert [stage["blocks"] for stage in got["stages"]][1] == [3, 4, 5]


def test_counts_given_as_ints_are_the_counts(capsys):
    got = json.loads(run(capsys, "topk_vit_mini_patch4_28", "--keep=40,20", "--at=2,3", *MINI, "--json"))
    assert got["keep"] == [40, 20]
    assert got["tokens"] == [50] * 3 + [41] + [21] * 2
    assert [b["tokens_out"] for b in got["blocks"]] == [50, 50, 41, 21, 21, 21]


def test_img_size_fuse_and_other_keywords(capsys):
    common = ["--img_size=16x32", "--at=4", "--keep=0.5", "--set", "num_classes=0", *MINI, "--json"]
    squeeze, mean, drop = (
        json.loads(run(capsys, "dtps_vit_mini_patch4_28", f"--fuse={fuse}", *common))
        for fuse in ("squeeze", "mean", "drop")
    )
    assert squeeze["tokens"] == [33] * 4 + [17] * 2
    assert squeeze["dot"] - drop["dot"] == mean["dot"] - drop["dot"] == 2 * 16 * 16 * 64
    assert not any(path.startswith("head") for path in drop["modules"])


def test_tables_for_people(capsys):
    text = run(capsys, "evit_deit_tiny_patch16_224")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert text.startswith(
        "evit_deit_tiny_patch16_224: image 224 x 224 x 3, 138, 98, 70 patch tokens stay at"
    )
    assert lines["blocks_3"][1:4] == ["197", ">", "140"]
    assert lines["total"][-2:] == ["5.72", "M"]
    assert lines["3"][1:3] == ["72", "9-11"]  # the last stage
    assert "stage" not in run(capsys, "deit_tiny_patch16_224")
