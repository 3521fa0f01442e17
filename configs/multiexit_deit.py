"""Adaptive depth: DeiT with a classifier after several blocks, the baseline of the cascades.

    python -m dyntoken.main --config=configs/multiexit_deit.py --workdir=runs/multiexit_deit_s
    python -m dyntoken.main --config=configs/multiexit_deit.py:size=b,exits=2-5-8-11,distill=1
    python -m dyntoken.main --config=configs/multiexit_deit.py:demo --workdir=runs/multiexit_demo
    python -m dyntoken.main --config=configs/multiexit_deit.py:tiny

The multi-exit idea of MSDNet (ICLR 2018) on a vision transformer. No official code:
the recipe is that of configs/dvt_deit.py, augmentation included, so that `tools.thresholds --workdir=CASCADE
--vs=THIS` compares exits on finer token grids with exits at greater depth under equal
terms. On ImageNet: not yet run.
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `exits=` (blocks, from 0; the last must be one), `distill=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", exits=(), distill=0.0, **common.TOY)
    c = common.base()
    c.model.name = f"multiexit_{common.deit_name(arg)}"
    c.model.drop_path = 0.1
    c.batch = 512
    common.exits_recipe(c, arg, {"lr": 5e-4, "weight_decay": 0.05})
    common.deit_augment(c, repeats=1)
    if arg.demo:
        toys.demo(c)
        c.model.name = f"multiexit_{c.model.name}"
        c.optim.update({"backbone_lr_scale": 1.0, "lr": 5e-4})
        c.checkpoint_steps = 0
        c.compare = True
    if arg.tiny:
        toys.tiny(c)
    if arg.exits:
        c.model.exits = arg.exits
    return c
