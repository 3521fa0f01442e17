"""DVT on T2T-ViT: exits on growing token grids that reuse one another, from scratch.

    python -m dyntoken.main --config=configs/dvt_t2t.py --workdir=runs/dvt_t2t_12
    python -m dyntoken.main --config=configs/dvt_t2t.py:depth=14 --workdir=runs/dvt_t2t_14
    python -m dyntoken.main --config=configs/dvt_t2t.py:exits=7-14,feature_reuse=false
    python -m dyntoken.main --config=configs/dvt_t2t.py:demo --workdir=runs/dvt_t2t_demo
    python -m dyntoken.main --config=configs/dvt_t2t.py:tiny

Published (NeurIPS 2021, 224 px), exits 7-10-14. T2T-ViT-12, each exit alone: 69.04 at
0.47 GMACs, 75.65 at 1.46, 80.00 at 3.50; mean over the images at tuned thresholds:
73.70 at 0.75, 76.22 at 1.00, 78.89 at 1.50, 79.75 at 2.00. T2T-ViT-14: 79.24 at 2.0,
81.47 at 3.0, 82.42 at 4.0. On ImageNet: not yet run.

Follows blackfeather-wang/Dynamic-Vision-Transformer: cross-entropy of all exits
with equal weights; T2T-ViT-12 with batch 8 x 128, learning rate 2e-3 and weight
decay 0.03, T2T-ViT-14 with 8 x 64, 5e-4 and 0.05 (what we give the others, too); the
rate does not scale with the batch. Class tokens are decayed, the sinusoid and the
performer's random features are fixed. 20 epochs of warm-up, a cosine over 300
epochs and 10 more at its end; stochastic depth 0.1, EMA 0.99996, no clipping. Crop,
flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), mixup, cutmix and
smoothing are its own; no repeated augmentation. What differs: it draws bilinear or
bicubic interpolation per image, here all is bicubic. `distill` weighs our
addition, KL from the last exit to the earlier ones.
"""

from configs import common, toys

DEPTHS = (7, 10, 12, 14, 19, 24)


def get_config(arg=None):
    """`depth=12|14|...`, `exits=`, `feature_reuse=`, `relation_reuse=`, `distill=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, depth=12, **common.DVT, **common.TOY)
    common.one_of(arg, depth=DEPTHS)
    c = common.base()
    c.model.name = f"dvt_t2t_vit_{arg.depth}"
    c.batch = 1024 if arg.depth == 12 else 512
    rates = {"lr": 2e-3, "weight_decay": 0.03} if arg.depth == 12 else {"lr": 5e-4, "weight_decay": 0.05}
    common.dvt(c, arg, {**rates, "frozen": common.T2T_FROZEN})
    common.deit_augment(c, repeats=1)
    if arg.demo:  # no T2T weights ship with the package: from scratch
        small = {"width": 64, "depth": 4, "heads": 2, "token_dim": 16}
        toys.demo_dvt(c, arg, start=False, name="dvt_t2t_vit_7", **small)
    if arg.tiny:
        toys.tiny_dvt(c, token_dim=8)
    return c
