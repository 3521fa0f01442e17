"""Trees in, trees out: load, save and import weights.

`load_weights` reads our own checkpoints and public ones (timm's DeiT keys);
`import_reference` turns an official model of a reduction method, constructor
arguments and state dict, into a model of this library with its variables.
"""

from dyntoken.weights.errors import NoWeightsError, WeightsError
from dyntoken.weights.load import Report, load_weights, load_whole, save_weights
from dyntoken.weights.pretrained import class_names, images_of, load_pretrained, prepared
from dyntoken.weights.reference import export_reference, import_reference, with_buffers
from dyntoken.weights.to_transformers import to_transformers
from dyntoken.weights.trees import flat_variables, reference_keys, shapes_of

__all__ = [
    "NoWeightsError",
    "Report",
    "WeightsError",
    "class_names",
    "export_reference",
    "flat_variables",
    "images_of",
    "import_reference",
    "load_pretrained",
    "load_weights",
    "load_whole",
    "prepared",
    "reference_keys",
    "save_weights",
    "shapes_of",
    "to_transformers",
    "with_buffers",
]
