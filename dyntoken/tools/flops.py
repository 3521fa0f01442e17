"""Multiply-adds, tokens and parameters of a model.

Counts what one image costs, from shapes alone: one multiply-add is 1, products
and convolutions count, biases, norms, softmax and gathers do not (the papers'
"FLOPs"). Interpolation stands on its own line, outside the total.

examples:
  python -m dyntoken.tools.flops deit_small_patch16_224
  python -m dyntoken.tools.flops dtps_deit_small_patch16_224 --keep=0.5 --at=3,5,7,9
  python -m dyntoken.tools.flops evit_deit_base_patch16_384 --json
  python -m dyntoken.tools.flops dvt_t2t_vit_12 --set=exits=7,14
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from dyntoken.tools import cli


def arguments(parser: cli.Parser) -> None:
    """The options."""
    cli.add_model(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Counts in whole multiply-adds, `gmacs` in 1e9; of a cascade a list, the cost up to each exit."""
    from dyntoken.analysis import macs

    model = cli.build(args)
    count = macs.count(model)
    units = dict.fromkeys(map(macs.unit, count.by_module))
    return {
        "name": args.name,
        "image": list(count.image_shape),
        "gmacs": macs.gmacs(model, count),
        "conv": count.conv,
        "dot": count.dot,
        "resize": count.resize,
        "params": count.params,
        "tokens": list(count.tokens),
        "at": list(model.at),
        "keep": [site.reducer["keep"] for site in model.sites()],  # without fused tokens
        "sites": {model.plain().site_noun: [site.at for site in model.sites()]} if model.sites() else {},
        "blocks": [
            {
                "name": block.name,
                "tokens": block.tokens,
                "tokens_out": block.tokens_out,
                "macs": block.macs.total,
                "params": block.params,
            }
            for block in count.by_block
        ],
        "stages": [
            {
                "tokens": stage.tokens,
                "blocks": list(stage.blocks),
                "macs": stage.macs,
                "reducer": stage.reducer,
                "exit": stage.exit,
                "names": list(stage.names),
            }
            for stage in count.stages
        ],
        "modules": {path: value.total for path, value in count.by_module.items()},
        "units": {
            unit: {"macs": count.under(unit).total, "params": count.params_under(unit)} for unit in units
        },
    }


def report(found: dict[str, Any]) -> str:
    """The tables."""
    height, width, channels = found["image"]
    head = f"{found['name']}: image {height} x {width} x {channels}"
    for noun, sites in found["sites"].items():
        keeps, places = (", ".join(map(str, numbers)) for numbers in (found["keep"], sites))
        head += f", {keeps} patch tokens stay at {noun}s {places}"
    parts = [head, _modules(found)]
    if isinstance(found["gmacs"], list):
        costs = ", ".join(cli.short(cost * 1e9) for cost in found["gmacs"])
        parts.append(f"up to each exit: {costs}")
    if len(found["stages"]) > 1:
        parts.append(_stages(found["stages"]))
    if found["resize"]:
        parts.append(f"resize (outside the total): {cli.short(found['resize'])}")
    return "\n\n".join(parts)


def _modules(found: dict[str, Any]) -> str:
    total = found["conv"] + found["dot"]
    blocks = {block["name"]: (block["tokens"], block["tokens_out"]) for block in found["blocks"]}
    rows = [["module", "tokens", "MACs", "share", "parameters"]]
    for path, unit in found["units"].items():
        tokens = " > ".join(map(str, dict.fromkeys(blocks.get(path, ()))))
        share = f"{100 * unit['macs'] / total:.1f} %"
        label = path.replace("backbone/", "").replace("trunk/", "")
        rows.append([label, tokens, cli.short(unit["macs"]), share, cli.short(unit["params"])])
    rest = found["params"] - sum(unit["params"] for unit in found["units"].values())
    if rest > 0:
        rows.append(["embeddings, last norm", "", "", "", cli.short(rest)])
    return cli.table([*rows, ["total", "", cli.short(total), "", cli.short(found["params"])]])


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [["stage", "tokens", "blocks", "MACs", "reducer"]]
    for number, stage in enumerate(stages):
        # `4` for a fifth block, `2.4` for that of a third stage of the backbone.
        numbers = [".".join(re.findall(r"(?:stage|blocks)_(\d+)", name)) for name in stage["names"]]
        span = f"{numbers[0]}-{numbers[-1]}" if numbers else "-"
        label = f"{number}" if stage["exit"] is None else f"{number} (exit {stage['exit']})"
        reducer = cli.short(stage["reducer"]) if stage["reducer"] else ""
        rows.append([label, str(stage["tokens"]), span, cli.short(stage["macs"]), reducer])
    return cli.table(rows)


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
