"""What a run on `gs://` is made of, in a process of its own (`gs://` cannot be taken back).

python -m tests.faults.bucket_run FOLDER PORT train|evaluate|restart
"""

from __future__ import annotations

import json
import sys

from tests.faults import bucket
from tests.train.tiny import tiny_config

WORKDIR = "gs://bucket/runs/one"
CONFIG = tiny_config(steps=60, checkpoint_steps=3, eval_steps=20, keep_best=1, ema=0.9, log_steps=2)


def main(folder: str, port: str, what: str) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    bucket.install(folder, int(port))
    import dyntoken
    from dyntoken import train
    from dyntoken.train.workdir import open_workdir

    if what == "evaluate":
        best = train.evaluate(CONFIG, WORKDIR, step="best")
        opened = open_workdir(WORKDIR)
        dyntoken.load_weights(opened.plan.model, WORKDIR)
        print(json.dumps({"best": best["step"], "opened": opened.step}))
    else:
        train.run(CONFIG, WORKDIR, restart=what == "restart")


if __name__ == "__main__":
    main(*sys.argv[1:])
