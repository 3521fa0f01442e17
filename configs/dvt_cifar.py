"""DVT on CIFAR-10 and CIFAR-100: transfer of a cascade that was trained on ImageNet.

    python -m dyntoken.main --config=configs/dvt_cifar.py --workdir=runs/dvt_cifar10
    python -m dyntoken.main --config=configs/dvt_cifar.py:data=cifar100,backbone=t2t_vit_14
    python -m dyntoken.main --config=configs/dvt_cifar.py --config.init.path=runs/dvt_t2t_12
    python -m dyntoken.main --config=configs/dvt_cifar.py:tiny

Published (NeurIPS 2021, CIFAR-10 / CIFAR-100, mean GMACs over the images at tuned
thresholds): 97.21 / 85.45 at 0.50 / 0.54, 98.19 / 89.11 at 0.77 / 1.62, 98.53 / 89.63
at 1.49 / 1.86. With ImageNet weights: not yet run.

The paper transfers "in the same way as T2T-ViT" and publishes no code for it, so
this follows yitu-opensource/T2T-ViT's transfer_learning.py with its command for
CIFAR: SGD with momentum 0.9 and weight decay 5e-4 on every parameter, batch 64,
60 epochs, cosine from 0.05 to 2e-4; everything but the heads starts at a hundredth
of that rate and ends at the same 2e-4; class tokens and final norms are not
trained there. Images are resized to 224 (bilinear), padded by 28, cropped, flipped,
and normalised with its numbers, those of CIFAR-10 for both; no smoothing, no
mixing. The losses of all exits have equal weights, as on ImageNet.
"""

from configs import common, toys


def get_config(arg=None):
    """`data=cifar10|cifar100`, `backbone=t2t_vit_12|deit_small|...`, the arguments of `dvt_t2t`, `tiny`."""
    arg = common.parse_arg(arg, data="cifar10", backbone="t2t_vit_12", **common.DVT, tiny=False)
    common.one_of(arg, data=("cifar10", "cifar100"))
    c = common.base()
    c.model.name = f"dvt_{arg.backbone}"
    common.dvt(c, arg, {})
    c.batch = 64
    c.epochs = 60.0
    c.ema = 0.0
    c.init = {"path": f"weights/{c.model.name}.safetensors", "head": "reset"}
    c.mix = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    c.data.name = arg.data
    c.data.eval_split = "test"
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    c.data.augment = {"crop": "pad", "pad": 28, "interpolation": "bilinear", "flip": 0.5}
    c.data.eval = {"crop_pct": 1.0, "interpolation": "bilinear"}
    c.optim = {
        "name": "sgd",
        "lr": 0.05,
        "min_lr": 2e-4,
        "schedule": "cosine_epoch_start",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "decay": "all",
        "new_params": ("head/",),
        "backbone_lr_scale": 0.01,
        "backbone_min_lr": 2e-4,
        "frozen": ("cls_token$", "backbone/norm/", *common.T2T_FROZEN),
    }
    if arg.tiny:
        toys.tiny_dvt(c, **({"token_dim": 8} if "t2t" in arg.backbone else {}))
        c.data.augment.pad = 2
    return c
