"""Every default once, and what the recipes share.

A recipe is a file with `get_config(arg)`; `arg` is what follows the colon in
`--config=configs/tps_deit.py:size=t,keep=0.5`. Every recipe also takes `tiny` (made
images, seconds), and most `demo` (embedded real images, minutes on a laptop).
"""

import difflib
import re

import ml_collections
from ml_collections import config_dict

from dyntoken import schema


def per_batch(c, rate, batch=None):
    """A rate for `batch` (by default that of the recipe by now), in proportion for any other.

    What goes for the learning rate goes for its floors: else a small batch starts below them.
    """
    return c.get_ref("batch").to_float() * (rate / (batch or c.batch))


def parse_arg(arg, **defaults):
    """Reads `"demo,size=t,keep=0.5,at=3-6-9"` into a dict typed by `defaults`.

    A lone word is a switch. A sequence is written `keep=137-96-67`, `137,96,67` or `(137, 96, 67)`.
    An unknown name raises with those that exist.
    """
    values = dict(defaults)
    for part in filter(None, re.split(r",(?=\s*[A-Za-z_])", arg or "")):
        name, given, text = part.strip().partition("=")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=2)
            hint = f"did you mean {' or '.join(near)}? It takes" if near else "this recipe takes"
            raise ValueError(f"unknown config argument {name!r}: {hint} {', '.join(defaults)}")
        if not given and not isinstance(defaults[name], bool):
            raise ValueError(f"config argument {name!r} needs a value, as in {name}={defaults[name]}")
        kind = KINDS[type(defaults[name])]
        values[name] = schema.check(kind, schema.Text(text), f"config argument {name}") if given else True
    return ml_collections.ConfigDict(values)


def one_of(arg, **choices):
    """Raises ValueError for an argument that is none of its choices."""
    for name, known in choices.items():
        if arg[name] not in known:
            raise ValueError(f"{name}={arg[name]} is not one of {', '.join(map(str, known))}")


# By the type of the default: a number may be one per site.
KINDS = {float: schema.Keep, tuple: tuple[int | float, ...], int: int, str: str, bool: bool}


def base():
    """All keys a run reads (`dyntoken.train.settings.Settings`), with their defaults."""
    c = ml_collections.ConfigDict()
    c.plugins = ()  # modules with methods, backbones, losses or data of your own, imported first
    c.seed = 0
    c.batch = 1024  # images per step, over all devices
    c.accumulate = 1  # slices of a device's images, one after the other: less memory, the same step
    c.shard = "none"  # or "optimizer", "params": each device holds a piece of them; the same step
    c.epochs = 30.0
    c.steps = 0  # > 0 wins over epochs
    c.log_steps = 50
    c.eval_steps = 0
    c.eval_epochs = 1.0  # 0: evaluate only at the end
    c.checkpoint_steps = 1000
    c.keep_checkpoints = 2
    c.keep_best = 0  # so many of the best stay besides; every evaluation then saves
    c.best_metric = "top1"  # or "ema/top1", "loss", "LABEL/top1" of a further set
    c.rewind = 0  # so often a run may go back to its last checkpoint from a loss that is not finite
    c.resume = config_dict.placeholder(str)  # workdir of another run to go on from
    c.profile = {"start": 20, "steps": 0}  # steps > 0: jax.profiler traces them into WORKDIR/profile
    c.tensorboard = False  # also write WORKDIR/tensorboard (pip install tensorboardX)
    c.wandb = ""  # project of Weights & Biases that the metrics also go to (pip install wandb)
    c.curves = True  # draw WORKDIR/curves.png at every evaluation, if matplotlib is there
    c.ema = 0.0  # decay of the weight average; 0 for none
    c.ema_warmup = (
        True  # min(ema, (1 + step) / (10 + step)); False: ema from the first step on, as timm's ModelEma
    )

    # and any keyword of create_model: keep, at, ...; dtype="bfloat16", scan, remat
    c.model = ml_collections.ConfigDict({"name": ""})
    # Keeps every token until start_epoch, model.keep from end_epoch on (0: always), in so many levels.
    c.keep_schedule = {"start_epoch": 0, "end_epoch": 0, "levels": 5}
    c.elastic = ()  # keep rates that take turns step by step: one set of weights for any of them

    c.data = ml_collections.ConfigDict()
    c.data.name = "imagenet2012"
    c.data.split = "train"
    c.data.eval_split = "validation"
    c.data.size = 224
    c.data.shards = 8  # virtual shards; the result does not depend on the number of devices
    c.data.balance = False  # every class equally often in an epoch; for folders and sets in memory
    c.data.data_dir = config_dict.placeholder(str)  # default: $TFDS_DATA_DIR
    c.data.augment = {
        "crop": "random_resized",
        "interpolation": "bicubic",
        "flip": 0.5,
        "rand_augment": config_dict.placeholder(str),
        "repeats": 1,
    }
    c.data.eval = {"crop_pct": 0.875, "interpolation": "bicubic"}
    c.data.options = ml_collections.ConfigDict()

    # Further sets to evaluate on: {"v2": {"name": "imagenet_v2", "split": "test"}} adds v2/top1.
    c.evals = ml_collections.ConfigDict()

    c.mix = {
        "mixup": 0.8,
        "cutmix": 1.0,
        "prob": 1.0,
        "switch_prob": 0.5,
        "smoothing": 0.1,
        "erase": 0.0,
    }
    c.losses = ml_collections.ConfigDict()
    c.optim = ml_collections.ConfigDict()
    c.teacher = ml_collections.ConfigDict({"name": "", "weights": ""})
    c.init = ml_collections.ConfigDict(
        {"path": "", "head": "keep", "step": "newest"}
    )  # weights to start from
    c.compare = False  # demo: table of linear, dense, drop and this run, and a picture
    return c


