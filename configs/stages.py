"""What the recipes of hierarchical backbones share: TPS stage by stage, DynamicViT's two paths."""

import ml_collections

from configs import common, toys

# Arguments of the recipes whose models reduce stage by stage.
STAGES = {"variant": "dtps", "keep": 0.0, "at": (), "dropped": "zero", "demo": False, "tiny": False}


def tps_stages(c, arg, demo_model, tiny_model):
    """TPS's recipe on a backbone that reduces stage by stage; `c` has the dense model, `arg` `STAGES`."""
    if arg.variant not in ("dtps", "etps"):
        raise ValueError(f"variant={arg.variant} is not one of dtps, etps")
    c.init.path = f"weights/{c.model.name}.safetensors"
    common.tps(c, arg.variant)
    if arg.demo:
        toys.demo_from_scratch(c, **demo_model)
        c.batch, c.epochs = 40, 6.0  # steps are what a fresh model needs
        c.data.eval.batch = 200
        c.log_steps = 100
        c.checkpoint_steps = 400
        # Zeros on a map are noise to what follows: without clipping a fresh model's loss rose again.
        c.optim.update({"lr": 1e-3, "clip": 1.0})
    if arg.tiny:
        name = c.model.name
        toys.tiny(c)
        c.model = ml_collections.ConfigDict({"name": name, **tiny_model})
        c.optim.warmup_epochs = 0
    common.from_dense(c, arg.variant, arg.keep or (0.5 if arg.demo else 0.7), arg.at)
    c.model.dropped = arg.dropped
    return c


def dual_path(c, arg, demo_model, tiny_model):
    """What raoyongming/DynamicViT trains Swin and ConvNeXt with; `c` has the dense model.

    120 epochs in batches of 4096, in four slices each (its `update_freq`), learning
    rate 4e-3 x batch / 4096 after 20 epochs of warm-up; the backbone frozen for 5
    epochs, then at 0.2 of that rate; EMA 0.9999; keep-ratio loss of weight 10, the KL
    of the class logits and the squared distance of the whole feature map. Crop,
    flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), mixup, cutmix and
    smoothing are its own, those of DeiT; no repeated augmentation. What differs: mixup
    pairs neighbouring images.
    """
    c.init.path = f"weights/{c.model.name}.safetensors"
    c.batch = 4096
    c.accumulate = 4
    c.epochs = 120.0
    c.ema = 0.9999
    common.deit_augment(c, repeats=1)
    c.losses = {
        "ce": {"weight": 1.0},
        "keep_ratio": {"weight": 10.0},
        "logit_kl": {"weight": 0.5},
        "token_distill": {"weight": 0.5, "variant": "mse"},
    }
    c.optim = {
        "lr": c.get_ref("batch").to_float() * (4e-3 / 4096),
        "min_lr": common.per_batch(c, 1e-6),
        "schedule": "cosine",
        "warmup_epochs": 20,
        "warmup_lr": 0.0,
        "weight_decay": 0.05,
        "decay": "not_1d",
        "backbone_freeze_epochs": 5,
        "backbone_lr_scale": 0.2,
    }
    if arg.demo or arg.tiny:
        c.accumulate = 1
    if arg.demo:
        toys.demo_from_scratch(c, **demo_model)
        c.data.size = 32  # 28 pixels do not halve often enough
        c.data.eval.crop_pct = 1.0
        c.batch = 80
        c.epochs = 6.0
        c.log_steps = 50
    if arg.tiny:
        name = c.model.name
        toys.tiny(c)
        c.model = ml_collections.ConfigDict({"name": name, **tiny_model})
        c.optim.warmup_epochs = 0
    common.from_dense(c, "dynamicvit", arg.keep or 0.7, arg.at)
    return c
