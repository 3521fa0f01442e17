"""DVT on DeiT: exits on growing token grids that reuse one another, from scratch.

    python -m dyntoken.main --config=configs/dvt_deit.py --workdir=runs/dvt_deit_s
    python -m dyntoken.main --config=configs/dvt_deit.py:size=t,exits=4-7-14,distill=1
    python -m dyntoken.main --config=configs/dvt_deit.py:relation_reuse=false --config.losses.ce.weights=0.5,1.0,1.0
    python -m dyntoken.main --config=configs/dvt_deit.py:demo --workdir=runs/dvt_demo
    python -m dyntoken.main --config=configs/dvt_deit.py:tiny

Published (NeurIPS 2021, DVT(DeiT-S), 224 px, mean GMACs over the images at tuned
thresholds): 79.3 at 2.37, 80.4 at 2.90, 81.2 at 3.61, 81.67 at 4.63. The paper also
uses the exits 7-14, 7-10 and 4-7-14. On ImageNet: not yet run.

Follows the defaults of blackfeather-wang/Dynamic-Vision-Transformer's main.py,
which gives no command for DeiT: cross-entropy of all exits with equal weights,
batch 8 x 64, learning rate 5e-4, not scaled with it; weight decay 0.05 on all
matrices, class token and position embedding included; 20 epochs of warm-up, a
cosine over 300 epochs and 10 more at its end; stochastic depth 0.1, EMA 0.99996, no
clipping. Crop, flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25),
mixup, cutmix and smoothing are its own; no repeated augmentation. What differs: it
draws bilinear or bicubic interpolation per image, here all is bicubic.
`distill` weighs our addition, KL from the last exit to the earlier ones.
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `exits=`, `feature_reuse=`, `relation_reuse=`, `distill=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", **common.DVT, **common.TOY)
    c = common.base()
    c.model.name = "dvt_" + common.deit_name(arg).removesuffix("_patch16_224")
    c.batch = 512
    common.dvt(c, arg, {"lr": 5e-4, "weight_decay": 0.05})
    common.deit_augment(c, repeats=1)
    if arg.demo:
        toys.demo_dvt(c, arg, name="dvt_vit_mini", stem="conv")
    if arg.tiny:
        toys.tiny_dvt(c)
    return c
