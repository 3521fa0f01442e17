"""What `tools.study` fine-tunes every network of a study with, from one dense model, which also teaches.

    python -m dyntoken.tools.study tokens --scale=imagenet
    python -m dyntoken.tools.study tokens --scale=laptop
    python -m dyntoken.tools.study tokens --config=configs/study.py:size=t,distill=false
    python -m dyntoken.tools.study tokens --config=configs/study.py:dinov2 --source=dinov2_small --data=cifar10

The fine-tuning of configs/tps_deit.py with one teacher's loss, KL of the class logits, which every method can have.
A study adds the method, and to methods that learn their decision the loss that holds their keep rate. On ImageNet:
not yet run. `dinov2` is what two cores do with a large pretrained ViT: 40 steps of 16 of 4,000 images, 1,000 to test,
no teacher (results/studies_dinov2_cifar10).
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `pixels=224|384`, `inat`, `distill=true|false`, `demo`, `tiny`, `dinov2`."""
    arg = common.parse_arg(arg, **common.DEIT, **common.TOY, distill=True, dinov2=False)
    c = common.deit(arg)
    common.deit_augment(c)
    c.ema = 0.99996
    c.losses = {"ce": {"weight": 1.0}}
    common.timm_cosine(c, common.per_batch(c, 2.5e-4, 1024))
    if arg.demo or arg.dinov2:
        toys.demo(c)
        c.optim.clip = 1.0
        c.data.eval.crop_pct = 1.0  # of images of another size: trained on whole
    if arg.dinov2:
        c.data.split, c.data.eval_split, c.data.eval.batch = "train[:4000]", "test[:1000]", 100
        c.batch, c.steps, c.checkpoint_steps, c.log_steps = 16, 40, 20, 10
        c.optim.update({"warmup_steps": 8, "backbone_lr_scale": 0.02})
    if arg.tiny:
        toys.tiny(c)
    if arg.distill and not (arg.tiny or arg.dinov2):  # the toy starts from no weights
        c.losses.logit_kl = {"weight": 0.5}
        c.teacher.update({**c.model.to_dict(), "weights": c.init.path})
    return c
