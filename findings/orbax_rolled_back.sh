#!/bin/sh
# Orbax's CheckpointManager saves nothing, and says so by False alone, until a run that was rolled back has passed its
# newest checkpoint again.
#
# Expected: a run restored at step 10 of 30 saves at 15, or is told that it cannot.
# Seen with orbax-checkpoint 0.12.8: save(15) returns False and writes nothing (an existing step raises). With
# force=True it is written, counts as the latest in this process, and another process then has 30 as the latest,
# so that the next resumption goes on from before the rollback.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
WORK="$folder" "$folder/venv/bin/python" - <<'PY'
import os
import pathlib

import numpy as np
import orbax.checkpoint as ocp

print("orbax-checkpoint", ocp.__version__)
folder = pathlib.Path(os.environ["WORK"]) / "run"
options = ocp.CheckpointManagerOptions(max_to_keep=5, enable_async_checkpointing=False)


def save(manager, step, **more):
    found = manager.save(step, args=ocp.args.StandardSave({"x": np.full(3, float(step))}), **more)
    print(f"save({step}{', force=True' if more else ''}): {found}, steps {manager.all_steps()}")
    return found


with ocp.CheckpointManager(folder, options=options) as manager:
    assert [save(manager, step) for step in (10, 20, 30)] == [True] * 3
    manager.restore(10, args=ocp.args.StandardRestore())
    assert save(manager, 15) is False and not (folder / "15").exists()
    assert save(manager, 15, force=True) is True and (folder / "15").exists()
    print("latest here:", manager.latest_step())
    assert manager.latest_step() == 15
with ocp.CheckpointManager(folder, options=options) as manager:
    print("latest to a new process:", manager.latest_step())
    assert manager.latest_step() == 30
print("holds: what follows a rollback is not saved, or not resumed from")
PY
