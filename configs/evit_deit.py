"""EViT on DeiT: 30 epochs from a dense DeiT, without a teacher.

    python -m dyntoken.main --config=configs/evit_deit.py --workdir=runs/evit_deit_s
    python -m dyntoken.main --config=configs/evit_deit.py:keep=0.5,fuse=false
    python -m dyntoken.main --config=configs/evit_deit.py:demo
    python -m dyntoken.main --config=configs/evit_deit.py:tiny

Published (youweiliang/evit, DeiT-S, 30 epochs, with the fused token), keep 0.9 /
0.8 / 0.7 / 0.6 / 0.5: 79.8 / 79.8 / 79.5 / 78.9 / 78.5 at 4.0 / 3.5 / 3.0 / 2.6 /
2.3 GMACs; without it 79.9 / 79.7 / 79.4 / 79.1 / 78.4. On ImageNet: not yet run.

Follows youweiliang/evit's fine-tuning: batch 2048, learning rate 2e-5 x batch /
512, weight decay 1e-6, no warm-up, dropout layers off, EMA 0.99996. Tokens are
really dropped in training, so the steps are cheaper than dense ones. Crop, flip,
RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3
views), mixup, cutmix and smoothing are its own, those of DeiT; timm drops its colour
jitter beside RandAugment. What differs: mixup pairs neighbouring images.
"""

from configs import common


def get_config(arg=None):
    """`size=t|s|b`, `keep=`, `at=`, `fuse=true|false`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", keep=0.0, at=(), fuse=True, demo=False, tiny=False)
    c = common.base()
    c.model.name = common.deit_name(arg.size)
    c.init.path = f"weights/{c.model.name}.safetensors"
    c.batch = 2048
    c.ema = 0.99996
    common.deit_augment(c)
    c.losses = {"ce": {"weight": 1.0}}
    c.optim = {
        "lr": c.get_ref("batch").to_float() * (2e-5 / 512),
        "min_lr": 2e-6,
        "schedule": "cosine_epoch",
        "warmup_epochs": 0,
        "warmup_lr": 1e-6,
        "weight_decay": 1e-6,
        "decay": "not_1d",
    }
    if arg.demo:
        common.demo(c)
        arg.at = arg.at or common.DEMO_SITES
        c.compare = True
    if arg.tiny:
        common.tiny(c)
    common.from_dense(c, "evit" if arg.fuse else "topk", arg.keep or (0.5 if arg.demo else 0.7), arg.at)
    return c
