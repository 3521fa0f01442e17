"""The operations of a jaxpr as nodes of ONNX, by two tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dyntoken.exporting.onnx_graph import Graph, Value, constant, size_list, type_number

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


# Elementwise: from the names of operands that may still broadcast to the name of the result.


def _cast(graph: Graph, eqn: Any, x: list[str]) -> str:
    return graph.add("Cast", x, to=type_number(eqn.outvars[0].aval.dtype))


def _where(graph: Graph, eqn: Any, x: list[str]) -> str:
    if len(x) != 3:
        raise ValueError("there is no ONNX node for a selection among more than two")
    return graph.add("Where", [x[0], x[2], x[1]])


def _power(graph: Graph, eqn: Any, x: list[str]) -> str:
    exponent = np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype)
    return graph.add("Mul", [x[0], x[0]]) if exponent == 2 else graph.add("Pow", [x[0], exponent])


def _expm1(graph: Graph, eqn: Any, x: list[str]) -> str:
    """`tanh(x / 2) (exp(x) + 1)`: the same, and as precise near 0."""
    half = graph.add("Tanh", [graph.add("Mul", [x[0], np.float32(0.5)])])
    return graph.add("Mul", [half, graph.add("Add", [graph.add("Exp", x), np.float32(1)])])


POINTWISE: dict[str, Callable[[Graph, Any, list[str]], str]] = {
    "convert_element_type": _cast,
    "select_n": _where,
    "integer_pow": _power,
    "square": lambda graph, eqn, x: graph.add("Mul", [x[0], x[0]]),
    "rsqrt": lambda graph, eqn, x: graph.add("Reciprocal", [graph.add("Sqrt", x)]),
    "ne": lambda graph, eqn, x: graph.add("Not", [graph.add("Equal", x)]),
    "rem": lambda graph, eqn, x: graph.add("Mod", x, fmod=1),
    "expm1": _expm1,
    "is_finite": lambda graph, eqn, x: graph.add("Less", [graph.add("Abs", x), np.float32(np.inf)]),
    "log1p": lambda graph, eqn, x: graph.add("Log", [graph.add("Add", [x[0], np.float32(1)])]),
    "clamp": lambda graph, eqn, x: graph.add("Min", [graph.add("Max", [x[1], x[0]]), x[2]]),
}


# Of whole operands, to the name of the result or the names of all.


def _reduce(graph: Graph, eqn: Any, args: list[Value]) -> str:
    axes, kind = size_list(eqn.params["axes"]), eqn.primitive.name
    if kind in SUMS and np.issubdtype(eqn.invars[0].aval.dtype, np.floating):
        return graph.add(SUMS[kind], [args[0], axes], keepdims=0)
    # As float32, exact for counts: there is none of truth values, and OpenVINO 2026.4 gets wrong what follows one of
    # whole numbers if the batch is symbolic and more than 1.
    number = graph.add("Cast", args, to=type_number(np.float32))
    found = graph.add({**SUMS, **LOGICAL}[kind], [number, axes], keepdims=0)
    return graph.add("Cast", [found], to=type_number(eqn.outvars[0].aval.dtype))


def _best(graph: Graph, eqn: Any, args: list[Value]) -> str:
    """The first of equal ones: both runtimes do it, also where OpenVINO's TopK does not."""
    (axis,) = eqn.params["axes"]
    found = graph.add(
        {"argmax": "ArgMax", "argmin": "ArgMin"}[eqn.primitive.name], args, axis=axis, keepdims=0
    )
    return graph.add("Cast", [found], to=type_number(eqn.outvars[0].aval.dtype))


def _cumsum(graph: Graph, eqn: Any, args: list[Value]) -> str:
    axis = np.asarray(eqn.params["axis"], np.int64)
    return graph.add("CumSum", [args[0], axis], reverse=int(eqn.params["reverse"]))


