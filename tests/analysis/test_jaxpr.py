"""The walk over a jaxpr, against products of shapes worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dyntoken.analysis.jaxpr import operations


def walk(function, *shapes):
    args = [jnp.zeros(shape) if not isinstance(shape, jax.Array) else shape for shape in shapes]
    return [op for op in operations(jax.make_jaxpr(function)(*args)) if op.macs]


def total(function, *shapes):
    return sum(op.macs for op in walk(function, *shapes))


def test_a_layer_counts_rows_times_both_widths():
    (op,) = walk(lambda x, w: x @ w, (2, 5, 3), (3, 7))
    assert (op.kind, op.macs, op.rows) == ("dot", 2 * 5 * 3 * 7, 10)


def test_a_batched_product_has_no_rows():
    (op,) = walk(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), (2, 3, 5, 4), (2, 3, 7, 4))
    assert (op.macs, op.rows) == (2 * 3 * 5 * 7 * 4, 0)


@pytest.mark.parametrize(("groups", "expected"), [(1, 4 * 4 * 6 * 9 * 2), (2, 4 * 4 * 6 * 9 * 1)])
def test_a_convolution_counts_its_taps_and_inputs(groups, expected):
    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    (op,) = walk(conv, (1, 4, 4, 2), (3, 3, 2 // groups, 6))
    assert (op.kind, op.macs) == ("conv", expected)


def test_a_scan_counts_every_step():
    def run(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=11)[0]

    assert total(run, (5, 3), (3, 3)) == 11 * 5 * 9


def test_a_scan_within_a_scan_multiplies():
    def inner(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=2)[0]

    def run(x, w):
        return jax.lax.scan(lambda c, _: (inner(c, w), None), x, length=3)[0]

    assert total(run, (5, 3), (3, 3)) == 6 * 5 * 9


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] @ primals[1]))


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, None))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: with_jvp, lambda f: with_vjp])
def test_calls_are_entered(wrap):
    assert total(wrap(lambda x, w: x @ w), (5, 3), (3, 7)) == 5 * 3 * 7


def test_the_gradient_counts_three_products_of_a_layer_and_its_input():
    def loss(x, w):
        return (x @ w).sum()

    assert total(jax.grad(loss, (0, 1)), (5, 3), (3, 7)) == 3 * 5 * 3 * 7


def test_of_a_cond_the_dearest_branch_counts():
    def run(p, x, w):
        return jax.lax.cond(p, lambda: x @ w, lambda: (x @ w) @ (w.T @ w))

    assert total(run, jnp.array(True), (5, 3), (3, 7)) == 5 * 3 * 7 + 3 * 7 * 7 + 5 * 7 * 7


def test_a_while_loop_over_products_is_refused():
    def run(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ w, x)

    with pytest.raises(ValueError, match="while loop at the top"):
        walk(run, (5, 3), (3, 3))


def test_integer_products_are_book_keeping():
    ids = jnp.zeros((3, 3), jnp.int32)
    assert total(lambda a: a @ a, ids) == 0


def test_paths_hold_scopes_and_no_transformations():
    def run(x, w):
        with jax.named_scope("outer"):
            return jax.jit(jax.vmap(lambda row: jnp.einsum("i,ij->j", row, w)))(x)

    (op,) = walk(run, (5, 3), (3, 7))
    assert op.path == ("outer",)
