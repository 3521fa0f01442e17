"""What all backbones are: images to tokens, with sites where a method reduces them."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.reduction_sites import ReductionSites
from dyntoken.nn.remat import Remat, check_policy
from dyntoken.nn.spec import Site
from dyntoken.schema import Count, Positive, Rate, Size
from dyntoken.types import DType


class Backbone(ReductionSites, nn.Module):
    """Base of `Isotropic`, `RegrownStages` and `DualPathStages`.

    Called with `(images [B, H, W, in_chans], Context)`, a backbone returns its
    normalised `Tokens`, one `Reduction` per site and the records asked for.
    `required` names what a subclass defines.

    It can show the tokens after each of its `taps` blocks (or stages: `tap_noun`);
    `one_width` says that its final norm fits all of them.

    Attributes:
      img_size: pixels, `n` or `(height, width)`.
      in_chans: image channels.
      drop_path: stochastic depth of the last block.
      norm_eps: LayerNorm epsilon.
      remat: recompute blocks in the backward pass: True, or the name of what to
        keep, see `nn.remat.POLICIES`.
      dtype: compute type; parameters stay float32.
      sites: reduction sites.
    """

    img_size: Size = 224
    in_chans: Count = 3
    drop_path: Rate = 0.0
    norm_eps: Positive = 1e-6
    remat: Remat = False
    dtype: DType = jnp.float32
    sites: tuple[Site, ...] = ()

    required = ()
    taps = 0
    tap_noun = "block"
    one_width = False

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Raises ValueError for fields that do not fit together."""
        check_policy(self.remat)

    def make_norm(self) -> layers.LayerNorm:
        """A LayerNorm of the backbone's own epsilon and type."""
        return layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
