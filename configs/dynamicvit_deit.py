"""DynamicViT on DeiT, 30 epochs from a dense DeiT, which is also the teacher.

    python -m dyntoken.main --config=configs/dynamicvit_deit.py --workdir=runs/dynamicvit_deit_s
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:size=b,keep=0.7
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:demo
    python -m dyntoken.main --config=configs/dynamicvit_deit.py:tiny

Published (NeurIPS 2021, 224 px): DeiT-S 0.9 / 0.8 / 0.7 / 0.6 / 0.5: 79.8 /
79.6 / 79.3 / 78.5 / 77.5 at 4.0 / 3.4 / 2.9 / 2.5 / 2.2 GMACs; DeiT-B 0.7 81.3
at 11.2. On ImageNet: not yet run.

Follows raoyongming/DynamicViT: learning rate 1e-3 at batch 1024, not scaled
with it; the backbone frozen for 5 epochs, then at 0.01 of that rate; class token
and position embedding never updated; EMA 0.9999. DeiT-B weighs the keep-ratio
loss 5. Crop, flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), mixup,
cutmix and smoothing are its own, those of DeiT; it has no repeated augmentation, and
timm drops its colour jitter beside RandAugment. What differs: mixup pairs
neighbouring images.
"""

from configs import common


def get_config(arg=None):
    """`size=t|s|b`, `keep=`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", keep=0.0, at=(), demo=False, tiny=False)
    c = common.base()
    c.model.name = common.deit_name(arg.size)
    c.init.path = f"weights/{c.model.name}.safetensors"
    c.ema = 0.9999
    common.deit_augment(c, repeats=1)
    c.losses = {
        "ce": {"weight": 1.0},
        "keep_ratio": {"weight": 5.0 if arg.size == "b" else 2.0, "divisor": 3},
        "logit_kl": {"weight": 0.5},
        "token_distill": {"weight": 0.5, "variant": "mse"},
    }
    c.optim = {
        "lr": 1e-3,
        "min_lr": 1e-6,
        "schedule": "cosine",
        "warmup_epochs": 5,
        "warmup_lr": 0.0,
        "weight_decay": 0.05,
        "decay": "not_1d",
        "backbone_freeze_epochs": 5,
        "backbone_lr_scale": 0.01,
        "frozen": ("cls_token", "pos_embed"),
    }
    if arg.demo:
        common.demo(c)
        arg.at = arg.at or common.DEMO_SITES
        c.compare = True
    if arg.tiny:
        common.tiny(c)
        c.optim.warmup_epochs = 0
    common.from_dense(c, "dynamicvit", arg.keep or (0.5 if arg.demo else 0.7), arg.at)
    return c
