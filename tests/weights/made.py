"""Made-up tiny checkpoints in other libraries' layouts, of the arrays of one small ViT."""

from __future__ import annotations

import numpy as np

import dyntoken
from dyntoken import weights
from dyntoken.weights import files, foreign

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}


def model(**options):
    """The model behind a checkpoint."""
    return dyntoken.create_model("vit_small_patch16_224", **{**SMALL, **options})


def variables(of, seed=0):
    """Values for every parameter, also for those that start at 0 or 1."""
    rng = np.random.default_rng(seed)
    shapes = weights.shapes_of(of)
    return {"params": files.nest({path: rng.normal(size=s).astype(np.float32) for path, s in shapes.items()})}


def layout(words):
    """The row of `foreign.LAYOUTS` with these words in its name."""
    return next(row for row in foreign.LAYOUTS if words in row.words)


def written(of, variables, words, block, root="", spelling=0):
    """A model's arrays under the names of a layout, the inverse of `foreign.renamed`.

    Args:
      of, variables: the model.
      words: of the layout.
      block: what stands before a block's names there, `{}` its number.
      root: before all of the model's names but the heads'.
      spelling: which of a row's.
    """
    row, found = layout(words), {}
    blocks, others, heads = (
        {ours: theirs.split("|")[min(spelling, theirs.count("|"))] for theirs, ours in rows}
        for rows in (row.blocks, row.others, row.heads)
    )
    for key, value in weights.export_reference(of, variables).items():
        _, number, name = key.split(".", 2) if key.startswith("blocks.") else ("", "", key)
        table = blocks if number else others | heads
        stem, _, leaf = ("", "", name) if name not in table else (name, "", "")
        if name not in table:
            stem, _, leaf = name.rpartition(".")
        theirs = table.get(stem, stem)
        start, _, parts = theirs.partition("{")
        names = [start + part for part in parts.rstrip("}").split(",")]
        before = "" if stem in heads else root + (block.format(number) if number else "")
        for one, part in zip(names, np.split(value, len(names)), strict=True):
            found[before + ".".join(filter(None, (one, leaf)))] = np.ascontiguousarray(part)
    return found
