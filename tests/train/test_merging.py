"""A method that merges, under the training loop: gather form, real images, one step."""

import numpy as np
import pytest

from dyntoken import train
from tests.train.tiny import tiny_config

# After a read that failed, TensorStore's threads still answer to the event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SMALL = {"width": 8, "depth": 2, "heads": 2}


def _config(name, **options):
    config = tiny_config(steps=1, model={"name": f"{name}_vit_mini_patch4_28", **SMALL, **options})
    config.data = {"name": "fashion_mnist_mini", "shards": 4}
    return config


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("tome", {"r": 12}, [37, 25]),
        pytest.param("mctf", {"r": 12}, [37], marks=pytest.mark.slow),
        pytest.param("pitome", {"rate": 0.9}, [45, 41], marks=pytest.mark.slow),
        pytest.param("diffrate", {"learn": True, "keep": (49, 30)}, [49, 30], marks=pytest.mark.slow),
    ],
)
def test_one_step_on_real_images(name, options, counts, tmp_path):
    config = _config(name, **options)
    if "learn" in options:
        config.losses = {"ce": {"weight": 1.0}, "multiply_adds": {"weight": 1.0, "gmacs": 1e-4}}
    run = train.build(config)
    assert [site.reducer["keep"] for site in run.model.sites()] == counts
    result = train.run(config, tmp_path, log=lambda line: None)
    assert result.finished and np.isfinite(result.metrics["top1"])
