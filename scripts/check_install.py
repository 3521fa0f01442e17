"""Whether an installed dyntoken works: `python scripts/check_install.py`, from outside the clone.

Trains, evaluates, loads, exports and runs small models, a minute; prints versions and what was
found. Started inside the clone it would test the clone.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time

import numpy as np


def main() -> int:
    """Exit status 1 where something differs."""
    began = time.monotonic()
    import dyntoken

    light = time.monotonic() - began
    assert "tensorflow" not in sys.modules and "jax" not in sys.modules
    import flax
    import jax

    print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
    print(f"dyntoken {dyntoken.__version__} of {dyntoken.__path__[0]}, imported in {1000 * light:.0f} ms")

    with tempfile.TemporaryDirectory() as folder:
        config = dyntoken.config.load("configs/tps_deit.py:tiny")
        result = dyntoken.train.run(config, f"{folder}/run", log=lambda line: None)
        print(f"trained {int(result.state.step)} steps: {result.metrics}")
        run = dyntoken.load_run(f"{folder}/run")
        shape = (2, *run.preprocess.size, 3)
        print(
            "loaded:", run.model.apply(run.variables, run.preprocess(np.zeros(shape, np.uint8))).logits.shape
        )

        model = dyntoken.create_model("etps_vit_mini_patch4_28", keep=0.7)
        variables = dyntoken.load_weights(model, "pretrained:vit_mini_patch4_28")
        dyntoken.export(model, variables, f"{folder}/exported", platforms=("cpu",))
        images = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype(np.float32)
        ours, exported = (
            np.asarray(logits)
            for logits in (
                model.apply(variables, images).logits,
                dyntoken.load_export(f"{folder}/exported")(images)["logits"],
            )
        )
        apart = float(np.abs(ours - exported).max())
        print(f"exported: logits {apart:.1g} apart")

    exits = dyntoken.create_model("dvt_deit_tiny", exits=(2, 3), img_size=64, width=32, heads=2, depth=2)
    start = exits.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    logits = exits.apply(start, np.zeros((2, 64, 64, 3), np.float32)).logits
    print("exits:", logits.shape)
    return int(not (apart < 1e-4 and logits.shape == (2, 2, 1000)))


if __name__ == "__main__":
    sys.exit(main())
