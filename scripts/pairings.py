"""Writes the tables of methods and backbones: `python scripts/pairings.py`.

Builds every method on every backbone. The long table, docs/pairings.md, says "yes", "at ..." (blocks
or stages) where the method has sites of its own there, or the number of the reason below. The short
one, in README, has a row per method, and one column for backbones that take the same ones. Besides
the methods: a cascade and a model with exits by depth.
"""

from __future__ import annotations

import pathlib

from dyntoken import architectures, reducers
from dyntoken.backbones import BACKBONES
from dyntoken.models import create_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "pairings.md"
START, END = "<!-- pairings -->\n", "\n<!-- /pairings -->"
EVERYWHERE, SOMEWHERE, NOWHERE = "●", "○", "-"
# Families by their first name, as people call them.
CALLED = {
    "deit_tiny_patch16_224": "ViT, DeiT",
    "deit3_small_patch16_224": "DeiT-III",
    "vit_base_patch16_clip_224": "CLIP",
    "vit_small_patch14_dinov2": "DINOv2",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_base_patch16_siglip_224": "SigLIP",
    "eva02_tiny_patch14_224": "EVA-02",
    "t2t_vit_7": "T2T-ViT",
    "lvvit_t": "LV-ViT",
    "psvit_ti_14": "PS-ViT",
    "pvt_tiny": "PVT",
    "cvt_13": "CvT",
    "swin_tiny_patch4_window7_224": "Swin",
    "convnext_tiny": "ConvNeXt",
}
OF_EXITS = {
    architectures.CASCADE: "an image leaves after a coarse token grid, if sure: DVT, NeurIPS 2021",
    architectures.MULTIEXIT: "an image leaves after some of the blocks, if sure: MSDNet's idea on a ViT",
}


def main() -> None:
    """Replaces the tables between their marks."""
    found = pairings()
    for path, table in ((README, short(found)), (PAGE, markdown(found))):
        before, _, rest = path.read_text().partition(START)
        path.write_text(f"{before}{START}{table}{END}{rest.partition(END)[2]}")


def pairings() -> dict[str, dict[str, str]]:
    """Backbone -> prefix of a name -> "yes", "at ..." or the reason against it.

    A backbone is stood for by the first name of its family.
    """
    return {family.listed[0]: _row(family.listed[0]) for family in architectures.FAMILIES}


def _row(arch: str) -> dict[str, str]:
    known = architectures.parse(arch)
    body = BACKBONES[known.backbone](**known.options, parent=None)
    usual, pool = body.default_sites, {} if body.prefix else {"pool": "mean"}
    row = {}
    for prefix in prefixes():
        try:
            model = create_model(f"{prefix}_{arch}", **pool)
        except ValueError as error:
            row[prefix] = f"no: {error}"
            continue
        sites = model.at if prefix in reducers.METHODS else usual
        row[prefix] = "yes" if sites == usual else _sites(sites, body.depth)
    return row


def _sites(sites: tuple[int, ...], depth: int) -> str:
    if len(sites) > 3 and sites == tuple(range(sites[0], depth)):
        return f"from {sites[0]} on" if sites[0] else "in every block"
    return f"at {', '.join(map(str, sites))}"


def prefixes() -> tuple[str, ...]:
    """First parts of a name: the methods, and the two kinds of exits."""
    return (*reducers.METHODS, architectures.CASCADE, architectures.MULTIEXIT)


def markdown(found: dict[str, dict[str, str]]) -> str:
    """The table and, below it, the reasons, each once; `create_model` adds what works instead."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(prefixes())} |", f"|---|{'---|' * len(prefixes())}"]
    for arch, row in found.items():
        cells = [_cell(text, reasons) for text in row.values()]
        lines.append(f"| `{arch}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes])


def short(found: dict[str, dict[str, str]]) -> str:
    """A row per method, a column for each set of families that take the same methods."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for arch, row in found.items():
        columns.setdefault(tuple(map(_mark, row.values())), []).append(CALLED.get(arch, f"`{arch}`"))
    heads = [", ".join(names) for names in columns.values()]
    lines = [f"| name | follows | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for number, prefix in enumerate(prefixes()):
        source = OF_EXITS[prefix] if prefix in OF_EXITS else reducers.METHODS[prefix].source
        marks = [marks[number] for marks in columns]
        lines.append(f"| `{prefix}` | {source} | {' | '.join(marks)} |")
    return "\n".join(lines)


def _mark(text: str) -> str:
    if text.startswith("no: "):
        return NOWHERE
    return SOMEWHERE if text.startswith("at ") else EVERYWHERE


def _cell(text: str, reasons: list[str]) -> str:
    if not text.startswith("no: "):
        return text
    reason = text.partition("no: ")[2].partition(": ")[2].partition("; ")[0]  # without names and advice
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


if __name__ == "__main__":
    main()
