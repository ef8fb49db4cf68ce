"""What the steps of a scan keep on the host: as little as layers that are written out, with the plain gradients."""

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, steps_of
from models import GPT, ScannedGPT, linen_loss

import nexus_jax as nj
from nexus_jax.flat import flatten
from nexus_jax.flops import count_matmuls
from nexus_jax.offloading import scans

pytestmark = pytest.mark.filterwarnings("ignore::nexus_jax.OffloadWarning")
STEPS, ROWS, D = 5, 8, 16
OFFLOADER = nj.ActivationOffloader(offload_threshold_mb=0.0)


def arguments():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *s: jax.random.normal(next(keys), s) / 4
    return {"up": draw(STEPS, D, 4 * D), "down": draw(STEPS, 4 * D, D), "scale": draw(STEPS, D)}, draw(ROWS, D)


def scan(step, params, x, **kwargs):
    return jax.lax.scan(step, x, params, **kwargs)


def wide(x, p):
    return jnp.tanh(x @ p["up"])


def two_of_one(params, x):  # tanh(x) and 1 - tanh(x)**2
    return scan(lambda x, p: (x + wide(x, p) @ p["down"], None), params, x)[0]


def backwards(params, x):
    return scan(lambda x, p: (x + wide(x, p) @ p["down"], None), params, x, reverse=True)[0]


def unrolled_twice(params, x):
    return scan(lambda x, p: (x + wide(x, p) @ p["down"], None), params, x, unroll=2)[0]


def cast_weights(params, x):  # bf16 copies of f32 parameters
    low = lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
    x, _ = scan(lambda x, p: (x + wide(x, low(p)) @ low(p)["down"], None), params, x.astype(jnp.bfloat16))
    return x.astype(jnp.float32)


def cast_before(params, x):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    x, _ = scan(lambda x, p: (x + wide(x, p) @ p["down"], None), low, x.astype(jnp.bfloat16))
    return x.astype(jnp.float32)


def masked(params, x):  # a mask that every step takes
    mask = jax.nn.sigmoid((x @ x.T) @ x)
    return scan(lambda x, p: (x + mask * (wide(x, p) @ p["down"]) * mask, None), params, x)[0]


def stacks_too(params, x):  # what a step makes is returned as well
    x, made = scan(lambda x, p: (x + wide(x, p) @ p["down"], jnp.sin(x)), params, x)
    return x + jnp.cos(made).sum(0)


def checkpointed(params, x):
    return scan(jax.checkpoint(lambda x, p: (jnp.sin(x + wide(x, p) @ p["down"]), None)), params, x)[0]


def scaled(params, x):
    def step(x, p):
        y = jnp.exp(jnp.sin(x)) * p["scale"]
        return x + wide(y, p) @ p["down"] * jnp.cos(p["scale"]), None

    return scan(step, params, x)[0]


def two_scans(params, x):
    return backwards(params, two_of_one(params, x))


def nested(params, x):
    def outer(x, p):
        x, _ = jax.lax.scan(lambda x, _: (x + wide(x, p) @ p["down"], None), x, None, length=3)
        return jnp.tanh(x), None

    return scan(outer, params, x)[0]


MODELS = [
    two_of_one, backwards, unrolled_twice, cast_weights, cast_before, masked, stacks_too, checkpointed, scaled, two_scans,
    nested,
]  # fmt: skip


def loss_of(model):
    return lambda params, x: jnp.sum(jnp.sin(model(params, x)))


def on_host(loss, *args):
    return [r for r in nj.residuals(OFFLOADER.wrap(loss), *args) if r.place == "host"]


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_plain_ones_and_no_matmul_runs_twice(model):
    args, loss = arguments(), loss_of(model)
    grad = lambda f: jax.value_and_grad(f, (0, 1))
    tolerance = 2e-2 if "cast" in model.__name__ else 1e-5
    assert_close(jax.jit(grad(loss))(*args), jax.jit(grad(OFFLOADER.wrap(loss)))(*args), tolerance)
    assert_close(grad(loss)(*args), grad(OFFLOADER.wrap(loss))(*args), tolerance)  # not jitted
    assert count_matmuls(grad(OFFLOADER.wrap(loss)), *args) == count_matmuls(grad(loss), *args)