def dense(name):
    """`base` with a dense model and its weights."""
    c = base()
    c.model.name = name
    c.init.path = f"weights/{name}.safetensors"
    return c


def deit_augment(c, repeats=3, policy="rand-m9-mstd0.5-inc1"):
    """What DeiT does to ImageNet beyond crop, flip and mixing; `demo` and `tiny` undo it.

    RandAugment (and so no colour jitter, which timm drops beside it), random
    erasing, and repeated augmentation where `repeats` is more than 1. Needs
    TensorFlow, which reads ImageNet anyway.
    """
    c.data.augment.update({"rand_augment": policy, "repeats": repeats})
    c.mix.erase = 0.25


SIZES = {"t": "tiny", "s": "small", "b": "base"}
DEIT = {"size": "s", "pixels": 224, "inat": False}
TOY = {"demo": False, "tiny": False}
REDUCED = {"keep": 0.0, "at": (), "form": "auto", **TOY}
TAUGHT = ("logit_kl", "token_distill", "dense_distill")  # losses that need a teacher


def deit_name(arg, pixels=224):
    """`size=s` to `"deit_small_patch16_224"`."""
    one_of(arg, size=SIZES)
    return f"deit_{SIZES[arg.size]}_patch16_{pixels}"


def deit(arg):
    """`base` with the dense DeiT of `arg` (entries of `DEIT`) on ImageNet or iNaturalist 2019."""
    c = dense(deit_name(arg, arg.pixels))
    c.data.size = arg.pixels
    if arg.inat:
        c.data.name = "i_naturalist2019"
        c.init.path = f"weights/{c.model.name}_inat2019.safetensors"
    return c


def distilled(arg, auto=True):
    """Whether `distill=auto|true|false` asks for a teacher; `auto` is what the official recipe does."""
    choices = {"auto": auto, "true": True, "false": False}
    one_of(arg, distill=choices)
    return choices[arg.distill]


def timm_cosine(c, lr, **optim):
    """AdamW as timm's training script has it, whose schedule is stepped once an epoch."""
    c.optim = {
        "lr": lr,
        "min_lr": per_batch(c, 1e-5),
        "schedule": "cosine_epoch",
        "warmup_epochs": 5,
        "warmup_lr": per_batch(c, 1e-6),
        "weight_decay": 0.05,
        "decay": "not_1d",
        **optim,
    }


def dynamicvit(c, **optim):
    """What raoyongming/DynamicViT trains all its models with; `optim` is what differs, the rates at least."""
    c.ema = 0.9999
    deit_augment(c, repeats=1)
    c.optim = {
        "schedule": "cosine",
        "warmup_epochs": 5,
        "warmup_lr": 0.0,
        "weight_decay": 0.05,
        "decay": "not_1d",
        "backbone_freeze_epochs": 5,
        "backbone_lr_scale": 0.01,
        "frozen": ("cls_token", "pos_embed"),
        **optim,
    }


