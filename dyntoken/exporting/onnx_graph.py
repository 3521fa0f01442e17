"""An ONNX graph in the making: nodes, constants and the values between them.

A broadcast writes no node: its value keeps the shape it has, since most nodes
of ONNX broadcast by themselves, and only what needs the whole shape (`full`)
expands it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Value(NamedTuple):
    """A constant, or the name of a node's output, and the shape it has so far: 1 where it is to be repeated."""

    data: np.ndarray | str
    shape: tuple[Any, ...]


class Graph:
    """Nodes and constants so far."""

    def __init__(self, inputs: Mapping[str, Any]):
        self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        self.constants: dict[Any, tuple[str, np.ndarray]] = {}
        self.source = next(iter(inputs))
        self.batch = inputs[self.source].shape[0]

    def add(self, kind: str, inputs: Sequence[Any], outputs: Sequence[str] | int = 1, **options: Any) -> Any:
        """Appends a node of `Value`s, arrays or names; returns the name of its output, or all of them."""
        if isinstance(outputs, int):
            outputs = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append((kind, [self.name(one) for one in inputs], list(outputs), options))
        return outputs[0] if len(outputs) == 1 else outputs

    def name(self, value: Any) -> str:
        """Of a value; a constant gets one."""
        data = value.data if isinstance(value, Value) else value
        if isinstance(data, str):
            return data
        data = np.asarray(data)
        key = (data.dtype.str, data.shape, data.tobytes()) if data.size <= 64 else id(data)
        return self.constants.setdefault(key, (f"constant_{len(self.constants)}", data))[0]

    def needed(self, outputs: Mapping[str, Any]) -> list[Any]:
        """The nodes that outputs depend on, in order, as ONNX has them; named, as converters to float16 expect."""
        import onnx

        wanted, kept = set(outputs), []
        for kind, inputs, results, options in reversed(self.nodes):
            if wanted & set(results):
                wanted |= set(inputs)
                kept.append(onnx.helper.make_node(kind, inputs, results, name=results[0], **options))
        self.used = wanted
        return kept[::-1]

    def tensors(self) -> list[Any]:
        """The constants that `needed` found in use."""
        import onnx

        found = [(name, data) for name, data in self.constants.values() if name in self.used]
        for _, data in found:
            type_number(data.dtype)
        return [onnx.numpy_helper.from_array(np.asarray(data, order="C"), name) for name, data in found]

    def entry(self, value: Value, number: int) -> Value:
        """One entry of the first axis."""
        if not isinstance(value.data, str):
            return constant(value.data[number])
        return Value(self.add("Gather", [value, np.asarray(number, np.int64)], axis=0), value.shape[1:])

    def reshape(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """The same numbers in another shape, in which at most one size is symbolic."""
        if value.shape == shape:
            return value
        if not isinstance(value.data, str):
            return Value(value.data.reshape(shape), shape)
        return Value(self.add("Reshape", [value, size_list(shape)]), shape)

    def full(self, value: Value, aval: Any) -> Value:
        """The value in the whole shape that the jaxpr gives it."""
        if value.shape == tuple(aval.shape):
            return value
        new = [size if size != have else 1 for size, have in zip(aval.shape, value.shape, strict=True)]
        if all(static(size) for size in new):
            if not isinstance(value.data, str):
                return Value(np.broadcast_to(value.data, aval.shape), aval.shape)
            return Value(self.add("Expand", [value, size_list(new)]), aval.shape)
        sizes = self.add("Concat", [self.size(one) for one in new], axis=0)
        return Value(self.add("Expand", [value, sizes]), aval.shape)

    def size(self, size: Any) -> Any:
        """A size as a tensor of one number."""
        if static(size):
            return size_list([size])
        batch = self.add("Shape", [self.source], start=0, end=1)
        times = size // self.batch
        return batch if size == self.batch else self.add("Mul", [batch, size_list([int(times)])])

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """The axes in another order."""
        if tuple(axes) == tuple(range(len(axes))):
            return value
        shape = tuple(value.shape[axis] for axis in axes)
        if not isinstance(value.data, str):
            return Value(np.ascontiguousarray(value.data.transpose(axes)), shape)
        return Value(self.add("Transpose", [value], perm=list(axes)), shape)


def type_number(dtype: Any) -> int:
    """ONNX's number of a type."""
    import onnx

    if np.dtype(dtype).name not in (
        "float32",
        "float64",
        "int32",
        "int64",
        "uint8",
        "int8",
        "bool",
        "uint32",
    ):
        raise ValueError(
            f"ONNX files are written of float32 models, this one computes in {np.dtype(dtype).name}"
        )
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def constant(value: Any) -> Value:
    """An array as a value; raises `ValueError` for a key of random draws."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        raise ValueError("ONNX cannot draw as jax does, and this model draws at random: export it as jax")
    array = np.asarray(value)
    return Value(array, array.shape)


def static(size: Any) -> bool:
    """Whether a size is a number, not made of the batch."""
    return isinstance(size, (int, np.integer))


def size_list(shape: Sequence[Any]) -> np.ndarray:
    """A shape as ONNX takes it: -1 where it is the batch."""
    return np.asarray([size if static(size) else -1 for size in shape], np.int64)


def broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape of what operands of these shapes make."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))
