"""EViT on DeiT: 30 epochs from a dense DeiT, or 300 from scratch, without a teacher.

    python -m dyntoken.main --config=configs/evit_deit.py --workdir=runs/evit_deit_s
    python -m dyntoken.main --config=configs/evit_deit.py:keep=0.5,fuse=false
    python -m dyntoken.main --config=configs/evit_deit.py:scratch,keep=0.7 --workdir=runs/evit_deit_s_scratch
    python -m dyntoken.main --config=configs/evit_deit.py:demo
    python -m dyntoken.main --config=configs/evit_deit.py:tiny

One argument per published row; GMACs as `tools.flops` counts them. [R] the model zoo of
youweiliang/evit, [T] read off the main figure of TPS (CVPR 2023). On ImageNet: not yet run.

    argument                     GMACs   top-1
    keep=0.9                     4.022   79.8 [R]
    keep=0.8                     3.477   79.8 [R]
    keep=0.7                     3.029   79.5 [R], 79.51 [T]
    keep=0.6                     2.635   78.9 [R]
    keep=0.5                     2.309   78.5 [R], 78.67 [T]
    keep=0.9,fuse=false          3.988   79.9 [R]
    keep=0.8,fuse=false          3.444   79.7 [R]
    keep=0.7,fuse=false          2.997   79.4 [R]
    keep=0.6,fuse=false          2.608   79.1 [R]
    keep=0.5,fuse=false          2.282   78.4 [R]
    keep=0.7,at=3-5-7-9          2.746   79.22 [T]
    keep=0.7,at=2-4-6-8          2.462   78.70 [T]
    keep=0.5,at=3-5-7-9          2.073   77.50 [T]
    keep=0.5,at=2-4-6-8          1.723   76.18 [T]
    size=t,keep=0.7              0.821   71.92 [T]
    size=t,keep=0.7,at=3-5-7-9   0.745   71.42 [T]
    size=t,keep=0.7,at=2-4-6-8   0.667   70.39 [T]
    size=t,keep=0.5              0.629   70.12 [T]
    size=t,keep=0.5,at=3-5-7-9   0.568   68.99 [T]
    size=t,keep=0.5,at=2-4-6-8   0.473   66.28 [T]

Follows youweiliang/evit's fine-tuning: batch 2048, learning rate 2e-5 x batch /
512, weight decay 1e-6, no warm-up, dropout layers off, EMA 0.99996. Tokens are
really dropped in training, so the steps are cheaper than dense ones. Crop, flip,
RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3
views), mixup, cutmix and smoothing are its own, those of DeiT; timm drops its colour
jitter beside RandAugment. What differs: mixup pairs neighbouring images.

`scratch` is the repository's run_code.sh: 300 epochs at batch 1024, learning rate 5e-4 x
batch / 512, weight decay 0.05, stochastic depth 0.1. Every token stays for 10 epochs,
then the keep rate falls by a cosine until epoch 110. What differs: it falls in 5 levels,
one compilation each (there at every step), and evaluations drop what the final model does.
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `pixels=224|384`, `inat`, `keep=`, `at=`, `fuse=true|false`, `scratch`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, **common.DEIT, **common.REDUCED, fuse=True, scratch=False)
    c = common.deit(arg)
    c.batch = 2048
    c.ema = 0.99996
    common.deit_augment(c)
    c.losses = {"ce": {"weight": 1.0}}
    if arg.scratch:
        c.batch = 1024
        c.epochs = 300.0
        c.init.path = ""
        c.model.drop_path = 0.1
        c.keep_schedule.update({"start_epoch": 10, "end_epoch": 110})
        common.timm_cosine(c, common.per_batch(c, 5e-4, 512))
    else:
        optim = {"min_lr": common.per_batch(c, 2e-6), "warmup_epochs": 0, "weight_decay": 1e-6}
        common.timm_cosine(c, common.per_batch(c, 2e-5, 512), **optim)
    toys.finish(c, arg, "evit" if arg.fuse else "topk")
    if arg.tiny and arg.scratch:
        c.keep_schedule.update({"start_epoch": 0, "end_epoch": 1, "levels": 2})
        c.steps = 3
    return c
