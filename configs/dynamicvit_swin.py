"""DynamicViT on Swin, 120 epochs from a dense Swin, which is also the teacher.

    python -m dyntoken.main --config=configs/dynamicvit_swin.py --workdir=runs/dynamicvit_swin_t
    python -m dyntoken.main --config=configs/dynamicvit_swin.py:size=s
    python -m dyntoken.main --config=configs/dynamicvit_swin.py:demo
    python -m dyntoken.main --config=configs/dynamicvit_swin.py:tiny

One argument per published row (raoyongming/DynamicViT, README; 224 px); GMACs as
`tools.flops` counts them. Dense (microsoft/Swin-Transformer): T 81.2 at 4.491, S 83.2
at 8.741, B 83.5 at 15.431. On ImageNet: not yet run.

    argument         GMACs   top-1
    size=t,keep=0.7  4.041   80.91
    size=s,keep=0.7  6.846   83.21
    size=b,keep=0.7  12.063  83.43

No cell leaves its grid: of the 196 of the third stage the kept ones (rates r, r - 0.2,
r - 0.4 from blocks 1, 2, 3; in S and B 2, 4, 6) go through the MLP, the others through
one linear layer. `common.dual_path` says what the recipe is.

`demo` trains a small Swin from scratch on the embedded images, 6 epochs: 77.70 %
top-1 after 2 min 31 s on 2 cores.
"""

from configs import common, toys

DROP_PATH = {"t": 0.2, "s": 0.2, "b": 0.5}
DEMO = {"patch_size": 2, "width": 16, "depths": (1, 2, 3), "heads": (1, 2, 4), "window": 4}
TINY = {"patch_size": 2, "width": 8, "depths": (1, 1, 3), "heads": (1, 1, 2), "window": 4}


def get_config(arg=None):
    """`size=t|s|b`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="t", **common.REDUCED)
    common.one_of(arg, size=DROP_PATH)
    c = common.dense(f"swin_{common.SIZES[arg.size]}_patch4_window7_224")
    c.model.drop_path = DROP_PATH[arg.size]
    common.dual_path(c)
    return toys.finish_dual_path(c, arg, small=DEMO, toy=TINY)
