"""Dense LV-ViT with token labelling: what DynamicViT and TPS start from.

    python -m dyntoken.main --config=configs/lvvit.py:size=s --workdir=runs/lvvit_s
    python -m dyntoken.main --config=configs/lvvit.py:demo
    python -m dyntoken.main --config=configs/lvvit.py:tiny

Published (zihangJiang/TokenLabeling, 300 epochs, 224 px): S 83.3 at 6.6 GMACs, M
84.0 at 12.7. On ImageNet: not yet run.

Follows zihangJiang/TokenLabeling: learning rate 1.6e-3 x batch / 1024, weight
decay 0.05, warm-up 5 epochs, stochastic depth 0.1 (S), MixToken in place of mixup
and CutMix, the class token's loss plus 0.5 of the patch tokens'. Its label maps,
made once by an NFNet-F6, are not read: every patch token gets its image's label
(`losses.token_label` takes `batch["dense"]` where a training loop of your own has
maps; a teacher with `dense_distill` labels the tokens on the fly). Crop, flip,
RandAugment (rand-m9-mstd0.5-inc1; L: three operations), random erasing (0.25) and
smoothing are its own; no repeated augmentation. What differs: it crops after
RandAugment instead of before it, and draws bilinear or bicubic interpolation per
image, here all is bicubic.

`demo` trains a small LV-ViT on the embedded images, 12 epochs: 78.65 % of 2,000 in 6
minutes 46 s on 2 cores.
"""

from configs import common, toys

DROP_PATH = {"t": 0.1, "s": 0.1, "m": 0.2, "l": 0.3}


def get_config(arg=None):
    """`size=t|s|m|l`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, size="s", **common.TOY)
    common.one_of(arg, size=DROP_PATH)
    c = common.base()
    c.model.update({"name": f"lvvit_{arg.size}", "drop_path": DROP_PATH[arg.size], "mix_token": True})
    c.data.eval.crop_pct = 0.9 if arg.size in "ts" else 1.0
    c.mix.update({"mixup": 0.0, "cutmix": 0.0})
    common.deit_augment(c, repeats=1, **({"policy": "rand-n3-m9-mstd0.5-inc1"} if arg.size == "l" else {}))
    c.epochs = 300.0
    c.losses = {"ce": {"weight": 1.0}, "token_label": {"weight": 0.5}}
    common.timm_cosine(c, common.per_batch(c, 1.6e-3, 1024))
    if arg.demo:
        toys.demo_from_scratch(c, ("ce", "token_label"), mix_token=True, **toys.LVVIT)
        c.epochs = 12.0  # a mixed label teaches slower: 75.05 % after 8
    if arg.tiny:
        toys.tiny(c, **toys.LVVIT_TOY)
    return c
