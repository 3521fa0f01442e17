"""Models as files that run without this package: `jax.export` artifacts and ONNX.

A folder holds one program per platform (of a model with exits one per exit and
platform), the weights once, and `model.json`, which says what they are.
"""

from dyntoken.exporting.checking import Checked, check, disagreements
from dyntoken.exporting.folder import Exported, export, load_export

__all__ = ["Checked", "Exported", "check", "disagreements", "export", "load_export"]
