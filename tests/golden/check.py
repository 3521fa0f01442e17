"""Dispatch on the kind of a case, and what is printed about it."""

from __future__ import annotations

import dataclasses
import importlib
import time
import traceback
from pathlib import Path

import jax

from tests.golden.case import Case, CaseError
from tests.golden.ledger import Ledger

# kind -> module of `checkers` whose `check(case, ledger)` compares it. A new kind is one file and one line.
KINDS = {
    "deit": "vit",
    "deit_distilled": "vit",
    "dynamicvit_deit": "dynamicvit",
    "dynamicvit_tps_repo": "dynamicvit",
    "dtps_deit": "dynamicvit",
    "dylvvit": "dynamicvit",
    "tps_module": "tps_module",
    "evit_deit": "evit",
    "etps_deit": "evit",
    "t2t_vit": "t2t",
    "lvvit": "lvvit",
    "psvit": "psvit",
    "pvt": "pvt",
    "cvt": "cvt",
    "swin": "swin",
    "dyswin": "dual",
    "dyconvnext": "dual",
    "dvt_deit": "dvt",
    "dvt_t2t": "dvt",
    "pos_embed_resize": "resize",
    "pth_containers": "containers",
    "schedules": "schedules",
    "schedules_backbones": "schedules",
    "flops": "flops",
    "flops_backbones": "flops",
    "dvt_dynamic": "dvt_dynamic",
    "evovit_deit": "evovit",
    "avit_deit": "avit",
    "adavit_deit": "adavit",
    "ltmp_deit": "ltmp",
    "ats_deit": "ats",
    "spvit_deit": "spvit",
    "tome_deit": "tome",
    "tome_deit_distilled": "tome",
    "pitome_deit": "pitome",
    "tofu_deit": "pitome",
    "mctf_deit": "mctf",
    "diffrate_deit": "diffrate",
    "dpcknn_deit": "clustering",
    "kmedoids_deit": "clustering",
    "sinkhorn_deit": "clustering",
    "patchmerger_deit": "clustering",
    "sit_deit": "clustering",
    "vit_timm": "pretrained",
    "dinov2_timm": "pretrained",
    "dinov2_reg_timm": "pretrained",
    "dinov3_timm": "pretrained",
    "siglip2_timm": "pretrained",
    "eva02_timm": "pretrained",
    "vit_hf": "transformers",
    "deit_hf": "transformers",
    "dinov2_hf": "transformers",
    "dinov2_reg_hf": "transformers",
    "dinov3_hf": "transformers",
}

WORST = 12  # arrays printed of a failed case
PASS, FAIL, UNSUPPORTED = "PASS", "FAIL", "UNSUPPORTED"


@dataclasses.dataclass
class Result:
    """Outcome of one case, and the lines to print."""

    name: str
    kind: str
    status: str
    lines: list[str]


def check(folder: Path, verbose: bool = False) -> Result:
    """Checks one case folder.

    Raises:
      CaseError: the folder is no readable case.
    """
    case = Case(folder)
    if case.kind not in KINDS:
        line = f"{case.name}: {UNSUPPORTED} kind {case.kind!r} (built: {', '.join(KINDS)})"
        return Result(case.name, case.kind, UNSUPPORTED, [line])
    ledger = Ledger(case)
    checker = importlib.import_module(f"tests.golden.checkers.{KINDS[case.kind]}")
    start = time.perf_counter()
    try:
        with jax.default_matmul_precision("highest"):
            checker.check(case, ledger)
        ledger.audit()
    except CaseError:
        raise
    except Exception as error:  # whatever breaks is this case's failure, not the end of the run
        ledger.fail(f"{type(error).__name__}: {error}")
        if verbose:
            ledger.note(traceback.format_exc())
    return _report(case, ledger, time.perf_counter() - start, verbose)


def _report(case: Case, ledger: Ledger, seconds: float, verbose: bool) -> Result:
    partly = bool(ledger.unbuilt) and not ledger.failed
    status = PASS if ledger.passed else UNSUPPORTED if partly else FAIL
    relative, absolute = ledger.largest
    head = (
        f"{case.name}: {status}{' in part' * partly} kind {case.kind}, {ledger.compared} arrays compared, "
        f"largest relative difference {relative:.1e}, absolute {absolute:.1e} ({seconds:.0f} s)"
    )
    lines = [head]
    wrong = [row for row in ledger.rows if not row.passed]  # in the order of the forward pass
    for row in ledger.rows if verbose else wrong[:WORST]:
        mark = "ok " if row.passed else "BAD"
        lines.append(
            f"  {mark} {row.name}: absolute {row.absolute:.1e}, relative {row.relative:.1e} {row.detail}"
        )
    if len(wrong) > WORST and not verbose:
        lines.append(f"  BAD {len(wrong) - WORST} more arrays (-v prints all)")
    lines.extend(f"  BAD {message}" for message in ledger.failures)
    lines.extend(f"  not built {name}: {reason}" for name, reason in ledger.unbuilt.items())
    lines.extend(f"  left out {name}: {reason}" for name, reason in ledger.left_out.items())
    lines.extend(f"  note: {note}" for note in ledger.notes)
    return Result(case.name, case.kind, status, lines)
