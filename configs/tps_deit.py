"""TPS on DeiT: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense DeiT.

    python -m dyntoken.main --config=configs/tps_deit.py --workdir=runs/dtps_deit_s
    python -m dyntoken.main --config=configs/tps_deit.py:variant=etps,size=t,keep=0.5,at=2-4-6-8
    python -m dyntoken.main --config=configs/tps_deit.py:demo --workdir=runs/demo
    python -m dyntoken.main --config=configs/tps_deit.py:cifar10 --workdir=runs/dtps_cifar10
    python -m dyntoken.main --config=configs/tps_deit.py:tiny

One argument per published row; GMACs as `tools.flops` counts them; top-1 read off the
main figure of the paper (CVPR 2023). On ImageNet: not yet run.

    argument                                  GMACs   top-1
    keep=0.7                                  2.992   79.67
    keep=0.7,at=3-5-7-9                       2.707   79.47
    keep=0.7,at=2-4-6-8                       2.415   79.23
    keep=0.5                                  2.239   78.97
    keep=0.5,at=3-5-7-9                       1.996   78.09
    keep=0.5,at=2-4-6-8                       1.641   76.98
    size=t,keep=0.7                           0.807   71.89
    size=t,keep=0.7,at=3-5-7-9                0.731   71.48
    size=t,keep=0.7,at=2-4-6-8                0.651   70.99
    size=t,keep=0.5                           0.606   70.56
    size=t,keep=0.5,at=3-5-7-9                0.543   69.03
    size=t,keep=0.5,at=2-4-6-8                0.447   67.17
    variant=etps,keep=0.7                     3.008   79.66
    variant=etps,keep=0.7,at=3-5-7-9          2.720   79.46
    variant=etps,keep=0.7,at=2-4-6-8          2.431   79.14
    variant=etps,keep=0.5                     2.292   79.16
    variant=etps,keep=0.5,at=3-5-7-9          2.055   78.45
    variant=etps,keep=0.5,at=2-4-6-8          1.701   77.48
    variant=etps,size=t,keep=0.7              0.817   72.27
    variant=etps,size=t,keep=0.7,at=3-5-7-9   0.741   71.93
    variant=etps,size=t,keep=0.7,at=2-4-6-8   0.662   71.40
    variant=etps,size=t,keep=0.5              0.627   71.40
    variant=etps,size=t,keep=0.5,at=3-5-7-9   0.566   70.30
    variant=etps,size=t,keep=0.5,at=2-4-6-8   0.470   68.50
    size=b,keep=0.7                          11.497   no number found
    variant=etps,size=b,keep=0.7             11.507   no number found
    pixels=384,keep=0.7                       9.744   no number found
    variant=etps,pixels=384,keep=0.7          9.915   no number found
    keep=0.7,distill=false                    2.992   no number found
    inat=true,keep=0.7                         2.99   no number found

Follows megvii-research/TPS-CVPR2023 (torch): batch 1024, learning rate
2.5e-4 x batch / 1024, weight decay 0.05 on every parameter, EMA 0.99996; the
tiny model trains without distillation. Crop, flip, RandAugment
(rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3 views), mixup,
cutmix and smoothing are its own, those of DeiT; timm drops its colour jitter beside
RandAugment. What differs: mixup pairs neighbouring images. eTPS has no official
recipe: this is dTPS's without the keep-ratio loss. DeiT-B, 384 pixels and iNaturalist
2019 are trained alike, from a dense DeiT of that kind (`configs/deit.py:pixels=384`,
`:inat`).

`form=gather` trains dTPS on rows that really leave, without the keep-ratio loss (docs/training.md); not published.

`cifar10` trains a small ViT for 32 x 32 pixels with the reduction from scratch on
the real CIFAR-10, as TFDS prepares it under $TFDS_DATA_DIR (`tfds build cifar10`);
nothing like it is published. 100 epochs: not yet run.
"""

from configs import common, toys


def get_config(arg=None):
    """`variant=dtps|etps`, `size=t|s|b`, `pixels=`, `inat`, `keep=`, `at=`, `form=`, `distill=`, `cifar10`, a toy."""
    switches = {"variant": "dtps", "distill": "auto", "cifar10": False}
    arg = common.parse_arg(arg, **common.DEIT, **common.REDUCED, **switches)
    c = common.deit(arg)
    common.tps(c, arg, distill=common.distilled(arg, auto=arg.size != "t"))
    if arg.cifar10:
        toys.cifar10(c)
        arg.at = arg.at or toys.CIFAR_SITES
    return toys.finish(c, arg, arg.variant)