def _slice(graph: Graph, eqn: Any, args: list[Value]) -> str:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    shape = eqn.invars[0].aval.shape
    cut = [a for a, s in enumerate(start) if not (s == 0 and limit[a] == shape[a] and strides[a] == 1)]
    if not cut:
        return graph.name(args[0])
    steps = [size_list([one[axis] for axis in cut]) for one in (start, limit, strides)]
    return graph.add("Slice", [args[0], *steps[:2], size_list(cut), steps[2]])


def _pad(graph: Graph, eqn: Any, args: list[Value]) -> str:
    low, high, inner = zip(*eqn.params["padding_config"], strict=True)
    if any(inner):
        raise ValueError("there is no ONNX node for padding between elements")
    return graph.add("Pad", [args[0], size_list([*low, *high]), args[1]])


def _top_k(graph: Graph, eqn: Any, args: list[Value]) -> list[str]:
    axis = eqn.params.get("axis", -1)
    best, rows = graph.add(
        "TopK", [args[0], size_list([eqn.params["k"]])], 2, axis=axis
    )  # equal ones in order
    return [best, graph.add("Cast", [rows], to=type_number(eqn.outvars[1].aval.dtype))]


def _split(graph: Graph, eqn: Any, args: list[Value]) -> list[str]:
    sizes = [int(size) for size in eqn.params["sizes"]]
    made = graph.add("Split", [args[0], size_list(sizes)], len(sizes), axis=eqn.params["axis"])
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


def stack(graph: Graph, axis: int, args: list[Value]) -> str:
    """Arrays of one shape along a new axis; the name of the result."""
    parts = [graph.add("Unsqueeze", [arg, size_list([axis])]) for arg in args]
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
    return graph.add("Reshape", [made, size_list(eqn.outvars[0].aval.shape)])


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
        starts = Value(graph.add("Cast", [index], to=type_number(np.int64)), index.shape)
        if not isinstance(index.data, str):
            starts = constant(index.data.astype(np.int64))
        stops = (
            graph.add("Add", [starts, size_list(ends)])
            if isinstance(starts.data, str)
            else starts.data + size_list(ends)
        )
        found = graph.add("Slice", [x, starts, stops, size_list(at)])
        if how.collapsed_slice_dims:
            found = graph.add("Squeeze", [found, size_list(how.collapsed_slice_dims)])
        return found
    batched = how.operand_batching_dims
    whole = [axis for axis in range(rank) if axis not in (*at, *batched)]
    if len(at) != 1 or how.collapsed_slice_dims != at or any(sizes[a] != x.shape[a] for a in whole):
        raise ValueError(f"there is no ONNX node for gathering by {how}")
    x = graph.transpose(x, [*batched, *at, *whole])
    rows = graph.add("Cast", [index], to=type_number(np.int64))
    found = graph.add("GatherND", [x, rows], batch_dims=len(batched))  # [index axes, the rest]
    made = len(eqn.outvars[0].aval.shape)
    first = [axis for axis in range(made) if axis not in how.offset_dims]
    order = [*first, *how.offset_dims]
    return graph.name(
        graph.transpose(Value(found, (None,) * made), [order.index(axis) for axis in range(made)])
    )


WHOLE: dict[str, Callable[[Graph, Any, list[Value]], Any]] = {
    **dict.fromkeys((*SUMS, *LOGICAL), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _best),
    "cumsum": _cumsum,
    "slice": _slice,
    "pad": _pad,
    "top_k": _top_k,
    "split": _split,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "gather": _gather,
    "reduce_window_max": _max_pool,
    "stack": lambda graph, eqn, x: stack(graph, eqn.params["axis"], x),
    "concatenate": lambda graph, eqn, x: graph.add("Concat", x, axis=eqn.params["dimension"]),
    "transpose": lambda graph, eqn, x: graph.name(graph.transpose(x[0], eqn.params["permutation"])),
    "reshape": lambda graph, eqn, x: graph.name(graph.reshape(x[0], eqn.outvars[0].aval.shape)),
    "squeeze": lambda graph, eqn, x: graph.name(graph.reshape(x[0], eqn.outvars[0].aval.shape)),
}
