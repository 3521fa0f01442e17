"""A program as an ONNX file: its jaxpr, operation by operation, by one table.

A broadcast writes no node: its value keeps the shape it has, since most nodes
of ONNX broadcast by themselves, and only what needs the whole shape (`full`)
expands it. What is made of weights alone is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dyntoken import __version__
from dyntoken.exporting.programs import Program
from dyntoken.ops import backend

OPSET, IR = 18, 9  # of 2022 and 2023: every runtime in use reads them
FOLDED = 1 << 24  # numbers that a constant may have
SOFTMAX = "last_axis_softmax"  # of ops.attend
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold the body of a call

# One node each, of operands that broadcast.
SAME = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow"},
    **{"exp": "Exp", "log": "Log", "tanh": "Tanh", "erf": "Erf", "logistic": "Sigmoid", "sqrt": "Sqrt"},
    **{"neg": "Neg", "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin"},
    **{"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal"},
    **{"and": "And", "or": "Or", "not": "Not", "cos": "Cos"},
}
SUMS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}
LOGICAL = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}
IDENTITIES = {"stop_gradient", "copy", "copy_p", "optimization_barrier", "reduce_precision"}


class Value(NamedTuple):
    """A constant, or the name of a node's output, and the shape it has so far: 1 where it is to be repeated."""

    data: np.ndarray | str
    shape: tuple[Any, ...]


