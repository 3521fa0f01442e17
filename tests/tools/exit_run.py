"""A run of a tiny model with three exits, as a workdir: a checkpoint before the first step."""

from __future__ import annotations

import json

from dyntoken import train
from dyntoken.checkpoints import Checkpoints

NAME = "dvt_vit_mini"
SMALL = {"exits": [1, 2, 4], "depth": 1, "width": 16, "heads": 2, "context_width": 4, "context_hidden": 8}


def exit_config(**overrides):
    """The config; 61 test images of 5 classes, in batches that leave padding."""
    return {
        "model": {"name": NAME, **SMALL},
        "data": {
            "name": "fake",
            "shards": 4,
            "augment": None,
            "options": {"image_size": 16, "train": 64, "test": 61, "num_classes": 5},
        },
        "batch": 16,
        "steps": 2,
        "losses": {"ce": {"weight": 1.0}},
        "optim": {"lr": 1e-3},
        **overrides,
    }


def make_workdir(path, config):
    """Writes `config.json` and a checkpoint of fresh variables."""
    plan = train.build(config)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(plan.settings.plain))
    checkpoints = Checkpoints(path)
    checkpoints.save(0, plan.new_state(), seconds=0.0, config=plan.settings.plain)
    checkpoints.close()
    return path
