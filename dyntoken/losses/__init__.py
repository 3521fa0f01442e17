"""Losses by name, each a pair (sum, count), and their weighted sum, the `Objective`.

A loss is `fn(output, batch, **options) -> (sum, count)`, both float32 scalars
over the rows (or tokens) that the batch holds; the loss is `sum / count`. Pairs
add up over devices and steps, so a mean never becomes a mean of means. `count`
carries no gradient, so that it can be summed over devices before the backward
pass. Where nothing counts, sum and count are 0 and every gradient is finite.

Of a model with exits (`Output.logits` `[E, B, K]`) a loss may return one sum per
exit, `[E]`, with a common count: the loss is then the sum over the exits of
`weights[e] * sum[e] / count`, by default with all weights 1, as DVT trains
(blackfeather-wang/Dynamic-Vision-Transformer).

`batch` is a dict: `"target"` `[B, K]` soft targets, `"mask"` `[B]` weight of
each row (0 for padding; all ones if absent), for distillation `"teacher"`,
the `Output` of the teacher (frozen, or the model itself) on the same images, and optionally `"dense"`
`[B, N, K]`, labels of the patches (`token_label`).

A list of losses is written as `(name, options)` pairs, or as a mapping, where
`options` may hold `weight` (default 1) and, of a model with exits, `weights` (one
number per exit). `"ce#small"` is the loss `ce` under another name, so that one
loss can be used twice. To add a loss: one function, one line in `LOSSES`, or `register_loss`
from a module of yours.
"""

from dyntoken.losses.objective import LOSSES, Objective, Specs, Term, average, keywords, register_loss

__all__ = ["LOSSES", "Objective", "Specs", "Term", "average", "keywords", "register_loss"]