def to_onnx(part: Program, weights: Mapping[str, Any]) -> bytes:
    """The program with its weights inside; the first axis of its inputs is called `b`.

    Raises:
      ValueError: an operation or a type that there is no node for.
      ImportError: without the package onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("writing ONNX needs the package onnx: pip install 'dyntoken[export]'") from error
    with backend.trace_for("onnx"):
        closed = jax.make_jaxpr(lambda inputs: part.run(weights, inputs))(part.inputs)
    graph = Graph(part.inputs)
    names = sorted(part.inputs)  # as a dict's leaves come
    found = graph.run(closed.jaxpr, closed.consts, [Value(n, part.inputs[n].shape) for n in names])
    for name, value, var in zip(sorted(part.outputs), found, closed.jaxpr.outvars, strict=True):
        graph.add("Identity", [graph.full(value, var.aval)], [name])

    def infos(arrays: Mapping[str, Any]) -> list[Any]:
        shapes = {n: [int(d) if static(d) else str(d) for d in a.shape] for n, a in arrays.items()}
        return [onnx.helper.make_tensor_value_info(n, _type(a.dtype), shapes[n]) for n, a in arrays.items()]

    made = onnx.helper.make_graph(
        graph.needed(part.outputs), part.name, infos(part.inputs), infos(part.outputs), graph.tensors()
    )
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(
        made, opset_imports=opsets, ir_version=IR, producer_name="dyntoken", producer_version=__version__
    )
    return model.SerializeToString()


def _type(dtype: Any) -> int:
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
        """The nodes that outputs depend on, in order, as ONNX has them."""
        import onnx

        wanted, kept = set(outputs), []
        for kind, inputs, results, options in reversed(self.nodes):
            if wanted & set(results):
                wanted |= set(inputs)
                kept.append(onnx.helper.make_node(kind, inputs, results, **options))
        self.used = wanted
        return kept[::-1]

    def tensors(self) -> list[Any]:
        """The constants that `needed` found in use."""
        import onnx

        found = [(name, data) for name, data in self.constants.values() if name in self.used]
        for _, data in found:
            _type(data.dtype)
        return [onnx.numpy_helper.from_array(np.asarray(data, order="C"), name) for name, data in found]

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        """Adds the operations of a jaxpr; from its arguments to its results."""
        values = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return _constant(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else values[atom]

        for eqn in _live(jaxpr):
            values.update(
                zip(eqn.outvars, self.operation(eqn, [read(atom) for atom in eqn.invars]), strict=False)
            )
        return [read(atom) for atom in jaxpr.outvars]

    def operation(self, eqn: Any, args: list[Value]) -> Sequence[Value]:
        """The results of one operation."""
        kind, out = eqn.primitive.name, eqn.outvars[0].aval
        body = next((eqn.params[name] for name in CALLS if name in eqn.params), None)
        if body is not None and kind not in ("scan", "while", "cond"):
            if eqn.params.get("name") == SOFTMAX:
                whole = self.full(args[0], eqn.invars[0].aval)
                return [Value(self.add("Softmax", [whole], axis=-1), out.shape)]
            closed = hasattr(body, "consts")
            return self.run(body.jaxpr if closed else body, body.consts if closed else (), args)
        if kind == "scan":
            return self.unrolled(eqn, args)
        if kind == "broadcast_in_dim":
            shape = [1] * len(out.shape)
            for axis, size in zip(eqn.params["broadcast_dimensions"], args[0].shape, strict=True):
                shape[axis] = size
            return [self.reshape(args[0], tuple(shape))]
        if (folded := _folded(eqn, args)) is not None:
            return folded
        if kind in IDENTITIES:
            return args
        if kind in SAME or kind in POINTWISE:
            names = [self.name(arg) for arg in args]
            made = self.add(SAME[kind], names) if kind in SAME else POINTWISE[kind](self, eqn, names)
            return [Value(made, _broadcast([arg.shape for arg in args]))]
        if kind not in WHOLE:
            raise ValueError(f"there is no ONNX node for the operation {kind!r} of this model")
        operands = [self.full(arg, atom.aval) for arg, atom in zip(args, eqn.invars, strict=True)]
        made = WHOLE[kind](self, eqn, operands)
        outs = made if isinstance(made, list) else [made]
        return [Value(one, var.aval.shape) for one, var in zip(outs, eqn.outvars, strict=True)]

    def unrolled(self, eqn: Any, args: list[Value]) -> list[Value]:
        """A loop, round after round."""
        options, body = eqn.params, eqn.params["jaxpr"]
        first = options["num_consts"]
        last = first + options["num_carry"]
        fixed, carry = args[:first], args[first:last]
        each = [self.full(arg, atom.aval) for arg, atom in zip(args[last:], eqn.invars[last:], strict=True)]
        rounds: list[list[Value]] = []
        for number in sorted(range(options["length"]), reverse=options["reverse"]):
            now = [self.entry(value, number) for value in each]
            found = self.run(body.jaxpr, body.consts, [*fixed, *carry, *now])
            carry, made = found[: len(carry)], found[len(carry) :]
            rounds.append(
                [self.full(v, a.aval) for v, a in zip(made, body.jaxpr.outvars[len(carry) :], strict=True)]
            )
        rounds = rounds[::-1] if options["reverse"] else rounds
        stacked = [Value(_stack(self, 0, list(rows)), ()) for rows in zip(*rounds, strict=True)]
        shapes = [var.aval.shape for var in eqn.outvars[len(carry) :]]
        return [*carry, *(value._replace(shape=shape) for value, shape in zip(stacked, shapes, strict=True))]

    def entry(self, value: Value, number: int) -> Value:
        """One entry of the first axis."""
        if not isinstance(value.data, str):
            return _constant(value.data[number])
        return Value(self.add("Gather", [value, np.asarray(number, np.int64)], axis=0), value.shape[1:])

    def reshape(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """The same numbers in another shape, in which at most one size is symbolic."""
        if value.shape == shape:
            return value
        if not isinstance(value.data, str):
            return Value(value.data.reshape(shape), shape)
        return Value(self.add("Reshape", [value, _sizes(shape)]), shape)

    def full(self, value: Value, aval: Any) -> Value:
        """The value in the whole shape that the jaxpr gives it."""
        if value.shape == tuple(aval.shape):
            return value
        new = [size if size != have else 1 for size, have in zip(aval.shape, value.shape, strict=True)]
        if all(static(size) for size in new):
            if not isinstance(value.data, str):
                return Value(np.broadcast_to(value.data, aval.shape), aval.shape)
            return Value(self.add("Expand", [value, _sizes(new)]), aval.shape)
        sizes = self.add("Concat", [self.size(one) for one in new], axis=0)
        return Value(self.add("Expand", [value, sizes]), aval.shape)

    def size(self, size: Any) -> Any:
        """A size as a tensor of one number."""
        if static(size):
            return _sizes([size])
        batch = self.add("Shape", [self.source], start=0, end=1)
        times = size // self.batch
        return batch if size == self.batch else self.add("Mul", [batch, _sizes([int(times)])])

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """The axes in another order."""
        if tuple(axes) == tuple(range(len(axes))):
            return value
        shape = tuple(value.shape[axis] for axis in axes)
        if not isinstance(value.data, str):
            return Value(np.ascontiguousarray(value.data.transpose(axes)), shape)
        return Value(self.add("Transpose", [value], perm=list(axes)), shape)


def _constant(value: Any) -> Value:
    array = np.asarray(value)
    return Value(array, array.shape)


def static(size: Any) -> bool:
    """Whether a size is a number, not made of the batch."""
    return isinstance(size, (int, np.integer))


def _sizes(shape: Sequence[Any]) -> np.ndarray:
    return np.asarray([size if static(size) else -1 for size in shape], np.int64)


def _broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _live(jaxpr: Any) -> list[Any]:
    """The operations that results depend on."""
    wanted, kept = {id(var) for var in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        if any(id(var) in wanted for var in eqn.outvars):
            wanted |= {id(var) for var in eqn.invars}
            kept.append(eqn)
    return kept[::-1]


def _folded(eqn: Any, args: list[Value]) -> list[Value] | None:
    """The results of an operation on constants, None where there are others or they would be large."""
    shapes = [var.aval.shape for var in (*eqn.invars, *eqn.outvars)]
    if any(isinstance(arg.data, str) for arg in args) or not all(
        static(size) for shape in shapes for size in shape
    ):
        return None
    if any(np.prod(shape, dtype=np.int64) > FOLDED for shape in shapes):
        return None
    whole = [np.broadcast_to(arg.data, atom.aval.shape) for arg, atom in zip(args, eqn.invars, strict=True)]
    found = eqn.primitive.bind(*map(jax.numpy.asarray, whole), **eqn.params)
    return [_constant(one) for one in (found if eqn.primitive.multiple_results else [found])]


# Elementwise: from the names of operands that may still broadcast to the name of the result.


def _cast(graph: Graph, eqn: Any, x: list[str]) -> str:
    return graph.add("Cast", x, to=_type(eqn.outvars[0].aval.dtype))


def _where(graph: Graph, eqn: Any, x: list[str]) -> str:
    if len(x) != 3:
        raise ValueError("there is no ONNX node for a selection among more than two")
    return graph.add("Where", [x[0], x[2], x[1]])


def _power(graph: Graph, eqn: Any, x: list[str]) -> str:
    exponent = np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype)
    return graph.add("Mul", [x[0], x[0]]) if exponent == 2 else graph.add("Pow", [x[0], exponent])


POINTWISE: dict[str, Callable[[Graph, Any, list[str]], str]] = {
    "convert_element_type": _cast,
    "select_n": _where,
    "integer_pow": _power,
    "square": lambda graph, eqn, x: graph.add("Mul", [x[0], x[0]]),
    "rsqrt": lambda graph, eqn, x: graph.add("Reciprocal", [graph.add("Sqrt", x)]),
    "ne": lambda graph, eqn, x: graph.add("Not", [graph.add("Equal", x)]),
    "rem": lambda graph, eqn, x: graph.add("Mod", x, fmod=1),
    "log1p": lambda graph, eqn, x: graph.add("Log", [graph.add("Add", [x[0], np.float32(1)])]),
    "clamp": lambda graph, eqn, x: graph.add("Min", [graph.add("Max", [x[1], x[0]]), x[2]]),
}


# Of whole operands, to the name of the result or the names of all.


def _reduce(graph: Graph, eqn: Any, args: list[Value]) -> str:
    axes, kind = _sizes(eqn.params["axes"]), eqn.primitive.name
    if kind in SUMS and np.issubdtype(eqn.invars[0].aval.dtype, np.floating):
        return graph.add(SUMS[kind], [args[0], axes], keepdims=0)
    # As float32, exact for counts: there is none of truth values, and OpenVINO 2026.4 gets wrong what follows one of
    # whole numbers if the batch is symbolic and more than 1.
    number = graph.add("Cast", args, to=_type(np.float32))
    found = graph.add({**SUMS, **LOGICAL}[kind], [number, axes], keepdims=0)
    return graph.add("Cast", [found], to=_type(eqn.outvars[0].aval.dtype))


def _argmax(graph: Graph, eqn: Any, args: list[Value]) -> str:
    (axis,) = eqn.params["axes"]
    found = graph.add("ArgMax", args, axis=axis, keepdims=0)
    return graph.add("Cast", [found], to=_type(eqn.outvars[0].aval.dtype))


def _slice(graph: Graph, eqn: Any, args: list[Value]) -> str:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    shape = eqn.invars[0].aval.shape
    cut = [a for a, s in enumerate(start) if not (s == 0 and limit[a] == shape[a] and strides[a] == 1)]
    if not cut:
        return graph.name(args[0])
    steps = [_sizes([one[axis] for axis in cut]) for one in (start, limit, strides)]
    return graph.add("Slice", [args[0], *steps[:2], _sizes(cut), steps[2]])


def _pad(graph: Graph, eqn: Any, args: list[Value]) -> str:
    low, high, inner = zip(*eqn.params["padding_config"], strict=True)
    if any(inner):
        raise ValueError("there is no ONNX node for padding between elements")
    return graph.add("Pad", [args[0], _sizes([*low, *high]), args[1]])


def _top_k(graph: Graph, eqn: Any, args: list[Value]) -> list[str]:
    axis = eqn.params.get("axis", -1)
    best, rows = graph.add("TopK", [args[0], _sizes([eqn.params["k"]])], 2, axis=axis)  # equal ones in order
    return [best, graph.add("Cast", [rows], to=_type(eqn.outvars[1].aval.dtype))]


def _split(graph: Graph, eqn: Any, args: list[Value]) -> list[str]:
    sizes = [int(size) for size in eqn.params["sizes"]]
    made = graph.add("Split", [args[0], _sizes(sizes)], len(sizes), axis=eqn.params["axis"])
    return [made] if isinstance(made, str) else list(made)


def _conv(graph: Graph, eqn: Any, args: list[Value]) -> str:
    options = eqn.params
    if options["batch_group_count"] != 1 or any(d != 1 for d in options["lhs_dilation"]):
        raise ValueError("there is no ONNX node for this convolution")
    layout = options["dimension_numbers"]
    x, kernel = graph.transpose(args[0], layout.lhs_spec), graph.transpose(args[1], layout.rhs_spec)
    low, high = zip(*options["padding"], strict=True)
    made = graph.add(
        "Conv",
        [x, kernel],
        strides=list(options["window_strides"]),
        pads=[*low, *high],
        dilations=list(options["rhs_dilation"]),
        group=options["feature_group_count"],
    )
    back = [layout.out_spec.index(axis) for axis in range(len(layout.out_spec))]
    return graph.add("Transpose", [made], perm=back)


def _max_pool(graph: Graph, eqn: Any, args: list[Value]) -> str:
    """Of a grid `[B, H, W, C]`."""
    options = eqn.params
    sides = [options[name] for name in ("window_dimensions", "window_strides")]
    plain = all(side[0] == side[-1] == 1 for side in sides) and len(sides[0]) == 4
    if not plain or any(d != 1 for name in ("base_dilation", "window_dilation") for d in options[name]):
        raise ValueError("there is no ONNX node for this pooling")
    low, high = zip(*options["padding"][1:3], strict=True)
    x = graph.transpose(args[0], (0, 3, 1, 2))
    window, strides = (list(side[1:3]) for side in sides)
    made = graph.add("MaxPool", [x], kernel_shape=window, strides=strides, pads=[*low, *high])
    return graph.add("Transpose", [made], perm=[0, 2, 3, 1])


def _stack(graph: Graph, axis: int, args: list[Value]) -> str:
    parts = [graph.add("Unsqueeze", [arg, _sizes([axis])]) for arg in args]
    return graph.add("Concat", parts, axis=axis)


def _dot(graph: Graph, eqn: Any, args: list[Value]) -> str:
    """As one MatMul: `[batch, free, contracted]` with `[batch, contracted, free]`."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = args
    free = [
        [axis for axis in range(len(value.shape)) if axis not in (*summed, *batched)]
        for value, summed, batched in ((left, left_sum, left_batch), (right, right_sum, right_batch))
    ]
    left = graph.transpose(left, [*left_batch, *free[0], *left_sum])
    right = graph.transpose(right, [*right_batch, *right_sum, *free[1]])
    if len(left_sum) == 1 and len(free[1]) == 1 and (not left_batch or len(free[0]) == 1):
        return graph.add("MatMul", [left, right])  # the usual ones: a layer, attention
    count = len(left_batch)
    batch, summed = left.shape[:count], _product(right.shape[count : count + len(right_sum)])
    left = graph.reshape(left, (*batch, _product(left.shape[count : count + len(free[0])]), summed))
    right = graph.reshape(right, (*batch, summed, _product(right.shape[count + len(right_sum) :])))
    made = graph.add("MatMul", [left, right])
    return graph.add("Reshape", [made, _sizes(eqn.outvars[0].aval.shape)])


