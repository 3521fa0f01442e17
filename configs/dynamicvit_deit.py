"""DynamicViT on DeiT, 30 epochs from a dense DeiT, which is also the teacher.

    python -m dyntoken.main --config=configs/dynamicvit_deit.py --workdir=runs/dynamicvit_deit_s
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:size=b,keep=0.7
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:demo
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:tiny

One argument per published row; GMACs as `tools.flops` counts them. [P] the paper
(NeurIPS 2021), [T] read off the main figure of TPS (CVPR 2023). On ImageNet: not yet run.

    argument                     GMACs   top-1
    keep=0.9                     4.041   79.8 [P]
    keep=0.8                     3.463   79.6 [P]
    keep=0.7                     2.981   79.3 [P], 79.42 [T]
    keep=0.6                     2.565   78.5 [P]
    keep=0.5                     2.229   77.5 [P], 78.12 [T]
    keep=0.7,at=3-5-7-9          2.696   79.17 [T]
    keep=0.7,at=2-4-6-8          2.404   78.67 [T]
    keep=0.5,at=3-5-7-9          1.986   76.58 [T]
    keep=0.5,at=2-4-6-8          1.631   73.54 [T]
    keep=0.7,distill=false       2.981   79.2 [P]
    size=t,keep=0.7              0.801   71.38 [T]
    size=t,keep=0.7,at=3-5-7-9   0.725   70.88 [T]
    size=t,keep=0.7,at=2-4-6-8   0.645   69.96 [T]
    size=t,keep=0.5              0.602   68.53 [T]
    size=t,keep=0.5,at=3-5-7-9   0.539   65.57 [T]
    size=t,keep=0.5,at=2-4-6-8   0.442   61.41 [T]
    size=b,keep=0.7             11.476   81.3 [P]
    pixels=384,keep=0.7          9.652   81.4 [P]
    pixels=384,keep=0.5          7.187   80.3 [P]
    inat=true,keep=0.7            2.98   no number found

Follows raoyongming/DynamicViT: learning rate 1e-3 at batch 1024, not scaled
with it; the backbone frozen for 5 epochs, then at 0.01 of that rate; class token
and position embedding never updated; EMA 0.9999. DeiT-B weighs the keep-ratio
loss 5. Crop, flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), mixup,
cutmix and smoothing are its own, those of DeiT; it has no repeated augmentation, and
timm drops its colour jitter beside RandAugment. What differs: mixup pairs
neighbouring images. For 384 pixels and iNaturalist 2019 the recipe is the same: the
paper gives no other; both start from a dense DeiT of that kind
(`configs/deit.py:pixels=384`, `:inat`).
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `pixels=224|384`, `inat`, `keep=`, `at=`, `distill=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, **common.DEIT, **common.REDUCED, distill="auto")
    c = common.deit(arg)
    common.dynamicvit(c, lr=1e-3, min_lr=1e-6)
    c.losses = {
        "ce": {"weight": 1.0},
        "keep_ratio": {"weight": 5.0 if arg.size == "b" else 2.0, "divisor": 3},
    }
    if common.distilled(arg):
        c.losses.logit_kl = {"weight": 0.5}
        c.losses.token_distill = {"weight": 0.5, "variant": "mse"}
    return toys.finish(c, arg, "dynamicvit")