@pytest.mark.parametrize("model", MODELS)
def test_no_more_leaves_than_autodiff_keeps(model):
    args, loss = arguments(), loss_of(model)
    kept = [r for r in nj.residuals(loss, *args) if r.place == "device"]
    assert sum(r.nbytes for r in on_host(loss, *args)) <= sum(r.nbytes for r in kept)


@pytest.mark.parametrize(("model", "scans_"), [(two_of_one, 2), (cast_weights, 2), (scaled, 2), (two_scans, 4)])
def test_what_is_made_again_is_made_in_the_step_that_needs_it(model, scans_):
    step = jax.make_jaxpr(jax.grad(OFFLOADER.wrap(loss_of(model)), (0, 1)))(*arguments())
    assert sum(e.primitive.name == "scan" for e in steps_of(step)) == scans_  # none that makes whole stacks


def test_of_two_views_one_leaves():
    found = on_host(loss_of(two_of_one), *arguments())
    carried, hidden = 4 * STEPS * ROWS * D, 4 * STEPS * ROWS * 4 * D
    assert sorted(r.nbytes for r in found) == [carried, hidden]


@pytest.mark.parametrize("model", [cast_weights, cast_before, scaled])
def test_parameters_and_what_is_made_of_them_stay(model):
    args = arguments()
    shapes = {w.shape for w in jax.tree.leaves(args[0])}
    assert shapes.isdisjoint(r.shape for r in on_host(loss_of(model), *args))


def test_what_every_step_takes_is_not_stacked():
    shapes = [r.shape for r in on_host(loss_of(masked), *arguments())]
    assert shapes.count((STEPS, ROWS, D)) == 2  # what is carried, and what the mask is multiplied with
    assert shapes.count((STEPS, ROWS, 4 * D)) == 1


@pytest.mark.parametrize("policy", ["none", "heavy_ops", "all"])
def test_a_layer_of_a_scan_keeps_what_a_written_out_one_keeps(policy):
    tokens = jnp.arange(32).reshape(2, 16) % 64

    def bytes_of(model):
        model = model if policy == "none" else nj.apply_selective_checkpointing(model, policy)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return sum(r.nbytes for r in on_host(linen_loss(model, tokens), params))

    of_a_layer = lambda model: (bytes_of(model(layers=12)) - bytes_of(model(layers=8))) / 4
    assert 0 < of_a_layer(ScannedGPT) <= 1.1 * of_a_layer(GPT)


def test_inside_vmap():
    args, loss = arguments(), loss_of(scaled)
    batch = jnp.stack([args[1], 2 * args[1]])
    each = lambda f: jax.jit(jax.vmap(jax.grad(f, (0, 1)), (None, 0)))(args[0], batch)
    assert_close(each(loss), each(OFFLOADER.wrap(loss)), 1e-5)


def test_a_scan_that_only_maps_joins_the_scan_that_takes_it():
    def program(a, b, x):
        _, made = jax.lax.scan(lambda _, ab: (None, (jnp.sin(ab[0]) * ab[1], ab[0])), None, (a, b))
        return jax.lax.scan(lambda x, c: (x + c[0] * c[1] * c[2], x), x, (*made, b))

    args = (jnp.arange(3.0), jnp.ones(3) * 0.5, jnp.float32(2.0))
    flat = flatten(jax.make_jaxpr(program)(*args))
    joined = scans.fused(flat.jaxpr)
    assert [e.primitive.name for e in joined.eqns] == ["scan"]
    assert len(joined.eqns[0].invars) == 3  # b once
    run = lambda jaxpr: jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, ()))(*args)
    assert_close(run(flat.jaxpr), run(joined), 1e-6)


def test_what_something_else_takes_too_stays_a_scan_of_its_own():
    def program(a, x):
        _, made = jax.lax.scan(lambda _, a: (None, jnp.sin(a)), None, a)
        return jax.lax.scan(lambda x, c: (x + c, x), x, made)[0], made

    flat = flatten(jax.make_jaxpr(program)(jnp.arange(3.0), jnp.float32(2.0)))
    assert [e.primitive.name for e in scans.fused(flat.jaxpr).eqns] == ["scan", "scan"]
