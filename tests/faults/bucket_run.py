"""What a run on `gs://` is made of, in a process of its own (`gs://` cannot be taken back).

python -m tests.faults.bucket_run FOLDER PORT train|evaluate|restart|parts
"""

from __future__ import annotations

import json
import sys

from tests.faults import bucket
from tests.train.tiny import tiny_config

WORKDIR = "gs://bucket/runs/one"
CONFIG = tiny_config(steps=60, checkpoint_steps=3, eval_steps=20, keep_best=1, ema=0.9, log_steps=2)


def parts() -> None:
    """Checkpoints, lock, record and moving aside, without a training."""
    import jax
    from etils import epath

    from dyntoken.checkpoints import Checkpoints
    from dyntoken.train import lock, sharding, start
    from dyntoken.train import logging as report
    from tests.train.test_checkpoint import make_state

    workdir, mesh = epath.Path("gs://bucket/parts"), sharding.data_mesh(jax.devices()[:1])
    with lock.Lock(workdir):
        checkpoints = Checkpoints(workdir, keep=2)
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step, mesh))
        checkpoints.wait()
        damaged = workdir / "checkpoints" / "3" / "meta" / "metadata"
        damaged.write_text(damaged.read_text()[:50])
        found = checkpoints.restore(sharding.abstract(make_state(0, mesh), mesh))
        checkpoints.close()
        record = report.Report(workdir, total=2)
        record.eval(1, {"top1": 0.5})
        record.eval(2, {"top1": 0.6})
        record.resume(1, {})
        record.close()
        start.move_aside(workdir, print)
        names = sorted(path.name for path in workdir.iterdir())
        old = sorted(str(path.relative_to(workdir)) for path in (workdir / "old" / "1").iterdir())
        text = (workdir / "old" / "1" / "metrics.jsonl").read_text()
    print(json.dumps({"step": found.step, "names": names, "old": old, "rows": text.count("step")}))


def main(folder: str, port: str, what: str) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    bucket.install(folder, int(port))
    import dyntoken
    from dyntoken import train
    from dyntoken.train.evaluate import open_workdir

    if what == "parts":
        parts()
    elif what == "evaluate":
        best = train.evaluate(CONFIG, WORKDIR, step="best")
        opened = open_workdir(WORKDIR)
        dyntoken.load_weights(opened.run.model, WORKDIR)
        print(json.dumps({"best": best["step"], "opened": opened.step}))
    else:
        train.run(CONFIG, WORKDIR, restart=what == "restart")


if __name__ == "__main__":
    main(*sys.argv[1:])
