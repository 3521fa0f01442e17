"""TPS on PVT v1: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense PVT.

    python -m dyntoken.main --config=configs/tps_pvt.py --workdir=runs/dtps_pvt_small
    python -m dyntoken.main --config=configs/tps_pvt.py:variant=etps,size=tiny,keep=0.5
    python -m dyntoken.main --config=configs/tps_pvt.py:at=1-2-3,dropped=last
    python -m dyntoken.main --config=configs/tps_pvt.py:demo
    python -m dyntoken.main --config=configs/tps_pvt.py:tiny

Published (whai362/PVT, dense, 224 px): Tiny 75.1 at 1.9 GMACs, Small 79.8 at 3.8,
Medium 81.2 at 6.7, Large 81.7 at 9.8. With TPS: no number found, not yet run.

The paper reduces tokens in the first block of each stage; its appendix and its code
for PVT are in no public place that we know. `at` counts stages, from 0, and each starts
from its whole grid again, of which a share `keep` stays. eTPS ranks by the class token,
which joins in the last stage: `at=3`. `dropped=last` lets the maps that keys and the next
stage come from show a dropped token's last value instead of 0.

megvii-research/TPS-CVPR2023 holds DeiT only. This is its recipe for DeiT: batch 1024,
learning rate 2.5e-4 x batch / 1024, weight decay 0.05 on every parameter, EMA 0.99996,
distillation from the dense model; eTPS without the keep-ratio loss. Crop, flip,
RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3
views), mixup, cutmix and smoothing are that recipe's, too. Training compares all 3,136
tokens of the first stage with each other, 39 MB per image: `at=1-2-3` leaves it alone.

`demo` trains a small PVT from scratch on the embedded images, reduced in its last stage
to 8 of 16 patches, 10 epochs: 80.50 % top-1 after 4 min 14 s on 2 cores.
"""

from configs import common, toys

SIZES = ("tiny", "small", "medium", "large")
DEMO = {"patch_size": 4, "widths": (64, 128), "depths": (2, 2), "heads": (1, 2)}
DEMO |= {"mlp_ratios": (4, 4), "sr_ratios": (2, 1)}
TINY = {"patch_size": 2, "widths": (8, 16), "depths": (1, 1), "heads": (1, 2)}
TINY |= {"mlp_ratios": (2, 2), "sr_ratios": (2, 1)}


def get_config(arg=None):
    """`variant=dtps|etps`, `size=tiny|small|medium|large`, `keep=`, `at=`, `dropped=zero|last`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="small", **common.REDUCED, variant="dtps", dropped="zero")
    common.one_of(arg, size=SIZES)
    c = common.dense(f"pvt_{arg.size}")
    common.tps(c, arg)
    # A fresh PVT, without convolutions, learns slowly from holes in its maps: the demo's last stage alone.
    toys.finish_stages(c, arg, small=DEMO, toy=TINY, sites=(1,))
    if arg.demo:
        c.data.size = 32  # patches of 4 pixels, 8 x 8 of them, then 4 x 4
        c.data.eval.crop_pct = 1.0  # training sees whole images
        c.epochs = 10.0
    return c
