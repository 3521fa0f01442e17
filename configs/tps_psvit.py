"""TPS on PS-ViT: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense PS-ViT.

    python -m dyntoken.main --config=configs/tps_psvit.py --workdir=runs/dtps_psvit_b_14
    python -m dyntoken.main --config=configs/tps_psvit.py:variant=etps,size=b_18,keep=0.5
    python -m dyntoken.main --config=configs/tps_psvit.py:demo
    python -m dyntoken.main --config=configs/tps_psvit.py:tiny

Published (yuexy/PS-ViT, dense, 224 px): Ti/14 75.6 at 1.6 GMACs, B/10 80.6 at 3.1,
B/14 81.7 at 5.4, B/18 82.3 at 8.8. With TPS: no number found, not yet run.

megvii-research/TPS-CVPR2023 holds no PS-ViT code. This is its recipe for DeiT:
batch 1024, learning rate 2.5e-4 x batch / 1024, weight decay 0.05 on every
parameter, EMA 0.99996, distillation from the dense model; eTPS without the
keep-ratio loss. Crop, flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing
(0.25), repeated augmentation (3 views), mixup, cutmix and smoothing are that recipe's,
too.
`at` counts the blocks after the sampling steps.

`demo` trains a small PS-ViT from scratch on the embedded images, 3 epochs: 77.95 %
top-1 after 2 min 17 s on 2 cores.
"""

from configs import common, toys

SIZES = ("ti_14", "b_10", "b_14", "b_16", "b_18")
DEMO = {"points": 7, "width": 64, "depth": 4, "iterations": 2, "heads": 2, "stem_channels": (16, 16, 32, 16)}
TINY = {"points": 4, "depth": 2, "iterations": 2, "stem_channels": (8, 8, 16, 8)}


def get_config(arg=None):
    """`variant=dtps|etps`, `size=ti_14|b_10|b_14|b_16|b_18`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, variant="dtps", size="b_14", **common.REDUCED)
    common.one_of(arg, size=SIZES)
    c = common.dense(f"psvit_{arg.size}")
    c.data.eval.crop_pct = 0.9
    common.tps(c, arg)
    toys.finish(c, arg, arg.variant, sites=(2, 3), small=DEMO, toy=TINY)
    if arg.demo:
        c.epochs = 3.0  # its convolutional stem learns fast
    return c
