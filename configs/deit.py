"""Dense DeiT: the model that every reduction starts from and is measured against.

    python -m dyntoken.main --config=configs/deit.py:size=s --workdir=runs/deit_s
    python -m dyntoken.main --config=configs/deit.py:fashion --workdir=runs/fashion_dense
    python -m dyntoken.main --config=configs/deit.py:demo
    python -m dyntoken.main --config=configs/deit.py:tiny

Published (facebookresearch/deit, 300 epochs, 224 px): T 72.2 at 1.25 GMACs, S
79.8 at 4.60, B 81.8 at 17.56. On ImageNet: not yet run. Crop, flip, RandAugment
(rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3 views),
mixup, cutmix, smoothing and stochastic depth are DeiT's. What differs: mixup pairs
neighbouring images, never two views of one, so that the result is the same on any
number of devices.

`fashion` trains the small model that ships with the package, on all 60,000
images of Fashion-MNIST (`python -m dyntoken.data.prepare_fashion_mnist` writes
them); `demo` the same on the 10,000 embedded ones.
"""

from configs import common


def get_config(arg=None):
    """`size=t|s|b`, `fashion`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", fashion=False, demo=False, tiny=False)
    c = common.base()
    c.model.name = common.deit_name(arg.size)
    c.model.drop_path = 0.1
    common.deit_augment(c)
    c.epochs = 300.0
    c.ema = 0.99996
    c.losses = {"ce": {"weight": 1.0}}
    c.optim = {
        "lr": c.get_ref("batch").to_float() * (5e-4 / 512),
        "min_lr": 1e-5,
        "schedule": "cosine_epoch",
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "weight_decay": 0.05,
        "decay": "not_1d",
    }
    if arg.demo or arg.fashion:
        common.demo(c)
        c.init.path = ""
        c.optim.update({"lr": 1.5e-3, "warmup_epochs": 0.3, "backbone_lr_scale": 1.0})
        c.epochs = 8.0
    if arg.fashion:
        c.data.name = "fashion_mnist"
        c.batch = 120
        c.data.augment = {"crop": "pad", "pad": 1, "flip": 0.0}
        c.epochs = 6.0
        c.log_steps = 50
        c.eval_epochs = 1.0
        c.checkpoint_steps = 500
    if arg.tiny:
        common.tiny(c)
        c.optim.warmup_epochs = 0
    return c
