"""TPS on LV-ViT: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense LV-ViT.

    python -m dyntoken.main --config=configs/tps_lvvit.py --workdir=runs/dtps_lvvit_s
    python -m dyntoken.main --config=configs/tps_lvvit.py:variant=etps,size=m,keep=0.7
    python -m dyntoken.main --config=configs/tps_lvvit.py:demo
    python -m dyntoken.main --config=configs/tps_lvvit.py:tiny

One argument per published row (CVPR 2023, 224 px); GMACs as `tools.flops` counts
them; the keep rate is inferred from the 3.8 G of both. On ImageNet: not yet run.

    argument               GMACs   top-1
    keep=0.5               3.800   82.6
    variant=etps,keep=0.5  3.854   82.5

megvii-research/TPS-CVPR2023 holds no LV-ViT code. This is its recipe for DeiT:
batch 1024, learning rate 2.5e-4 x batch / 1024, weight decay 0.05 on every
parameter, EMA 0.99996, distillation from the dense model; eTPS without the
keep-ratio loss. Crop, flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing
(0.25), repeated augmentation (3 views), mixup, cutmix and smoothing are that recipe's,
too.
Distillation compares class logits: the teacher's auxiliary head is left out.

`demo` trains a small LV-ViT from scratch on the embedded images, 8 epochs: 81.50 %
top-1 after 5 min 27 s on 2 cores.
"""

from configs import common, toys

SIZES = {"t": 0.9, "s": 0.9, "m": 1.0, "l": 1.0}  # share of the image that evaluation crops


def get_config(arg=None):
    """`variant=dtps|etps`, `size=t|s|m|l`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, variant="dtps", size="s", **common.REDUCED)
    common.one_of(arg, size=SIZES)
    c = common.dense(f"lvvit_{arg.size}")
    c.data.eval.crop_pct = SIZES[arg.size]
    common.tps(c, arg)
    toys.finish(c, arg, arg.variant, keep=0.5, small=toys.LVVIT, toy=toys.LVVIT_TOY)
    if c.teacher.name:
        c.teacher.aux_weight = 0.0
    return c
