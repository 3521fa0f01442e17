"""DVT: a cascade of exits on finer and finer token grids.

Wang et al. 2021, "Not All Images are Worth 16x16 Words"
(blackfeather-wang/Dynamic-Vision-Transformer): every exit sees the whole image,
cut into more tokens than the exit before, whose features and attention logits
it reuses.
"""

from dyntoken.cascade.model import Cascade

__all__ = ["Cascade"]
