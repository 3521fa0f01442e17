"""Networks of studies in a folder: trained once, resumed after a kill, shared between studies."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dyntoken import train, weights
from dyntoken.studies.measures import MEASURES, Trained
from dyntoken.studies.setting import Setting, write
from dyntoken.studies.trial import Study, Trial
from dyntoken.train.build import build

Log = Callable[[str], None]
RESULT, WEIGHTS, RUN = "result.json", "weights.safetensors", "run"
METRICS = ("top1", "top1_per_exit")  # of the last evaluation
# What says when a run is looked at, not what it is.
CADENCE = ("seed", "log_steps", "eval_steps", "eval_epochs", "checkpoint_steps", "keep_checkpoints", "curves")


class Stopped(Exception):
    """A signal ended a run, which the same command goes on with."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class Pool:
    """The networks in a results folder.

    Args:
      out: the folder: `runs/MODEL-DIGEST/SEED` holds a network, `STUDY/rows` what was measured of it.
    """

    def __init__(self, out: Path, setting: Setting, log: Log):
        self.out, self.setting, self._log = out, setting, log

    def rows(self, name: str, study: Study, trial: Trial, seed: int) -> list[dict[str, Any]]:
        """The rows of a network in a study, as JSON keeps them; trains and measures what is not there yet.

        Raises:
          Stopped: by a signal, in the middle of a run.
          ValueError: whatever a run refuses.
        """
        config = self.setting.config_of(trial, seed)
        digest = _digest(config, trial)
        path = self.out / name / "rows" / f"{trial.name}.{seed}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("digest") == digest:
            return stored["rows"]
        found, seconds = self._trained(trial, seed, config, digest)
        rows = [asdict(row) for row in MEASURES[study.measure](found)]
        kept = {
            "trial": trial.name,
            "digest": digest,
            "seed": seed,
            "seconds": round(seconds, 1),
            "rows": rows,
        }
        write(path, json.dumps(kept, indent=1) + "\n")
        said = "; ".join(f"{row['name']} {100 * row['values']['top1']:.2f}" for row in rows[:4])
        self._log(f"{name}, seed {seed}: {said}")
        return rows

    def _trained(self, trial: Trial, seed: int, config: dict[str, Any], digest: str) -> tuple[Trained, float]:
        run = build(config, training=False)
        if not trial.length:
            variables = weights.load_whole(run.model, self.setting.weights)[0]
            return Trained(trial, seed, self.setting, run, variables, {}), 0.0
        folder = self.out / "runs" / f"{config['model']['name']}-{digest}" / str(seed)
        if not (folder / RESULT).exists():
            began = time.monotonic()
            result = train.run(config, folder / RUN, log=lambda line: self._log(f"  {line}"))
            if not result.finished:
                raise Stopped(result.signum)
            state = result.state
            weights.save_weights(folder / WEIGHTS, state.variables if state.ema is None else state.ema)
            average = "" if state.ema is None else "ema/"
            kept = {
                name: result.metrics[average + name] for name in METRICS if average + name in result.metrics
            }
            about = {"seconds": time.monotonic() - began, "metrics": kept, "config": config}
            write(folder / RESULT, json.dumps(about, indent=1) + "\n")
        shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)  # weights alone are a fourth of it
        about = json.loads((folder / RESULT).read_text())
        variables = weights.load_whole(run.model, str(folder / WEIGHTS))[0]
        return Trained(trial, seed, self.setting, run, variables, about["metrics"]), about["seconds"]

    def stored(self, name: str) -> list[dict[str, Any]]:
        """Everything measured so far for a study: one mapping per network and seed."""
        return [json.loads(path.read_text()) for path in sorted((self.out / name / "rows").glob("*.json"))]


def _digest(config: dict[str, Any], trial: Trial) -> str:
    """Of what a network is, apart from its seed and from where things lie."""
    told = {key: value for key, value in config.items() if key not in CADENCE}
    told["data"] = {key: value for key, value in told["data"].items() if key != "data_dir"}
    told["init"], told["teacher"], told["length"] = None, bool(told["teacher"]), trial.length
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()[:8]
