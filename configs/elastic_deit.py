"""One set of weights, any budget: eTPS (or EViT) on DeiT with keep rates that take turns.

    python -m dyntoken.main --config=configs/elastic_deit.py --workdir=runs/elastic_deit_s
    python -m dyntoken.main --config=configs/elastic_deit.py:method=evit,rates=0.8-0.6-0.4
    python -m dyntoken.main --config=configs/elastic_deit.py:demo --workdir=runs/elastic_demo
    python -m dyntoken.main --config=configs/elastic_deit.py:tiny

and afterwards, for each rate that is wanted (no other training, no other weights):

    python -m dyntoken.main --config=configs/elastic_deit.py --workdir=runs/elastic_deit_s --mode=eval \\
        --config.model.keep=0.6

Of three steps one has the largest rate, one the smallest, one any of them (`config.elastic`), each compiled
once. No published recipe: the fine-tuning of configs/evit_deit.py, the rates instead of one. What evaluations
during training keep is `config.model.keep`, the middle rate. On the embedded images it does at each of its
rates what models for one rate do (docs/training.md). On ImageNet: not yet run.
"""

from configs import common, toys


def get_config(arg=None):
    """`method=`, `rates=` (of tokens that stay), `size=t|s|b`, `pixels=224|384`, `inat`, `at=`, `demo`, `tiny`."""
    arg = common.parse_arg(arg, **common.DEIT, **common.REDUCED, method="etps", rates=(0.9, 0.7, 0.5))
    c = common.deit(arg)
    c.batch = 2048
    c.ema = 0.99996
    common.deit_augment(c)
    c.losses = {"ce": {"weight": 1.0}}
    optim = {"min_lr": common.per_batch(c, 2e-6), "warmup_epochs": 0, "weight_decay": 1e-6}
    common.timm_cosine(c, common.per_batch(c, 2e-5, 512), **optim)
    rates = sorted(arg.rates)
    toys.finish(c, arg, arg.method, keep=rates[len(rates) // 2], demo_keep=rates[len(rates) // 2])
    c.elastic = tuple(arg.rates)
    return c
