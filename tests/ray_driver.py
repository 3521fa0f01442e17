"""What the test of Ray runs in a process of its own.

    python -m tests.ray_driver FOLDER images|bytes

predicts the pictures of FOLDER (`photos`, or a table `encoded` of them) with the weights there, by two
workers of which one is killed in the middle, and writes Parquet to `out`.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time

import ray
import ray.data


def main(root: pathlib.Path, kind: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    import dyntoken
    from tests.test_ray import OPTIONS

    seen = root / f"seen_{kind}"
    seen.mkdir()

    class Slow(dyntoken.Predictor):
        """Leaves a trace of each batch, and time to be killed in it."""

        def __call__(self, batch):
            (seen / f"{os.getpid()}_{time.monotonic_ns()}").touch()
            time.sleep(0.3)
            return super().__call__(batch)

    def kill():
        while len(batches := sorted(os.listdir(seen), key=lambda name: int(name.split("_")[1]))) < 3:
            time.sleep(0.01)
        pid = batches[-1].split("_")[0]  # of the batch that has just begun
        (root / f"killed_{kind}").write_text(pid)
        os.kill(int(pid), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    blocks = {"override_num_blocks": 8}  # so few pictures would be one block, of one worker
    if kind == "images":
        found = ray.data.read_images(str(root / "photos"), include_paths=True, mode="RGB", **blocks)
    else:
        found = ray.data.read_parquet(str(root / "encoded"), **blocks)
    found = found.map_batches(
        Slow,
        fn_constructor_kwargs={"source": str(root / "weights.safetensors"), **OPTIONS},
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    found.write_parquet(str(root / f"out_{kind}"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
