"""Checkpoints of transformers as `save_pretrained` writes them: kinds `vit_hf`, `deit_hf`, `dinov2*_hf`, `dinov3_hf`.

The folder of weights and `config.json` goes through `load_pretrained` once per image size.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import dyntoken
from dyntoken import weights
from tests.golden.case import Case
from tests.golden.checkers import pretrained
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every run of the file, and the same weights under the names that version 5 has in memory."""
    tensors = case.tensors("weights.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "config.json").write_text(json.dumps(case.info["config_json"]))
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        for run, row in case.info["runs"].items():
            size = (row["height"], row["width"])
            options = {"img_size": size, "rest": "drop", "return_report": True}  # as transformers does
            model, variables, report = dyntoken.load_pretrained(folder, **options)
            left = list(report.unexpected)
            ledger.same(f"{run}: keys without a place", left, [])
            out, pooled = pretrained.compare(ledger, run, model, variables, _positions(variables, tensors))
            ledger.offer(f"{run}.eval.pooler_output", pooled)
            if out.heads is not None:
                ledger.offer(f"{run}.eval.logits_cls", out.heads[0])
                ledger.offer(f"{run}.eval.logits_dist", out.heads[1])
        _written(ledger, case, tensors)
        renamed = in_memory(tensors, case.info.get("in_memory_keys", {}))
        save_file(renamed, place / "model.safetensors", {"format": "pt"})
        again = dyntoken.load_pretrained(folder, img_size=size, rest="drop")[1]
        one, other = weights.flat_variables(variables), weights.flat_variables(again)
        ledger.same("arrays under the names in memory", sorted(other), sorted(one))
        for path in one.keys() & other.keys():
            ledger.equal(f"in memory: {path}", other[path], one[path])


def _written(ledger: Ledger, case: Case, tensors: dict[str, np.ndarray]) -> None:
    """The file written again: the same names, and the same bits where reading adds nothing together."""
    config = case.info["config_json"]
    written, about = weights.to_transformers(*dyntoken.load_pretrained(tensors, config=config, rest="drop"))
    ledger.same("written: keys", sorted(written), sorted(tensors))
    gated = bool(config.get("use_swiglu_ffn"))  # hidden_act is not read then
    wrong = {k: v for k, v in about.items() if config.get(k) != v and not (gated and k == "hidden_act")}
    ledger.same("written: settings", wrong, {})
    summed = ("cls_token", "position_embeddings") if any("register_tokens" in key for key in tensors) else ()
    for key in written.keys() & tensors.keys():
        if not key.endswith((*summed, "mask_token")):
            ledger.equal(f"written: {key}", written[key], tensors[key])


def _positions(variables: Any, tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    """The position embedding with a row for the class token, which ours may have added to the token."""
    ours = variables["params"]["backbone"].get("pos_embed")
    theirs = next((value for key, value in tensors.items() if key.endswith("position_embeddings")), None)
    registers = any(key.endswith("register_tokens") for key in tensors)
    return np.concatenate([theirs[:, :1], ours], axis=1) if registers and theirs is not None else ours


def in_memory(tensors: dict[str, np.ndarray], names: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as a state dict of version 5 names them; a list of names are parts of equal size."""
    found = {key: value for key, value in tensors.items() if key not in names}
    for key, other in names.items():
        others = [other] if isinstance(other, str) else other
        found |= dict(
            zip(others, map(np.ascontiguousarray, np.split(tensors[key], len(others))), strict=True)
        )
    return found
