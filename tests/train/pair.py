"""One of two processes that train `config()` together, with two CPU devices each.

    python -m tests.train.pair PORT PROCESS WORKDIR [--hang=STEP] [--train=N] [--pieces | --images=DIR | --care]

`--hang` stops after a step until it is killed; `--train` gives this process a training
split of another size; `--pieces` cuts the batch into slices and the state into pieces;
`--images` trains `everything(DIR)` instead, `--care` trains `care()`, and the last process
gets rows that are not finite.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tests.train.tiny import DTPS, tiny_config

DEVICES = 2


def config(**overrides):
    """A dTPS whose every draw differs from row to row: dropout, drop path, mixing, Gumbel noise."""
    return tiny_config(
        model__name=DTPS,
        model__depth=2,
        model__at=(1,),
        model__keep=0.5,
        model__dropout=0.1,
        model__drop_path=0.1,
        losses__keep_ratio={"weight": 2.0},
        ema=0.9,
        # With seed 0 patches of an image score alike to the last bits: rounding would choose between them.
        **{"checkpoint_steps": 3, "seed": 1, **overrides},
    )


def everything(images, **overrides):
    """`config()` on a folder of JPEGs for 20 steps, with all of DeiT's augmentation, from weights beside it."""
    return config(
        data={
            "name": f"folder:{images}",
            "eval_split": "val",
            "size": 16,
            "shards": 4,
            "augment": {"flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "repeats": 3},
        },
        init={"path": f"{images}.safetensors"},
        mix__smoothing=0.1,
        mix__erase=0.25,
        steps=20,
        checkpoint_steps=6,
        **overrides,
    )


def care():
    """`config()` with a rewind, best checkpoints and a further evaluation set of odd size."""
    more = {"image_size": 16, "train": 64, "test": 21, "num_classes": 7}
    return config(
        checkpoint_steps=2,
        eval_steps=2,
        keep_best=1,
        keep_checkpoints=1,
        best_metric="loss",
        rewind=1,
        evals={"more": {"name": "fake", "options": more}},
    )


def poisoned(real, index=3):
    """`Run.train_batches` whose batch `index` of the data makes the loss NaN."""

    def train_batches(self, start_step, *, skipped=0, rewinds=0):
        batches = real(self, start_step, skipped=skipped, rewinds=rewinds)
        for position, batch in enumerate(batches, start_step + skipped):
            bad = np.float32(np.nan if position == index else 1.0)
            yield {**batch, "mask": batch["mask"] * bad}

    return train_batches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("process", type=int)
    parser.add_argument("workdir")
    parser.add_argument("--hang", type=int)
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--images")
    parser.add_argument("--care", action="store_true")
    args = parser.parse_args()
    pieces = {"accumulate": 2, "shard": "params"} if args.pieces else {}

    def log(line: str) -> None:
        print(line, flush=True)
        if args.hang is not None and line.startswith(f"step {args.hang}/"):
            time.sleep(600)

    import jax

    from dyntoken import multihost

    jax.config.update("jax_num_cpu_devices", DEVICES)
    address = f"localhost:{args.port}"
    multihost.initialize(
        multihost.detect("on", coordinator=address, processes=2, process=args.process, environ={}),
        timeout=240,
    )
    from dyntoken import train

    chosen = everything(args.images) if args.images else config(data__options__train=args.train, **pieces)
    if args.care:
        from dyntoken.train.build import Run

        chosen = care()
        if args.process == 1:
            Run.train_batches = poisoned(Run.train_batches)
    result = train.run(chosen, args.workdir, log=log)
    print("mesh", result.run.mesh.size, "count", result.metrics.get("count"), flush=True)


if __name__ == "__main__":
    main()
