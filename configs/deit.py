"""Dense DeiT: the model that every reduction starts from and is measured against.

    python -m dyntoken.main --config=configs/deit.py:size=s --workdir=runs/deit_s
    python -m dyntoken.main --config=configs/deit.py:fashion --workdir=runs/fashion_dense
    python -m dyntoken.main --config=configs/deit.py:demo
    python -m dyntoken.main --config=configs/deit.py:tiny

One argument per published row (facebookresearch/deit); GMACs as `tools.flops` counts
them. On ImageNet: not yet run.

    argument            GMACs   top-1
    size=t              1.254   72.2
    size=s              4.599   79.9
    size=b             17.564   81.8
    size=b,pixels=384  55.484   82.9
    size=s,pixels=384  15.490   no number found
    size=b,inat=true   17.564   no number found

300 epochs at batch 1024, learning rate 5e-4 x batch / 512. Crop, flip, RandAugment
(rand-m9-mstd0.5-inc1), random erasing (0.25), repeated augmentation (3 views),
mixup, cutmix, smoothing and stochastic depth are DeiT's. What differs: mixup pairs
neighbouring images, never two views of one, so that the result is the same on any
number of devices.

`pixels=384` fine-tunes weights of 224 pixels: 30 epochs at batch 512 and the constant
rate 5e-6 x batch / 512, weight decay 1e-8 (README_deit.md). `inat` fine-tunes them on
iNaturalist 2019 with a new classifier: 360 epochs at batch 768, 7.5e-5 x batch / 768,
random erasing 0.1 (facebookresearch/deit issue 105).

`fashion` trains the small model that ships with the package, on all 60,000
images of Fashion-MNIST (`python scripts/prepare_data.py fashion_mnist`
writes them); `demo` the same on the 10,000 embedded ones.
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `pixels=224|384`, `inat`, `fashion`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, **common.DEIT, fashion=False, **common.TOY)
    c = common.deit(arg)
    c.model.drop_path = 0.1
    common.deit_augment(c)
    c.epochs = 300.0
    c.ema = 0.99996
    c.losses = {"ce": {"weight": 1.0}}
    c.init.path = ""
    dense = f"weights/{common.deit_name(arg)}.safetensors"
    rate, optim = 5e-4 / 512, {}  # per image
    if arg.pixels > 224:
        c.init.path = dense
        c.batch = 512
        c.epochs = 30.0
        rate = 5e-6 / 512
        optim = {"min_lr": common.per_batch(c, rate, 1), "weight_decay": 1e-8}
    if arg.inat:
        c.init = {"path": dense, "head": "reset"}
        c.batch = 768
        c.epochs = 360.0
        c.mix.erase = 0.1
        rate = 7.5e-5 / 768
    common.timm_cosine(c, common.per_batch(c, rate, 1), **optim)
    if arg.demo or arg.fashion:
        toys.demo(c)
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
        toys.tiny(c)
    return c
