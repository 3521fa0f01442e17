"""DynamicViT on LV-ViT, 30 epochs from a dense LV-ViT, which is also the teacher.

    python -m dyntoken.main --config=configs/dynamicvit_lvvit.py --workdir=runs/dynamicvit_lvvit_s
    python -m dyntoken.main --config=configs/dynamicvit_lvvit.py:size=m,keep=0.8
    python -m dyntoken.main --config=configs/dynamicvit_lvvit.py:demo
    python -m dyntoken.main --config=configs/dynamicvit_lvvit.py:tiny

One argument per published row (NeurIPS 2021, 224 px); GMACs as `tools.flops` counts
them. Dense: S 83.3 at 6.551, M 84.0 at 12.678. On ImageNet: not yet run.

    argument         GMACs   top-1
    keep=0.7         4.650   83.0
    keep=0.5         3.790   82.0
    size=m,keep=0.8  9.783   83.9
    size=m,keep=0.7  8.593   83.8

Follows raoyongming/DynamicViT: batch 512 (S) or 384 (M), learning rate 1e-3 x
batch / 1024 (the paper's rule); the backbone frozen for 5 epochs, then at 0.01 of that rate; class
token and position embedding never updated; EMA 0.9999. Distillation compares the
auxiliary logits of the tokens that are left, and the teacher's class logits
without its auxiliary head; no MixToken. Crop, flip, RandAugment
(rand-m9-mstd0.5-inc1), random erasing (0.25), mixup, cutmix and smoothing are its
own, those of DeiT; it has no repeated augmentation, and timm drops its colour jitter
beside RandAugment. What differs: mixup pairs neighbouring images.

`demo` trains a small LV-ViT from scratch on the embedded images: 81.20 % of 2,000 in 6
minutes 1 s on 2 cores.
"""

from configs import common, toys

BATCH = {"s": 512, "m": 384}


def get_config(arg=None):
    """`size=s|m`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", **common.REDUCED)
    common.one_of(arg, size=BATCH)
    c = common.dense(f"lvvit_{arg.size}")
    c.batch = BATCH[arg.size]
    c.data.eval.crop_pct = 0.9 if arg.size == "s" else 1.0
    common.dynamicvit(c, lr=common.per_batch(c, 1e-3, 1024), min_lr=common.per_batch(c, 1e-6))
    c.losses = {
        "ce": {"weight": 1.0},
        "keep_ratio": {"weight": 2.0, "divisor": 3},
        "logit_kl": {"weight": 0.5},
        "dense_distill": {"weight": 0.5},
    }
    toys.finish(c, arg, "dynamicvit", small=toys.LVVIT, toy=toys.LVVIT_TOY)
    if c.teacher.name:
        c.teacher.aux_weight = 0.0
    return c
