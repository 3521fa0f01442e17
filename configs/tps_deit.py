"""TPS on DeiT: dTPS (predictor) and eTPS (class attention), 30 epochs from a dense DeiT.

    python -m dyntoken.main --config=configs/tps_deit.py --workdir=runs/dtps_deit_s
    python -m dyntoken.main --config=configs/tps_deit.py:variant=etps,size=t,keep=0.5,at=2-4-6-8
    python -m dyntoken.main --config=configs/tps_deit.py:demo --workdir=runs/demo
    python -m dyntoken.main --config=configs/tps_deit.py:cifar10 --workdir=runs/dtps_cifar10
    python -m dyntoken.main --config=configs/tps_deit.py:tiny

Published (CVPR 2023, main figure, 224 px, 30 epochs), keep 0.7 at blocks 3-6-9:
dTPS-DeiT-S 79.67 at 2.99 GMACs, eTPS-DeiT-S 79.66 at 3.01, dTPS-DeiT-T 71.89 at
0.81. On ImageNet: not yet run.

Follows megvii-research/TPS-CVPR2023 (torch): batch 1024, learning rate
2.5e-4 x batch / 1024, weight decay 0.05 on every parameter, EMA 0.99996; the
tiny model trains without distillation. Crop, flip, RandAugment
(rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3 views), mixup,
cutmix and smoothing are its own, those of DeiT; timm drops its colour jitter beside
RandAugment. What differs: mixup pairs neighbouring images. eTPS has no official
recipe: this is dTPS's without the keep-ratio loss.

`cifar10` trains a small ViT for 32 x 32 pixels with the reduction from scratch on
the real CIFAR-10, as TFDS prepares it under $TFDS_DATA_DIR (`tfds build cifar10`);
nothing like it is published. 100 epochs: not yet run.
"""

from configs import common


def get_config(arg=None):
    """`variant=dtps|etps`, `size=t|s|b`, `keep=`, `at=`, `demo`, `cifar10`, `tiny`."""
    arg = common.parse_arg(
        arg, variant="dtps", size="s", keep=0.0, at=(), demo=False, cifar10=False, tiny=False
    )
    if arg.variant not in ("dtps", "etps"):
        raise ValueError(f"variant={arg.variant} is not one of dtps, etps")
    c = common.base()
    c.model.name = common.deit_name(arg.size)
    c.init.path = f"weights/{c.model.name}.safetensors"
    common.tps(c, arg.variant, distill=arg.size != "t")
    if arg.demo:
        common.demo(c)
        arg.at = arg.at or common.DEMO_SITES
        c.compare = True
    if arg.cifar10:
        common.cifar10(c)
        arg.at = arg.at or common.CIFAR_SITES
    if arg.tiny:
        common.tiny(c)
        c.optim.warmup_epochs = 0
    common.from_dense(c, arg.variant, arg.keep or (0.5 if arg.demo else 0.7), arg.at)
    return c
