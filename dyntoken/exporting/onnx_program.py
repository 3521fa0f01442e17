"""A program as an ONNX file: its jaxpr, operation by operation; what is made of weights alone is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dyntoken import __version__
from dyntoken.exporting.onnx_graph import Graph, Value, broadcast, constant, static, type_number
from dyntoken.exporting.onnx_nodes import IDENTITIES, POINTWISE, SAME, WHOLE, stack
from dyntoken.exporting.programs import LOGITS, Program
from dyntoken.ops import backend

OPSET, IR = 18, 9  # of 2022 and 2023: every runtime in use reads them
FOLDED = 1 << 24  # numbers that a constant may have
SOFTMAX = "last_axis_softmax"  # of ops.attend
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold the body of a call


def to_onnx(part: Program, weights: Mapping[str, Any]) -> bytes:
    """The program with its weights inside; the first axis of its inputs is called `b`, the first output is the logits.

    Raises:
      ValueError: an operation or a type that there is no node for.
      ImportError: without the package onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("writing ONNX needs the package onnx: pip install onnx") from error
    with backend.trace_for("onnx"):
        closed = jax.make_jaxpr(lambda inputs: part.run(weights, inputs))(part.inputs)
    graph = Graph(part.inputs)
    names = sorted(part.inputs)  # as a dict's leaves come
    found = _run(graph, closed.jaxpr, closed.consts, [Value(n, part.inputs[n].shape) for n in names])
    for name, value, var in zip(sorted(part.outputs), found, closed.jaxpr.outvars, strict=True):
        graph.add("Identity", [graph.full(value, var.aval)], [name])

    def infos(arrays: Mapping[str, Any]) -> list[Any]:
        shapes = {n: [int(d) if static(d) else str(d) for d in a.shape] for n, a in arrays.items()}
        return [
            onnx.helper.make_tensor_value_info(n, type_number(a.dtype), shapes[n]) for n, a in arrays.items()
        ]

    outputs = {
        name: part.outputs[name] for name in sorted(part.outputs, key=lambda name: (name != LOGITS, name))
    }
    made = onnx.helper.make_graph(
        graph.needed(outputs), part.name, infos(part.inputs), infos(outputs), graph.tensors()
    )
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(
        made, opset_imports=opsets, ir_version=IR, producer_name="dyntoken", producer_version=__version__
    )
    return model.SerializeToString()


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Adds the operations of a jaxpr; from its arguments to its results."""
    values = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Value:
        return constant(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else values[atom]

    for eqn in _live(jaxpr):
        values.update(
            zip(eqn.outvars, _operation(graph, eqn, [read(atom) for atom in eqn.invars]), strict=False)
        )
    return [read(atom) for atom in jaxpr.outvars]


def _operation(graph: Graph, eqn: Any, args: list[Value]) -> Sequence[Value]:
    """The results of one operation."""
    kind, out = eqn.primitive.name, eqn.outvars[0].aval
    body = next((eqn.params[name] for name in CALLS if name in eqn.params), None)
    if body is not None and kind not in ("scan", "while", "cond"):
        if eqn.params.get("name") == SOFTMAX:
            whole = graph.full(args[0], eqn.invars[0].aval)
            return [Value(graph.add("Softmax", [whole], axis=-1), out.shape)]
        closed = hasattr(body, "consts")
        return _run(graph, body.jaxpr if closed else body, body.consts if closed else (), args)
    if kind == "scan":
        return _unrolled(graph, eqn, args)
    if kind == "broadcast_in_dim":
        shape = [1] * len(out.shape)
        for axis, size in zip(eqn.params["broadcast_dimensions"], args[0].shape, strict=True):
            shape[axis] = size
        return [graph.reshape(args[0], tuple(shape))]
    if (folded := _folded(eqn, args)) is not None:
        return folded
    if kind in IDENTITIES:
        return args
    if kind in SAME or kind in POINTWISE:
        names = [graph.name(arg) for arg in args]
        made = graph.add(SAME[kind], names) if kind in SAME else POINTWISE[kind](graph, eqn, names)
        return [Value(made, broadcast([arg.shape for arg in args]))]
    if kind not in WHOLE:
        raise ValueError(f"there is no ONNX node for the operation {kind!r} of this model: export it as jax")
    operands = [graph.full(arg, atom.aval) for arg, atom in zip(args, eqn.invars, strict=True)]
    made = WHOLE[kind](graph, eqn, operands)
    outs = made if isinstance(made, list) else [made]
    return [Value(one, var.aval.shape) for one, var in zip(outs, eqn.outvars, strict=True)]


def _unrolled(graph: Graph, eqn: Any, args: list[Value]) -> list[Value]:
    """A loop, round after round."""
    options, body = eqn.params, eqn.params["jaxpr"]
    first = options["num_consts"]
    last = first + options["num_carry"]
    fixed, carry = args[:first], args[first:last]
    each = [graph.full(arg, atom.aval) for arg, atom in zip(args[last:], eqn.invars[last:], strict=True)]
    rounds: list[list[Value]] = []
    for number in sorted(range(options["length"]), reverse=options["reverse"]):
        now = [graph.entry(value, number) for value in each]
        found = _run(graph, body.jaxpr, body.consts, [*fixed, *carry, *now])
        carry, made = found[: len(carry)], found[len(carry) :]
        rounds.append(
            [graph.full(v, a.aval) for v, a in zip(made, body.jaxpr.outvars[len(carry) :], strict=True)]
        )
    rounds = rounds[::-1] if options["reverse"] else rounds
    stacked = [Value(stack(graph, 0, list(rows)), ()) for rows in zip(*rounds, strict=True)]
    shapes = [var.aval.shape for var in eqn.outvars[len(carry) :]]
    return [*carry, *(value._replace(shape=shape) for value, shape in zip(stacked, shapes, strict=True))]


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
    return [constant(one) for one in (found if eqn.primitive.multiple_results else [found])]
