"""Multiply-adds, tokens and parameters of a model: `python -m dyntoken.tools.flops NAME`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from dyntoken.analysis import macs
from dyntoken.tools import cli

TEXT = """\
Counts what one image costs, from shapes alone: one multiply-add is 1, products
and convolutions count, biases, norms, softmax and gathers do not (the papers'
"FLOPs"). Interpolation stands on its own line, outside the total."""
EXAMPLES = """\
  python -m dyntoken.tools.flops deit_small_patch16_224
  python -m dyntoken.tools.flops dtps_deit_small_patch16_224 --keep=0.5 --at=3,5,7,9
  python -m dyntoken.tools.flops evit_deit_base_patch16_384 --json
  python -m dyntoken.tools.flops dvt_t2t_vit_12 --set=exits=7,14"""


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the count of one model; returns the exit status."""
    parser = cli.Parser("flops", TEXT, EXAMPLES)
    cli.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)
    model = cli.build(args)
    count = macs.count(model)
    print(json.dumps(as_json(args.name, model, count)) if args.json else report(args.name, model, count))
    return 0


def as_json(name: str, model: Any, count: macs.Count) -> dict[str, Any]:
    """The object that `--json` prints; multiply-adds are whole numbers, `gmacs` is in 1e9.

    Of a cascade, `gmacs` is a list: the cost up to each exit.
    """
    return {
        "name": name,
        "image": list(count.image_shape),
        "gmacs": macs.gmacs_per_exit(model, count) if macs.exits(model) else count.gmacs,
        "conv": count.conv,
        "dot": count.dot,
        "resize": count.resize,
        "params": count.params,
        "tokens": list(count.tokens),
        "at": list(model.at),
        "keep": kept(model),
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
            }
            for stage in count.stages
        ],
        "modules": {path: value.total for path, value in count.by_module.items()},
    }


def kept(model: Any) -> list[int]:
    """Patch tokens that stay at each site (fused tokens not counted)."""
    return [site.reducer["keep"] for site in model.sites()]


def report(name: str, model: Any, count: macs.Count) -> str:
    """The tables as text."""
    height, width, channels = count.image_shape
    head = f"{name}: image {height} x {width} x {channels}"
    if model.sites():
        keeps, sites = (
            ", ".join(map(str, values)) for values in (kept(model), [site.at for site in model.sites()])
        )
        head += f", {keeps} patch tokens stay at {model.plain().site_noun}s {sites}"
    parts = [head, cli.table(_modules(count))]
    if macs.exits(model):
        costs = macs.gmacs_per_exit(model, count)
        parts.append("up to each exit: " + ", ".join(cli.short(cost * 1e9) for cost in costs))
    if len(count.stages) > 1:
        parts.append(cli.table(_stages(count)))
    if count.resize:
        parts.append(f"resize (outside the total): {cli.short(count.resize)}")
    return "\n\n".join(parts)


def _modules(count: macs.Count) -> list[list[str]]:
    blocks = {block.name: block for block in count.by_block}
    units = dict.fromkeys(macs.unit(path) for path in count.by_module)
    rows = [["module", "tokens", "MACs", "share", "parameters"]]
    named = 0
    for unit in units:
        cost, size = count.under(unit).total, count.params_under(unit)
        named += size
        share = f"{100 * cost / count.total:.1f} %"
        label = unit.replace("backbone/", "").replace("trunk/", "")
        rows.append([label, _tokens(blocks.get(unit)), cli.short(cost), share, cli.short(size)])
    if count.params > named:
        rows.append(["embeddings, last norm", "", "", "", cli.short(count.params - named)])
    rows.append(["total", "", cli.short(count.total), "", cli.short(count.params)])
    return rows


def _tokens(block: macs.Block | None) -> str:
    if block is None:
        return ""
    return str(block.tokens) if block.tokens == block.tokens_out else f"{block.tokens} > {block.tokens_out}"


def _number(block: str) -> str:
    """`4` for a fifth block, `2.4` for that of a third stage."""
    return ".".join(re.findall(r"(?:stage|blocks)_(\d+)", block))


def _stages(count: macs.Count) -> list[list[str]]:
    rows = [["stage", "tokens", "blocks", "MACs", "reducer"]]
    for number, stage in enumerate(count.stages):
        span = f"{_number(stage.names[0])}-{_number(stage.names[-1])}" if stage.names else "-"
        reducer = cli.short(stage.reducer) if stage.reducer else ""
        rows.append([str(number), str(stage.tokens), span, cli.short(stage.macs), reducer])
        if stage.exit is not None:
            rows[-1][0] += f" (exit {stage.exit})"
    return rows


if __name__ == "__main__":
    sys.exit(main())