def _product(sizes: Sequence[Any]) -> Any:
    found: Any = 1
    for size in sizes:
        found = size * found
    return found


def _gather(graph: Graph, eqn: Any, args: list[Value]) -> str:
    """Slices at a computed place; rows that all of a batch share; rows of its own for each of a batch."""
    how, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    x, index = args
    rank, at = len(x.shape), how.start_index_map
    if len(index.shape) == 1 and not how.operand_batching_dims:
        ends = [sizes[axis] for axis in at]
        starts = Value(graph.add("Cast", [index], to=_type(np.int64)), index.shape)
        if not isinstance(index.data, str):
            starts = _constant(index.data.astype(np.int64))
        stops = (
            graph.add("Add", [starts, _sizes(ends)])
            if isinstance(starts.data, str)
            else starts.data + _sizes(ends)
        )
        found = graph.add("Slice", [x, starts, stops, _sizes(at)])
        if how.collapsed_slice_dims:
            found = graph.add("Squeeze", [found, _sizes(how.collapsed_slice_dims)])
        return found
    batched = how.operand_batching_dims
    whole = [axis for axis in range(rank) if axis not in (*at, *batched)]
    if len(at) != 1 or how.collapsed_slice_dims != at or any(sizes[a] != x.shape[a] for a in whole):
        raise ValueError(f"there is no ONNX node for gathering by {how}")
    x = graph.transpose(x, [*batched, *at, *whole])
    rows = graph.add("Cast", [index], to=_type(np.int64))
    found = graph.add("GatherND", [x, rows], batch_dims=len(batched))  # [index axes, the rest]
    made = len(eqn.outvars[0].aval.shape)
    first = [axis for axis in range(made) if axis not in how.offset_dims]
    order = [*first, *how.offset_dims]
    return graph.name(
        graph.transpose(Value(found, (None,) * made), [order.index(axis) for axis in range(made)])
    )


WHOLE: dict[str, Callable[[Graph, Any, list[Value]], Any]] = {
    **dict.fromkeys((*SUMS, *LOGICAL), _reduce),
    "argmax": _argmax,
    "slice": _slice,
    "pad": _pad,
    "top_k": _top_k,
    "split": _split,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "gather": _gather,
    "reduce_window_max": _max_pool,
    "stack": lambda graph, eqn, x: _stack(graph, eqn.params["axis"], x),
    "concatenate": lambda graph, eqn, x: graph.add("Concat", x, axis=eqn.params["dimension"]),
    "transpose": lambda graph, eqn, x: graph.name(graph.transpose(x[0], eqn.params["permutation"])),
    "reshape": lambda graph, eqn, x: graph.name(graph.reshape(x[0], eqn.outvars[0].aval.shape)),
    "squeeze": lambda graph, eqn, x: graph.name(graph.reshape(x[0], eqn.outvars[0].aval.shape)),
}
