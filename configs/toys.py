"""What recipes run on besides their own data set: embedded images, CIFAR-10, made images."""

import ml_collections

from configs import common

DEMO_SITES = (4, 5)  # of 6 blocks: 49 patches bear less than the 196 of ImageNet
CIFAR_SITES = (2, 3, 4)  # of 6 blocks, 64 patches
LVVIT = {"patch_size": 4, "width": 64, "depth": 6, "heads": 2, "stem_width": 16}  # of its demos
LVVIT_TOY = {"patch_size": 4, "stem_width": 8}


def demo(c):
    """Fashion-MNIST, 10,000 embedded real images, from our small trained dense ViT."""
    c.data.name = "fashion_mnist_mini"
    c.data.eval_split = "test"
    c.data.size = 28
    c.data.augment = {"crop": "pad", "pad": 1, "flip": 0.5}
    c.mix = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    c.model = ml_collections.ConfigDict({"name": "vit_mini_patch4_28"})
    c.init.path = "pretrained:vit_mini_patch4_28"
    c.batch, c.accumulate = 200, 1
    c.epochs = 3.0
    c.eval_epochs = 0.0
    c.log_steps = 25
    c.checkpoint_steps = 50
    c.ema = 0.0
    c.optim = {
        "lr": 1e-3,
        "min_lr": 1e-6,
        "schedule": "cosine",
        "warmup_epochs": 0.2,
        "weight_decay": 0.05,
        "backbone_lr_scale": 0.2,  # trained already; the predictors are new
    }


def cifar10(c):
    """The real CIFAR-10 from scratch: a small ViT on patches of 4 x 4 pixels, no teacher, no weights.

    No published recipe: pad-crop and flip, mixup and cutmix for half of the batches,
    AdamW at 1e-3 for a batch of 256, 100 epochs.
    """
    c.data.name = "cifar10"
    c.data.eval_split = "test"
    c.data.size = 32
    c.data.augment = {"crop": "pad", "pad": 4, "flip": 0.5}
    c.mix = {"mixup": 0.8, "cutmix": 1.0, "prob": 0.5, "switch_prob": 0.5, "smoothing": 0.1}
    c.model = ml_collections.ConfigDict({"name": "vit_mini_patch4_32", "drop_path": 0.0})
    c.init.path = ""
    c.losses = {key: spec for key, spec in c.losses.items() if key not in common.TAUGHT}
    c.batch = 256
    c.epochs = 100.0
    c.eval_epochs = 5.0
    c.checkpoint_steps = 100
    c.ema = 0.0
    c.optim = {
        "lr": common.per_batch(c, 1e-3),
        "min_lr": common.per_batch(c, 1e-6),
        "schedule": "cosine",
        "warmup_epochs": 3.0,
        "weight_decay": 0.05,
        "clip": 1.0,
    }


def demo_dvt(c, arg, *, start=True, **model):
    """`demo` for a cascade; the shipped dense model teaches and, with `start`, every exit starts from it."""
    optim = c.optim.to_dict()
    demo(c)
    c.teacher = {"name": "vit_mini_patch4_28", "weights": c.init.path}
    c.init = {"path": c.init.path if start else "", "head": "keep"}
    c.model = {
        "exits": arg.exits if arg.exits != common.DVT["exits"] else (2, 4, 7),
        "feature_reuse": arg.feature_reuse,
        "relation_reuse": arg.relation_reuse,
        **model,
    }
    weights = (1.0,) * len(c.model.exits)
    c.losses.ce.weights = weights
    c.losses.logit_kl = {"weight": 1.0, "weights": weights}
    c.batch = 40
    c.data.eval.batch = 200
    c.epochs = 4.0
    c.log_steps = 100
    c.checkpoint_steps = 400
    c.optim.update({"lr": 1e-3, "backbone_lr_scale": 1.0})
    c.optim.update({"frozen": optim["frozen"]} if "frozen" in optim else {})
    c.compare = True


