"""What scripts/gpu_check.sh checks in one process: methods beside a CPU, and some training steps.

    python scripts/gpu_check.py methods|train [--tiny]

The last line is one JSON object; the status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyntoken
from dyntoken import train
from dyntoken.analysis import timing

METHODS = ("dynamicvit", "dtps", "evit", "etps", "tome", "topk")
STEPS = 20


def methods(tiny: bool) -> dict[str, Any]:
    """Each method on the device against the CPU in float32: kept sets, logits; and mask form against gather form."""
    small = {"depth": 3, "at": (1,), "num_classes": 10, **({"img_size": 64} if tiny else {})}
    host = jax.devices("cpu")[0]
    found = {}
    for method in METHODS:
        model = dyntoken.create_model(f"{method}_deit_tiny_patch16_224", **small)
        variables, images = timing.random_variables(model), timing.random_images(model, 4)
        run = jax.jit(functools.partial(model.apply))
        here, there = run(variables, images), run(*jax.device_put((variables, images), host))
        error = float(np.abs(np.asarray(here.logits) - np.asarray(there.logits)).max())
        pairs = [
            (np.asarray(a.decision), np.asarray(b.decision))
            for a, b in zip(here.reductions, there.reductions, strict=True)
        ]
        same = all(np.array_equal(a, b) for a, b in pairs)
        found[method] = {"logits_off_by": error, "kept_sets_equal": same, "passed": same and error < 1e-4}
    return found


def training(tiny: bool) -> dict[str, Any]:
    """Twenty steps of dTPS and of DVT on one batch: every loss finite, the last five below the first five."""
    sizes = {"dtps_deit_small_patch16_224": 224, "dvt_deit_small": 224}
    models: dict[str, dict[str, Any]] = {name: {} for name in sizes}
    if tiny:
        thin = {"width": 8, "depth": 2, "heads": 2}
        models = {
            "dtps_deit_tiny_patch16_224": {**thin, "at": (1,)},
            "dvt_deit_tiny": {**thin, "exits": (1, 2)},
        }
        sizes = {"dtps_deit_tiny_patch16_224": 32, "dvt_deit_tiny": 14}
    found = {}
    for name, options in models.items():
        side, learns = sizes[name], name.startswith("dtps")
        config = {
            "model": {"name": name, **options},
            "data": {
                "name": "fake",
                "size": (side, side),
                "options": {"train": 64, "num_classes": 10, "image_size": side},
            },
            "batch": 8 if tiny else 64,
            "steps": STEPS,
            "losses": {"ce": {}, **({"keep_ratio": {"weight": 2.0}} if learns else {})},
            "optim": {"lr": 1e-3},
        }
        run = train.build(config, devices=jax.devices()[:1])
        rng = np.random.default_rng(0)
        rows = config["batch"]
        batch = {
            "image": rng.integers(0, 256, (rows, *run.shape), np.uint8),
            "label": rng.integers(0, 10, rows).astype(np.int32),
            "mask": np.ones(rows, np.float32),
            "id": np.arange(rows, dtype=np.int32),
        }
        state, losses, start = run.new_state(timing.random_variables(run.model)), [], time.perf_counter()
        for _ in range(STEPS):
            state, metrics = run.train_step(state, {}, jax.tree.map(jnp.asarray, batch))
            total, count = metrics["loss"]
            losses.append(float(total) / float(count))
        falls = np.mean(losses[-5:]) < np.mean(losses[:5])
        passed = bool(np.isfinite(losses).all() and (falls or tiny))  # a tiny model learns nothing in so few
        seconds = time.perf_counter() - start
        found[name] = {"first": losses[0], "last": losses[-1], "seconds": seconds, "passed": passed}
    return found


def main() -> int:
    """Runs one of the two; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("methods", "train"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    found = {"methods": methods, "train": training}[args.what](args.tiny)
    print(json.dumps({"device": timing.device(), args.what: found}))
    return 0 if all(row["passed"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
