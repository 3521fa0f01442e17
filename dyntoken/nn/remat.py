"""What the backward pass keeps of a block and what it computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from dyntoken.ops import backend
from dyntoken.registry import UnknownNameError, suggest

# Names of `jax.checkpoint_policies`, from the least memory to the most; per block half they keep
POLICIES = (
    "nothing_saveable",  # its input only, as remat=True
    "dots_with_no_batch_dims_saveable",  # the products with weights (qkv, proj, fc1, fc2), not those of attention
    "dots_saveable",  # every product, the attention logits [B, heads, T, T] among them
    "everything_saveable",  # all, as remat=False
)
Remat = bool | Literal[POLICIES]


def check_policy(remat: bool | str) -> None:
    """Raises UnknownNameError unless `remat` is a bool or the name of a policy."""
    if not isinstance(remat, bool) and remat not in POLICIES:
        raise UnknownNameError(
            f"unknown remat policy {remat!r}: {suggest(str(remat), POLICIES)} "
            "(or True: keep nothing, False: keep all)"
        )


def rematerialised(
    module: type[nn.Module],
    remat: bool | str,
    *,
    method: str = "__call__",
    static: Sequence[int] = (),
    looped: bool = False,
) -> type[nn.Module]:
    """`module` with a method that the backward pass recomputes, or as it is for False.

    Args:
      remat: see `POLICIES`.
      static: positions of Python arguments, the module itself being 0.
      looped: the module runs inside `lax.scan`, which no optimisation merges
        with its recomputation, so that it needs no barriers. Elsewhere a CPU's compiler does
        (see `ops.backward.after`), and keeps more than without: there nothing is recomputed.
    """
    check_policy(remat)
    if remat is False or (backend.platform() == "cpu" and not looped):
        return module
    return nn.remat(
        module,
        methods=[method],
        static_argnums=tuple(static),
        prevent_cse=not looped,
        policy=_policy(remat),
    )


def _policy(remat: bool | str) -> Callable[..., Any] | None:
    return None if remat is True else getattr(jax.checkpoint_policies, remat)