def dual_path(c):
    """What raoyongming/DynamicViT trains Swin and ConvNeXt with.

    120 epochs in batches of 4096, in four slices each (its `update_freq`), learning
    rate 4e-3 x batch / 4096 after 20 epochs of warm-up; the backbone frozen for 5
    epochs, then at 0.2 of that rate; EMA 0.9999; keep-ratio loss of weight 10, the KL
    of the class logits and the squared distance of the whole feature map. Crop,
    flip, RandAugment (rand-m9-mstd0.5-inc1), random erasing (0.25), mixup, cutmix and
    smoothing are its own, those of DeiT; no repeated augmentation. What differs: mixup
    pairs neighbouring images.
    """
    c.batch, c.accumulate, c.epochs = 4096, 4, 120.0
    rates = {"lr": per_batch(c, 4e-3), "min_lr": per_batch(c, 1e-6), "backbone_lr_scale": 0.2}
    dynamicvit(c, **rates, warmup_epochs=20, frozen=())
    c.losses = {
        "ce": {"weight": 1.0},
        "keep_ratio": {"weight": 10.0},
        "logit_kl": {"weight": 0.5},
        "token_distill": {"weight": 0.5, "variant": "mse"},
    }


def tps(c, arg, *, distill=True):
    """What megvii-research/TPS-CVPR2023 trains with; eTPS has no policy whose keep rate a loss could hold."""
    one_of(arg, variant=("dtps", "etps"))
    c.model.drop_path_rule = "constant"
    c.ema = 0.99996
    deit_augment(c)
    c.losses = {"ce": {"weight": 1.0}}
    if arg.variant == "dtps":
        c.losses.keep_ratio = {"weight": 2.0}
    if distill:
        c.losses.update({"logit_kl": {"weight": 0.5}, "token_distill": {"weight": 0.5, "variant": "kl"}})
    timm_cosine(c, per_batch(c, 2.5e-4, 1024), decay="all")


def dvt(c, arg, recipe):
    """What the cascades share; follows blackfeather-wang/Dynamic-Vision-Transformer's main.py.

    `arg` has the entries of `DVT`; `recipe` is the learning rate and weight decay.
    """
    c.model.exits = arg.exits
    c.model.feature_reuse = arg.feature_reuse
    c.model.relation_reuse = arg.relation_reuse
    c.model.drop_path = 0.1
    exits_recipe(c, arg, recipe)
    c.losses.ce.weights = (1.0,) * len(arg.exits)


def exits_recipe(c, arg, recipe):
    """Losses and schedule of a model with exits; `arg` has `distill`."""
    c.epochs = 310.0
    c.ema = 0.99996
    c.losses = {"ce": {"weight": 1.0}}
    if arg.distill:
        c.losses.exit_kl = {"weight": arg.distill, "temperature": 1.0}
    c.optim = {
        "min_lr": 1e-5,
        "schedule": "cosine_epoch_start",
        "warmup_epochs": 20,
        "warmup_lr": 1e-6,
        "cooldown_epochs": 10,
        "decay": "not_1d",
        "no_decay": (),  # the official wrapper names no parameter: class token and positions decay
        **recipe,
    }


DVT = {"exits": (7, 10, 14), "feature_reuse": True, "relation_reuse": True, "distill": 0.0}
T2T_FROZEN = ("pos_embed$", r"attention\d/w$")  # the sinusoid and the performer's random features


def from_dense(c, method, keep, at, form="auto"):
    """Fine-tunes a reduced model from a dense one, which is its teacher where a loss wants one.

    Call it last: the teacher is built like the model is by then. In gather form the
    number of tokens is exact, and no loss has to hold it.
    """
    one_of({"form": form}, form=("auto", "mask", "gather"))
    dense = c.model.to_dict()
    if any(loss in c.losses for loss in TAUGHT):
        c.teacher.update(dense)
        c.teacher.weights = c.init.get_oneway_ref("path")  # follows it, but not the other way round
    c.model.name = f"{method}_{dense['name']}"
    c.model.keep = keep
    if form != "auto":
        c.model.form = form
    if form == "gather" and "keep_ratio" in c.losses:
        del c.losses["keep_ratio"]
    if at:
        c.model.at = at
