"""A config that trains in seconds: a ViT of one block on generated images.

    python -m tests.train.tiny WORKDIR [STEPS | series]

trains `long_config` or `series_config` in a process of its own (with four CPU devices, as the tests
have), to be killed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import ml_collections

DENSE = "deit_tiny_patch8_16"
DTPS = "dtps_deit_tiny_patch8_16"
SMALL = {"width": 8, "depth": 1, "heads": 2}


def tiny_config(**overrides) -> ml_collections.ConfigDict:
    """The config; a keyword `a__b=x` sets `config.a.b = x`."""
    config = {
        "model": {"name": DENSE, **SMALL},
        "data": {
            "name": "fake",
            "shards": 4,
            "augment": {"crop": "pad", "pad": 2},
            "options": {"image_size": 16, "train": 64, "test": 37, "num_classes": 7},
        },
        "batch": 16,
        "steps": 6,
        "losses": {"ce": {"weight": 1.0}},
        "mix": {"mixup": 0.8, "cutmix": 1.0},
        "optim": {"lr": 1e-3, "clip": 1.0},
        "log_steps": 1,
        "curves": False,
    }
    for name, value in overrides.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return ml_collections.ConfigDict(config)


def long_config(steps: int = 200) -> ml_collections.ConfigDict:
    """Many quick steps with many checkpoints: what the killing test runs."""
    return tiny_config(steps=steps, checkpoint_steps=7, ema=0.9, model__dropout=0.1)


def series_config() -> ml_collections.ConfigDict:
    """The same with evaluations that last: what is killed twenty times."""
    long = {"eval_steps": 100, "keep_best": 1, "data__options__test": 1600}
    return tiny_config(steps=600, checkpoint_steps=7, ema=0.9, model__dropout=0.1, **long)


def main() -> None:
    from dyntoken import interrupt

    interrupt.install()
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    from dyntoken import train
    from dyntoken.checkpoints import Checkpoints
    from dyntoken.train import loop

    def announced(word: str, function: Callable) -> Callable:
        """For the test that kills it in the act."""
        return lambda *args, **more: (print(word), function(*args, **more))[1]

    Checkpoints.restore = announced("restoring", Checkpoints.restore)
    loop.measure = announced("evaluating", loop.measure)
    series = sys.argv[2:] == ["series"]
    result = train.run(series_config() if series else long_config(*map(int, sys.argv[2:])), sys.argv[1])
    sys.exit(0 if result.finished else 128 + result.signum)


if __name__ == "__main__":
    main()
