"""Official state dicts that differ from the usual keys of their backbone, key by key, both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one official class spells a state dict.

    Attributes:
      renames: (pattern of the usual key, replacement), the first match wins.
      splits: (pattern of the usual key, ((replacement, share), ...)): the rows of
        this array lie in several ones there, in this order and by these shares.
    """

    renames: tuple[tuple[str, str], ...] = ()
    splits: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    def parts(self, key: str) -> list[tuple[str, int]]:
        """The keys that hold an array there, with their shares of its rows."""
        for pattern, parts in self.splits:
            if re.search(pattern, key):
                return [(re.sub(pattern, part, key), share) for part, share in parts]
        for pattern, replacement in self.renames:
            name, count = re.subn(pattern, replacement, key)
            if count:
                return [(name, 1)]
        return [(key, 1)]

    def write(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of usual keys under the class's own."""
        found = {}
        for key, value in tensors.items():
            parts = self.parts(key)
            each = value.shape[0] // sum(share for _, share in parts) if len(parts) > 1 else 0
            cuts = np.cumsum([share * each for _, share in parts[:-1]])
            pieces = np.split(value, cuts) if len(parts) > 1 else [value]
            found.update({name: piece for (name, _), piece in zip(parts, pieces, strict=True)})
        return found

    def read(self, tensors: Mapping[str, np.ndarray], keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Arrays of the class's own keys under those of the usual `keys` that they make up; others stay."""
        found = dict(tensors)
        for key in keys:
            names = [name for name, _ in self.parts(key)]
            if names != [key] and key not in tensors and all(name in found for name in names):
                pieces = [found.pop(name) for name in names]
                found[key] = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return found


USUAL = Dialect()
# Row: `dialect` of a reducer.
DIALECTS = {
    "evovit": Dialect(
        renames=(
            (r"^blocks\.(\d+)\.norm1\.", r"norms.\1."),
            (r"^blocks\.(\d+)\.attn\.proj\.", r"projs.\1."),
            (r"^fc_norm\.", r"norm."),
            (r"^head_token\.", r"head_cls."),
            (r"^head_token_norm\.", r"norm_cls."),
        ),
        splits=((r"^blocks\.(\d+)\.attn\.qkv\.", ((r"qks.\1.qk.", 2), (r"vs.\1.v.", 1))),),
    ),
    "adavit": Dialect(
        splits=(
            (
                r"^(blocks\.\d+\.attn\.)qkv\.",
                ((r"\1query.", 1), (r"\1key.", 1), (r"\1value.", 1)),
            ),
        ),
    ),
}
