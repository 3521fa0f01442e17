"""TPS on CvT: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense CvT.

    python -m dyntoken.main --config=configs/tps_cvt.py --workdir=runs/dtps_cvt_13
    python -m dyntoken.main --config=configs/tps_cvt.py:variant=etps,size=21,keep=0.5
    python -m dyntoken.main --config=configs/tps_cvt.py:at=1-2,dropped=last
    python -m dyntoken.main --config=configs/tps_cvt.py:demo
    python -m dyntoken.main --config=configs/tps_cvt.py:tiny

Published (microsoft/CvT, dense, 224 px): CvT-13 81.6 at 4.5 GMACs, CvT-21 82.5 at 7.1;
W24 87.6 at 193 with 384 px, from ImageNet-22k. With TPS: no number found, not yet run.

The paper reduces tokens in the first block of each stage; its appendix and its code
for CvT are in no public place that we know. `at` counts stages, from 0, and each starts
from its whole grid again, of which a share `keep` stays. eTPS ranks by the class token,
which joins in the last stage: `at=2`. Queries, keys and values come from convolutions
of the whole map, where a dropped token is 0, or its last value with `dropped=last`;
the BatchNorm behind them shifts those zeros.

megvii-research/TPS-CVPR2023 holds DeiT only. This is its recipe for DeiT: batch 1024,
learning rate 2.5e-4 x batch / 1024, weight decay 0.05 on every parameter, EMA 0.99996,
distillation from the dense model; eTPS without the keep-ratio loss. Crop, flip,
RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3
views), mixup, cutmix and smoothing are that recipe's, too. Training compares all 3,136
tokens of the first stage with each other, 39 MB per image: `at=1-2` leaves it alone.

`demo` trains a small CvT from scratch on the embedded images, 6 epochs: 80.35 %
top-1 after 2 min 47 s on 2 cores.
"""

from configs import common, toys

SIZES = {"13": 224, "21": 224, "w24": 384}  # pixels
TWO = {"heads": (1, 2), "mlp_ratios": (4, 4), "kernels": (3, 3), "kv_strides": (2, 2)}
TWO |= {"kv_paddings": (1, 1), "class_tokens": (False, True)}
DEMO = {"widths": (64, 128), "depths": (1, 2), **TWO}  # 7 x 7 patches, then 4 x 4
DEMO |= {"patch_sizes": (7, 3), "patch_strides": (4, 2), "patch_paddings": (2, 1)}
TINY = {"widths": (8, 16), "depths": (1, 1), **TWO}
TINY |= {"patch_sizes": (3, 3), "patch_strides": (2, 2), "patch_paddings": (1, 1)}


def get_config(arg=None):
    """`variant=dtps|etps`, `size=13|21|w24`, `keep=`, `at=`, `dropped=zero|last`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="13", **common.REDUCED, variant="dtps", dropped="zero")
    common.one_of(arg, size=SIZES)
    c = common.dense(f"cvt_{arg.size}")
    c.data.size = SIZES[arg.size]
    c.data.eval.crop_pct = 0.875 if c.data.size == 224 else 1.0
    common.tps(c, arg)
    return toys.finish_stages(c, arg, small=DEMO, toy=TINY)