def demo_from_scratch(c, losses=("ce", "keep_ratio"), **model):
    """`demo` for a backbone that ships no trained weights: a small model of its kind, 8 epochs."""
    name = c.model.name
    demo(c)
    c.model = ml_collections.ConfigDict({"name": name, **model})
    c.init.path = ""
    c.losses = {key: spec for key, spec in c.losses.items() if key in losses}
    c.epochs = 8.0
    c.optim.update({"lr": 1.5e-3, "warmup_epochs": 0.3, "backbone_lr_scale": 1.0})


def tiny(c, at=(), **model):
    """Made images and a toy model: two steps, to see that everything fits.

    Deep enough for sites `at`; `model` replaces the toy's patch size by what another kind of
    model needs, or, of a model of stages (with `depths`), all there is.
    """
    c.data.name = "fake"
    c.data.eval_split = "test"
    c.data.size = 16
    c.data.augment.update({"rand_augment": None, "repeats": 1})
    c.mix.erase = 0.0
    c.data.options = {"num_classes": 4, "train": 64, "test": 24, "image_size": 16, "channels": 3}
    if "depths" in model:
        c.model = ml_collections.ConfigDict({"name": c.model.name, **model})
    else:
        depth = max([4, *(site + 1 for site in at)])
        c.model.update({"width": 24, "depth": depth, "heads": 2, **(model or {"patch_size": 4})})
    c.init.path = ""
    c.losses = {key: spec for key, spec in c.losses.items() if key not in common.TAUGHT}
    c.optim.update({"warmup_epochs": 0, "cooldown_epochs": 0})
    c.batch, c.accumulate = 16, 1
    c.steps = 2
    c.log_steps = 1
    c.curves = False
    c.checkpoint_steps = 1


def tiny_dvt(c, **model):
    """`tiny` for a cascade: three exits on the grids 2, 3 and 4."""
    tiny(c, exits=(2, 3, 4), depth=2, **model)
    if "weights" in c.losses.ce:
        c.losses.ce.weights = (1.0, 1.0, 1.0)


def finish(c, arg, method, *, keep=0.7, demo_keep=0.5, sites=DEMO_SITES, small=None, toy=None):
    """The end of a recipe: `demo` and `tiny` where `arg` asks for them, then the reduced model.

    Args:
      c: the recipe, with the dense model.
      arg: has the entries of `common.REDUCED`.
      method: prefix of the reduced model's name.
      keep, demo_keep, sites: where `arg` gives none; `sites` of the demo.
      small: fields of a model that the demo trains from scratch, else it starts from the shipped one.
      toy: see `tiny`.
    """
    if arg.demo and small:
        demo_from_scratch(c, **small)
    elif arg.demo:
        demo(c)
        c.compare = True
    if arg.demo:
        keep, arg.at = demo_keep, arg.at or sites
    if arg.tiny:
        tiny(c, arg.at, **(toy or {}))
    common.from_dense(c, method, arg.keep or keep, arg.at, arg.form)
    return c


def finish_stages(c, arg, *, small, toy, sites=()):
    """`finish` of TPS on a backbone that reduces stage by stage; `arg` has `dropped`."""
    finish(c, arg, arg.variant, sites=sites, small=small, toy=toy)
    c.model.dropped = arg.dropped
    if arg.demo:
        c.batch, c.epochs = 40, 6.0  # steps are what a fresh model needs
        c.data.eval.batch = 200
        c.log_steps = 100
        c.checkpoint_steps = 400
        # Zeros on a map are noise to what follows: without clipping a fresh model's loss rose again.
        c.optim.update({"lr": 1e-3, "clip": 1.0})
    return c


def finish_dual_path(c, arg, *, small, toy):
    """`finish` of DynamicViT on a backbone with a fast path."""
    finish(c, arg, "dynamicvit", demo_keep=0.7, sites=(), small=small, toy=toy)
    if arg.demo:
        c.data.size = 32  # 28 pixels do not halve often enough
        c.data.eval.crop_pct = 1.0
        c.batch, c.epochs = 80, 6.0
        c.log_steps = 50
    return c
