"""Clustering reducers: literal clusters, addresses of mixtures, what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.reducers.sinkhorn import transport
from dyntoken.types import Attended, Tokens
from dyntoken.weights import WeightsError, official

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
# Two groups on a line, and where their rows lie.
LINE = np.array([0.0, 1.0, 2.1, 10.0, 11.0])
TOKENS = Tokens.start(jnp.asarray(np.stack([LINE, 0 * LINE], axis=1)[None], jnp.float32), prefix=0)


def _reduce(preset, seen=None, tokens=TOKENS, **options):
    noise = options.pop("noise", None)
    reducer = dyntoken.make_reducer(preset, keep=2, **options)
    run = functools.partial(reducer.apply, noise=noise)
    variables = jax.jit(reducer.init)(jax.random.key(0), tokens, seen)
    return jax.jit(run)(variables, tokens, seen), variables


def test_density_peaks_are_centres_and_clusters_their_means():
    (tokens, r), variables = _reduce("dpcknn", k_neighbors=2, equal_weight=True)
    assert not variables
    # The two of the right group are equally dense (distance 1); the first counts as denser, as on the left.
    np.testing.assert_array_equal(r.keep, [[0, 3]])
    np.testing.assert_array_equal(r.remap, [[0, 0, 0, 1, 1]])
    np.testing.assert_allclose(tokens.x[0, :, 0], [3.1 / 3, 10.5], atol=1e-4)
    np.testing.assert_array_equal(tokens.size, [[3, 2]])
    np.testing.assert_array_equal(tokens.place, [[0, 3]])
    noise = jnp.asarray([[0.0, 1.0, 0.0, 0.0, 1.0]])  # decides between equals
    (_, r), _ = _reduce("dpcknn", k_neighbors=2, equal_weight=True, noise=noise)
    np.testing.assert_array_equal(np.sort(r.keep), [[1, 4]])


def test_medoids_follow_the_attention_and_the_official_code_avoids_it():
    probs = jnp.broadcast_to(jnp.asarray([0.1, 0.1, 0.9, 0.4, 0.5]), (1, 1, 5, 5))
    (tokens, r), _ = _reduce("kmedoids", Attended(probs=probs))
    np.testing.assert_array_equal(r.keep, [[2, 4]])
    np.testing.assert_array_equal(r.remap, [[0, 0, 0, 1, 1]])
    np.testing.assert_allclose(tokens.x[0, :, 0], [2.1, 11.0])
    (_, r), _ = _reduce("kmedoids", Attended(probs=probs), reference=True)
    np.testing.assert_array_equal(r.keep, [[1, 3]])


def test_two_equal_medoids_are_two_rows_of_which_one_has_the_cell():
    same = Tokens.start(jnp.ones((1, 5, 2)), prefix=0)
    (tokens, r), _ = _reduce("kmedoids", Attended(probs=jnp.ones((1, 1, 5, 5))), tokens=same)
    np.testing.assert_array_equal(r.remap, [[0] * 5])
    np.testing.assert_array_equal(tokens.place, [[0, -1]])
    np.testing.assert_array_equal(tokens.size, [[5, 0]])


def test_the_plan_meets_its_margins():
    logits = jax.random.normal(jax.random.key(0), (1, 3, 3))
    plan = np.asarray(transport(logits, 50))
    np.testing.assert_allclose(plan.sum(axis=1), np.ones((1, 3)), atol=1e-5)
    np.testing.assert_allclose(plan.sum(axis=2), np.ones((1, 3)), atol=1e-5)
    np.testing.assert_allclose(transport(jnp.zeros((1, 2, 4)), 1), np.full((1, 2, 4), 0.5), atol=1e-6)


@pytest.mark.parametrize("preset", ["sinkhorn", "patchmerger", "sit"])
def test_the_address_of_a_mixture_is_its_largest_share(preset):
    x = jax.random.normal(jax.random.key(3), (2, 9, 8))
    (tokens, r), _ = _reduce(preset, tokens=Tokens.start(x, prefix=1, grid=(2, 4)))
    share = np.asarray(r.shares)
    assert share.shape == (2, 2, 8) and tokens.x.shape == (2, 3, 8)
    np.testing.assert_array_equal(r.remap, share.argmax(axis=1))
    np.testing.assert_array_equal(tokens.carrier, r.remap)
    np.testing.assert_array_equal(np.asarray(tokens.size).sum(axis=1), [8, 8])
    for b, k in np.ndindex(2, 2):
        members = np.flatnonzero(np.asarray(r.remap)[b] == k)
        expected = members[share[b, k, members].argmax()] if members.size else -1
        assert tokens.place[b, k] == r.keep[b, k] == expected
    np.testing.assert_array_equal(tokens.x[:, 0], x[:, 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sit_deit_tiny_patch16_224", {"form": "mask"}, "has no mask form: use form='auto' or 'gather'"),
        ("kmedoids_deit_tiny_patch16_224", {"at": (0, 1)}, r"shown only at block 1 and 2 \(at=\(1, 2\)\)"),
        ("dpcknn_deit_tiny_patch16_224", {"k_neighbors": 0}, "k_neighbors"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        model = dyntoken.create_model(name, **{**SMALL, "keep": 0.6, "at": (1,), **options})
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_refused_pairings_say_why():
    for name, message in (
        ("sit_pvt_tiny", "mixtures of patches have no cell on a map"),
        ("kmedoids_pvt_tiny", "none is shown there"),
        ("dpcknn_swin_tiny_patch4_window7_224", "nothing to fuse or merge"),
    ):
        with pytest.raises(ValueError, match=message):
            dyntoken.create_model(name)


def test_no_decision_and_no_mask_replace_the_clusters():
    reducer = dyntoken.make_reducer("patchmerger", keep=2)
    with pytest.raises(ValueError, match="takes no decision on single rows"):
        reducer.init(jax.random.key(0), TOKENS, decision=jnp.ones((1, 5)))
    with pytest.raises(ValueError, match="needs every row alive"):
        reducer.init(jax.random.key(0), TOKENS.replace(alive=jnp.ones((1, 5))))


def test_scan_shows_the_block_before():
    options = {**SMALL, "depth": 5, "at": (3,), "keep": 0.5}
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    plain, scanned = (
        dyntoken.create_model("kmedoids_deit_tiny_patch16_224", **options, scan=scan)
        for scan in (False, True)
    )
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    both = jax.jit(lambda v, x: [model.apply(v, x).logits for model in (plain, scanned)])(variables, images)
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "args", "message"),
    [
        ("SinkhornVisionTransformer", {"cluster_iters": 3}, "it lacks sinkhorn_eps"),
        ("PatchMergerVisionTransformer", {"k_neighbors": 3}, "it has no 'k_neighbors'"),
        ("KMedoidsVisionTransformer", {"cluster_iters": 3, "equal_weight": True}, "starts at a random row"),
        ("SelfSlimmedVisionTransformer", {"keep_rate": [0.5, 0.25]}, "a count of tokens per stage"),
    ],
)
def test_official_arguments_that_cannot_be_imported(cls, args, message):
    given = {"args": {"reduction_loc": [3, 6], "keep_rate": [0.5], **args}}
    with pytest.raises(WeightsError, match=message):
        official.build("JoakimHaurum/TokenReduction", cls, given)


def test_official_counts():
    args = {"reduction_loc": [3, 6], "keep_rate": [0.7]}
    build = functools.partial(official.build, "JoakimHaurum/TokenReduction", "PatchMergerVisionTransformer")
    sites = build({"args": args}).model.sites()
    assert [site.reducer["keep"] for site in sites] == [137, 96]
    sites = build({"args": {**args, "keep_rate": [100, 20]}}).model.sites()
    assert [site.reducer["keep"] for site in sites] == [100, 20]
    assert build({"args": {**args, "reduction_loc": []}}).model.method is None
