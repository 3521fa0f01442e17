#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a checkpoint whose metric is NaN displaces the best one.
#
# Expected: with `best_fn`, a NaN (a run that diverged, a mean over no images) ranks last, or is refused.
# Seen: steps are sorted by the bare metric, and NaN compares with nothing, so that the order is that in which they
# came: NaN is "better" than all before it and worse than all after. The best checkpoint (0.9) is deleted, NaN or what
# comes after it (0.6) stays and is `best_step()`; for "min" as for "max", and for the policy BestN likewise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
import sys
import tempfile

import jax.numpy as jnp
import orbax.checkpoint as ocp

print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"))
nan = float("nan")


def kept(metrics, mode="max", **options):
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metric: metric["top1"], best_mode=mode, enable_async_checkpointing=False, **options
    )
    manager = ocp.CheckpointManager(tempfile.mkdtemp(dir=sys.argv[1]), options=options)
    for step, metric in enumerate(metrics):
        manager.save(step, args=ocp.args.StandardSave({"x": jnp.ones(1)}), metrics={"top1": metric})
    found = [metrics[step] for step in sorted(manager.all_steps())], metrics[manager.best_step()]
    print(f"{mode} of {metrics}, {', '.join(options_words)}: keeps {found[0]}, best {found[1]}")
    return str(found)


options_words = ["max_to_keep=1"]
assert kept([0.5, 0.9, 0.6], max_to_keep=1) == "([0.9], 0.9)"
assert kept([0.9, nan], max_to_keep=1) == "([nan], nan)", "NaN ranks otherwise now"
assert kept([0.5, 0.9, nan, 0.6], max_to_keep=1) == "([0.6], 0.6)", "NaN ranks otherwise now"
options_words = ["max_to_keep=2"]
assert kept([0.5, 0.9, nan, 0.6], max_to_keep=2) == "([nan, 0.6], 0.6)", "NaN ranks otherwise now"
assert kept([0.5, 0.9, nan, 0.6], mode="min", max_to_keep=2) == "([nan, 0.6], 0.6)", "NaN ranks otherwise now"
options_words = ["BestN(n=1)"]
best = ocp.checkpoint_managers.BestN(get_metric_fn=lambda metric: metric["top1"], n=1)
assert kept([0.9, nan], preservation_policy=best) == "([nan], nan)", "NaN ranks otherwise now"
print("holds: a NaN metric displaces the best checkpoint")
PY
