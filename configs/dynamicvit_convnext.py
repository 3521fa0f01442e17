"""DynamicViT on ConvNeXt, 120 epochs from a dense ConvNeXt, which is also the teacher.

    python -m dyntoken.main --config=configs/dynamicvit_convnext.py --workdir=runs/dynamicvit_convnext_t
    python -m dyntoken.main --config=configs/dynamicvit_convnext.py:size=s,keep=0.9
    python -m dyntoken.main --config=configs/dynamicvit_convnext.py:demo
    python -m dyntoken.main --config=configs/dynamicvit_convnext.py:tiny

One argument per published row (raoyongming/DynamicViT, README; 224 px); GMACs as
`tools.flops` counts them. Dense (facebookresearch/ConvNeXt): T 82.1 at 4.456, S 83.1
at 8.684, B 83.8 at 15.355. On ImageNet: not yet run.

    argument         GMACs   top-1
    size=t,keep=0.7  3.579   81.59
    size=t,keep=0.9  3.908   82.06
    size=s,keep=0.7  5.771   82.57
    size=s,keep=0.9  6.759   83.12
    size=b,keep=0.7  10.177  83.45
    size=b,keep=0.9  11.934  83.96

No cell leaves its grid: of the 196 of the third stage the kept ones (rates r, r - 0.2,
r - 0.4 from blocks 1, 2, 3; in S and B 3, 6, 9) go through the MLP, the others through
one linear layer. `common.dual_path` says what the recipe is.

`demo` trains a small ConvNeXt from scratch on the embedded images, 6 epochs: 84.30 %
top-1 after 2 min 1 s on 2 cores.
"""

from configs import common, toys

DROP_PATH = {"t": 0.2, "s": 0.2, "b": 0.5}
DEMO = {"patch_size": 2, "widths": (16, 32, 64), "depths": (1, 1, 3), "kernel": 5, "layer_scale": 0.1}
TINY = {"patch_size": 2, "widths": (8, 8, 16), "depths": (1, 1, 3), "kernel": 3}


def get_config(arg=None):
    """`size=t|s|b`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="t", **common.REDUCED)
    common.one_of(arg, size=DROP_PATH)
    c = common.dense(f"convnext_{common.SIZES[arg.size]}")
    c.model.drop_path = DROP_PATH[arg.size]
    common.dual_path(c)
    return toys.finish_dual_path(c, arg, small=DEMO, toy=TINY)
