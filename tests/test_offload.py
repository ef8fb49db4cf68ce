"""The offloader: residuals in host memory, values unchanged, and never in silence."""

import contextlib
import functools
import threading
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, total, unfused
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax.training import offload

TOKENS = jnp.arange(32).reshape(2, 16) % 64
KB = 1 / 1024
W = jnp.linspace(-1, 1, 20).reshape(4, 5)
pytestmark = pytest.mark.filterwarnings("ignore:on the CPU:nexus_jax.OffloadWarning")


@pytest.fixture(autouse=True)
def fresh_memory():
    """What was offloaded or said before, in another test, must not keep this one from warning."""
    offload._SEEN.clear()
    offload._SAID.clear()


def host_bytes(loss, *args):
    return nj.residuals(loss, *args).host_bytes


@pytest.fixture(scope="module")
def gpt():
    model = GPT(layers=2)
    return model, model.init(jax.random.key(0), TOKENS)


def assert_moved(inside, mb):
    """What is on the host is floating-point and as large as that; of what is on the device, nothing but arguments is."""
    there = [r for r in inside if r.place == "host"]
    here = [r for r in inside if r.place == "device" and r.op != "argument"]
    assert there and all(r.dtype == "float32" and r.nbytes >= mb * 2**20 for r in there)
    assert not [r for r in here if r.dtype == "float32" and r.nbytes >= mb * 2**20]


@pytest.mark.parametrize("mb", [1.5 * KB, 2 * KB, 8 * KB])
def test_context_moves_every_float_residual_from_the_threshold_up(gpt, mb):
    model, params = gpt
    logits = lambda p: total(model.apply(p, TOKENS))
    plain = nj.residuals(lambda p: model.apply(p, TOKENS), params)
    with nj.ActivationOffloader(offload_threshold_mb=mb).offload_context():
        inside = nj.residuals(lambda p: model.apply(p, TOKENS), params)
        grads = unfused(jax.grad(logits), params)
    assert_moved(inside, mb)
    assert (
        inside.nbytes < plain.nbytes
    )  # what elementwise operations make again is not kept beside what they make it of
    assert_close(unfused(jax.grad(logits), params), grads)


def test_jaxpr_says_host(gpt):
    model, params = gpt
    with nj.ActivationOffloader(offload_threshold_mb=2 * KB).offload_context():
        inside = str(jax.make_jaxpr(jax.grad(linen_loss(model, TOKENS)))(params))
    assert "<host>" in inside and "MemorySpace.Device" in inside
    assert "<host>" not in str(jax.make_jaxpr(jax.grad(linen_loss(model, TOKENS)))(params))


def test_warm_jit_cache_neither_hides_nor_leaks(gpt):
    model, params = gpt
    traced = []

    @jax.jit
    def step(params):
        traced.append(1)
        return jax.value_and_grad(linen_loss(model, TOKENS))(params)

    offloader = nj.ActivationOffloader(offload_threshold_mb=2 * KB)
    plain = step(params)
    for _ in range(2):
        with offloader.offload_context():
            inside = step(params)
            assert "<host>" in str(jax.make_jaxpr(step)(params))
    step(params)
    assert len(traced) == 2
    assert "<host>" not in str(jax.make_jaxpr(step)(params))
    assert_close(plain, inside, 1e-5)


def test_nested_contexts_and_exceptions(gpt):
    model, params = gpt
    loss = linen_loss(model, TOKENS)
    outer, inner = (nj.ActivationOffloader(offload_threshold_mb=mb) for mb in (0.0, 8 * KB))
    with outer.offload_context():
        everything = host_bytes(loss, params)
        with inner.offload_context():
            some = host_bytes(loss, params)
        with nj.ActivationOffloader(enabled=False).offload_context():
            assert host_bytes(loss, params) == 0
        with pytest.raises(RuntimeError, match="user's own"), inner.offload_context():
            raise RuntimeError("user's own")
        assert host_bytes(loss, params) == everything
    assert 0 < some < everything
    assert host_bytes(loss, params) == 0


def test_threads_do_not_share_a_context(gpt):
    model, params = gpt
    loss = linen_loss(model, TOKENS)
    found = {}
    with nj.ActivationOffloader(offload_threshold_mb=0.0).offload_context():
        thread = threading.Thread(target=lambda: found.update(other=host_bytes(loss, params)))
        thread.start()
        thread.join()
        found["this"] = host_bytes(loss, params)
    assert found["other"] == 0 < found["this"]


@pytest.mark.parametrize("make", [GPT, ScannedGPT])
def test_composes_with_selective_checkpointing(make):
    model = make(layers=3)
    params = model.init(jax.random.key(0), TOKENS)
    ours = nj.apply_selective_checkpointing(model, "all")
    with nj.ActivationOffloader(offload_threshold_mb=2 * KB).offload_context():
        both = nj.residuals(lambda p: ours.apply(p, TOKENS), params)
        grads = jax.grad(linen_loss(ours, TOKENS))(params)
    kept = nj.residuals(lambda p: ours.apply(p, TOKENS), params)
    assert both.nbytes <= kept.nbytes  # recomputed is recomputed,
    assert_moved(both, 2 * KB)  # and the rest is moved
    assert_close(jax.grad(linen_loss(model, TOKENS))(params), grads, 1e-5)


@pytest.mark.parametrize("kind", ["instance", "class", "function"])
def test_wrap_linen(gpt, kind):
    model, params = gpt
    offloader = nj.ActivationOffloader(offload_threshold_mb=2 * KB)
    loss = linen_loss(model, TOKENS)
    match kind:
        case "instance":
            wrapped = linen_loss(offloader.wrap(model), TOKENS)
        case "class":
            wrapped = linen_loss(offloader.wrap(GPT)(layers=2), TOKENS)
        case "function":
            wrapped = offloader.wrap(loss)
    assert host_bytes(loss, params) == 0 < host_bytes(wrapped, params)
    assert_close(unfused(jax.grad(loss), params), unfused(jax.grad(wrapped), params), 1e-5)


def test_a_wrapped_model_under_jit_says_nothing(gpt):
    """Under jit the backward pass is traced after the model's call has ended: no reason to warn."""
    model, params = gpt
    wrapped = nj.ActivationOffloader(offload_threshold_mb=2 * KB).wrap(model)
    assert "<host>" in str(jax.make_jaxpr(jax.jit(jax.grad(linen_loss(wrapped, TOKENS))))(params))
    wrapped.apply(params, TOKENS)


def test_wrap_and_policy_in_either_order(gpt):
    model, params = gpt
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    one = nj.apply_selective_checkpointing(offloader.wrap(model), "all")
    two = offloader.wrap(nj.apply_selective_checkpointing(model, "all"))
    assert type(one) is type(two)
    sizes = [(r.nbytes, r.host_bytes) for r in (nj.residuals(linen_loss(m, TOKENS), params) for m in (one, two))]
    assert sizes[0] == sizes[1] and sizes[0][1] > 0


def test_wrap_nnx():
    model = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    loss = lambda m: loss_of(m(TOKENS), TOKENS)
    offloader = nj.ActivationOffloader(offload_threshold_mb=2 * KB)
    wrapped = offloader.wrap(model)
    assert nj.residuals(loss, model).host_bytes == 0 < nj.residuals(loss, wrapped).host_bytes
    plain, ours = (nnx.to_pure_dict(nnx.grad(loss)(m)) for m in (model, wrapped))
    assert_close(plain, ours, 1e-5)
    function = nnx.grad(offloader.wrap(loss))(model)
    assert_close(plain, nnx.to_pure_dict(function), 1e-5)


def test_context_reaches_a_transformed_nnx_model():
    ours = nj.apply_selective_checkpointing(NNXGPT(layers=2, rngs=nnx.Rngs(0)), "all")
    loss = lambda m: loss_of(m(TOKENS), TOKENS)
    with nj.ActivationOffloader(offload_threshold_mb=2 * KB).offload_context():
        assert nj.residuals(loss, ours).host_bytes > 0
        nnx.grad(loss)(ours)


def test_context_reaches_a_plain_nnx_model():
    model = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    loss = lambda m: loss_of(m(TOKENS), TOKENS)
    step = lambda m: nnx.value_and_grad(loss)(m)
    plain = unfused(step, model)
    offloader = nj.ActivationOffloader(offload_threshold_mb=2 * KB)
    wrapped = nj.residuals(offloader.wrap(loss), model)
    with offloader.offload_context():
        inside = nj.residuals(loss, model)
        ours = unfused(step, model)
        assert "<host>" in str(jax.make_jaxpr(lambda s: step(nnx.merge(nnx.graphdef(model), s)))(nnx.state(model)))
    assert inside.host_bytes == wrapped.host_bytes > 0
    assert_close(jax.tree.leaves(plain), jax.tree.leaves(ours), 1e-5)
    assert host_bytes(loss, model) == 0


@pytest.mark.parametrize("mode", ["graph", "tree"])
def test_context_leaves_a_plain_nnx_models_state_as_it_is(mode):
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(8, 16, use_bias=False, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
            # in tree mode nnx.grad itself refuses a model that holds keys
            self.dropout = nnx.Dropout(0.5, rngs=rngs) if mode == "graph" else jnp.sin

        def __call__(self, x):
            return self.dropout(jnp.sin(self.norm(self.dense(x))))

    x, weigh = (jnp.sin(7.0 * jnp.arange(8 * n)).reshape(8, n) for n in (8, 16))

    def run(context):
        model = Noisy(nnx.Rngs(0))
        loss = lambda m, x: (jnp.sum(m(x) * weigh), m.norm.mean.get_value())
        with context, nnx.set_graph_mode(mode == "graph"), nnx.set_graph_updates(mode == "graph"):
            out, grads = nnx.value_and_grad(loss, has_aux=True)(model, x)
        return [*jax.tree.leaves((out, grads)), *(raw(x) for x in jax.tree.leaves(nnx.state(model)))]

    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    plain, ours = run(contextlib.nullcontext()), run(offloader.offload_context())
    assert_close(plain, ours, 1e-5)
    assert offloader._seen.offloaded > 0


@pytest.mark.parametrize(
    "transform", [jax.grad, jax.value_and_grad, jax.jacrev, lambda f: lambda w: jax.vjp(f, w)[1](1.0)]
)
def test_context_reaches_plain_functions(transform):
    x = jnp.linspace(0, 1, 12).reshape(3, 4)
    call = lambda w: transform(lambda w: jnp.sum(jnp.sin(x @ w)))(w)
    plain = call(W)
    with nj.ActivationOffloader(offload_threshold_mb=0.0).offload_context():
        assert "<host>" in str(jax.make_jaxpr(call)(W))
        ours = call(W)
    assert "<host>" not in str(jax.make_jaxpr(call)(W))
    chex.assert_trees_all_close(plain, ours, rtol=1e-6)


def test_hessians_in_a_context():
    f = lambda w: jnp.sum(jnp.sin(jnp.ones((3, 4)) @ w) ** 3)
    expected = jax.hessian(f)(W), jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2))(W)
    with nj.ActivationOffloader(offload_threshold_mb=0.0).offload_context():
        chex.assert_trees_all_close(expected, (jax.hessian(f)(W), jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2))(W)))


def deep(ws, x):
    """Layers, each a step between fences."""
    for w in ws:
        x = jnp.tanh(x @ w) + x
    return jnp.sum(x * jnp.sin(x))


def scanned(ws, x):
    return jnp.sum(jnp.sin(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) + x, None), x, ws)[0]))


PENALTY = lambda f: jax.grad(lambda ws, x: jnp.sum(jax.grad(f, 1)(ws, x) ** 2))
DERIVATIVES = {
    "jvp": lambda f: lambda ws, x: jax.jvp(f, (ws, x), (ws, x)),
    "jvp by one of them": lambda f: lambda ws, x: jax.jvp(lambda x: f(ws, x), (x,), (x,)),
    "linearize": lambda f: lambda ws, x: jax.linearize(f, ws, x)[1](ws, x),
    "forward": lambda f: jax.jacfwd(f, 1),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f), 1),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f, 1)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f, 1), 1),
    "gradient penalty": PENALTY,
    "gradient penalty of a jitted gradient": lambda f: jax.grad(lambda ws, x: jnp.sum(jax.jit(jax.grad(f, 1))(ws, x) ** 2)),
    "per example": lambda f: lambda ws, x: jax.vmap(jax.grad(f), (None, 0))(ws, jnp.stack([x, 2 * x])),
    "of a sum over examples": lambda f: jax.grad(lambda ws, x: jax.vmap(f, (None, 0))(ws, jnp.stack([x, 2 * x])).sum()),
    "forward, of examples": lambda f: lambda ws, x: jax.vmap(lambda x: jax.jvp(f, (ws, x), (ws, x)))(jnp.stack([x, 2 * x])),
    "checkpointed": lambda f: jax.grad(jax.checkpoint(f)),
    "forward, in a scan": lambda f: lambda ws, x: jax.jvp(lambda x: jax.lax.scan(lambda c, t: (c + f(ws, t * x), None), 0.0, x[0])[0], (x,), (x,)),
}  # fmt: skip


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("model", [deep, scanned])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_derivative_is_the_plain_one(derivative, model, jit):
    ws, x = jax.random.normal(jax.random.key(0), (6, 4, 4)) / 2, jax.random.normal(jax.random.key(1), (3, 4))
    ours = nj.ActivationOffloader(offload_threshold_mb=0.0, prefetch_ahead=1).wrap(model)
    assert host_bytes(ours, ws, x)
    run = jax.jit if jit else lambda f: f
    assert_close(run(derivative(model))(ws, x), run(derivative(ours))(ws, x), 1e-5)


def test_making_what_is_on_the_host_again_takes_the_matmuls_that_made_it():
    """And not the conditionals between the layers."""
    ws, x = jax.random.normal(jax.random.key(0), (6, 4, 4)) / 2, jax.random.normal(jax.random.key(1), (3, 4))
    found = nj.residuals(nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(deep), ws, x)
    again = [r.recompute.matmuls for r in found if r.place == "host"]
    assert sorted(set(again)) == [(("dot_general", n),) for n in (1, 2, 3, 4, 5)]


def test_what_nobody_differentiates_by_keeps_nothing():
    """By the input of the first layer alone: no activation is multiplied with the gradient of a weight."""
    ws, x = jax.random.normal(jax.random.key(0), (6, 4, 4)) / 2, jax.random.normal(jax.random.key(1), (3, 4))
    linear = lambda ws, x: jnp.sum(functools.reduce(jnp.matmul, ws, x))
    ours = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(linear)
    assert host_bytes(ours, ws, x)
    with pytest.warns(nj.OffloadWarning, match="nothing floating-point is kept but arguments"):
        assert "<host>" not in str(jax.make_jaxpr(jax.grad(ours, 1))(ws, x))


def test_context_opened_inside_the_loss_of_a_plain_nnx_model_says_what_to_write():
    def loss(m):
        with nj.ActivationOffloader(offload_threshold_mb=1.5 * KB).offload_context():
            return loss_of(m(TOKENS), TOKENS)

    with pytest.warns(nj.OffloadWarning, match=r"inside the loss, write model = offloader\.wrap\(model\)"):
        nnx.grad(loss)(NNXGPT(layers=2, rngs=nnx.Rngs(0)))


def test_threshold_that_no_residual_reaches_names_the_largest(gpt):
    model, params = gpt
    with (
        pytest.warns(nj.OffloadWarning, match=r"largest residual is 0\.0156 MB, below offload_threshold_mb=10;"),
        nj.ActivationOffloader().offload_context(),
    ):
        jax.grad(linen_loss(model, TOKENS))(params)


@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_wrapped_model_that_no_threshold_reaches_names_the_largest(gpt, kind, jit):
    wrap = nj.ActivationOffloader().wrap
    if kind == "nnx":
        model = wrap(NNXGPT(layers=2, rngs=nnx.Rngs(0)))
        transform, loss, argument = (nnx.jit if jit else lambda f: f), lambda m: loss_of(m(TOKENS), TOKENS), model
        grad = nnx.grad
    else:
        model, argument = gpt
        loss = linen_loss(wrap(model), TOKENS) if kind == "linen" else wrap(linen_loss(model, TOKENS))
        transform, grad = (jax.jit if jit else lambda f: f), jax.grad
    loss(argument)  # nobody differentiates it
    with pytest.warns(nj.OffloadWarning, match=r"largest residual is 0\.0156 MB, below offload_threshold_mb=10;"):
        grad(transform(loss))(argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad(loss)(argument)  # once


def test_what_keeps_nothing_but_arguments_says_so():
    wrapped = nj.ActivationOffloader(offload_threshold_mb=0.0)
    f = wrapped.wrap(lambda w: jnp.sum(jnp.sin(w)))
    with (
        pytest.warns(nj.OffloadWarning, match="nothing floating-point is kept but arguments"),
        wrapped.offload_context(),
    ):
        grads = jax.grad(f)(jnp.eye(4))
    assert jnp.allclose(grads, jnp.cos(jnp.eye(4)))
    with pytest.warns(nj.OffloadWarning, match="nothing floating-point is kept but arguments"):  # in no context
        assert nj.residuals(f, jnp.eye(4)).host_bytes == 0


def test_documented_combination_in_a_forward():
    """The documentation's own example: a checkpointed layer called inside the context."""
    layer = NNXGPT(layers=1, rngs=nnx.Rngs(0)).blocks[0]
    x = jax.random.normal(jax.random.key(0), (2, 16, 32))  # of ones, the norm would divide rounding by rounding
    checkpoint_fn = nj.SelectiveCheckpoint(policy="all")
    with nj.ActivationOffloader(offload_threshold_mb=0.0).offload_context():
        loss = lambda x: total(checkpoint_fn(layer, jnp.sin(x)))
        found = nj.residuals(loss, x)
        grads = jax.grad(loss)(x)
    assert_close(jax.grad(lambda x: total(layer(jnp.sin(x))))(x), grads, 1e-5)
    plain = nj.residuals(lambda x: total(layer(jnp.sin(x))), x)
    assert found.host_bytes == x.nbytes  # the layer's input: all that checkpointing keeps of it
    assert found.nbytes < plain.nbytes


def test_state_and_randomness_are_the_plain_models():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.BatchNorm(use_running_average=False)(nn.Dense(16)(x))
            self.sow("intermediates", "y", y)
            return nn.Dropout(0.5, deterministic=False)(y)

    model, x = Noisy(), jnp.linspace(0, 1, 128).reshape(8, 16)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def run(m):
        def loss(p):
            out, state = m.apply(
                {**variables, "params": p},
                x,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats", "intermediates"],
            )
            return total(out), state

        return unfused(jax.value_and_grad(loss, has_aux=True), variables["params"])

    assert_close(run(model), run(nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(model)))


def test_sharded_over_a_mesh(gpt):
    model, params = gpt
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jax.device_put(jnp.tile(TOKENS, (4, 1)), NamedSharding(mesh, PartitionSpec("data")))
    wrapped = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(model)
    assert host_bytes(linen_loss(model, tokens), params) == 0 < host_bytes(linen_loss(wrapped, tokens), params)
    plain, ours = (jax.jit(jax.grad(linen_loss(m, tokens)))(params) for m in (model, wrapped))
    assert_close(plain, ours, 1e-5)


def test_under_vmap_and_scan(gpt):
    model, params = gpt
    wrapped = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(model)

    def loss(m):
        batches = jnp.stack([TOKENS, TOKENS + 1])

        def both(p):
            mapped = jax.vmap(lambda t: linen_loss(m, t)(p))(batches).sum()
            return jax.lax.scan(lambda carry, t: (carry + linen_loss(m, t)(p), None), mapped, batches)[0]

        return both

    once = host_bytes(linen_loss(wrapped, TOKENS), params)
    assert host_bytes(loss(model), params) == 0
    assert host_bytes(loss(wrapped), params) >= 4 * once > 0  # two under vmap, two steps of the scan
    assert_close(jax.jit(jax.grad(loss(model)))(params), jax.jit(jax.grad(loss(wrapped)))(params), 1e-5)


@jax.custom_vjp
def flash(q, k, v):
    return flash_forward(q, k, v)[0]


def flash_forward(q, k, v):
    """Attention that keeps its output and the statistics of its rows, and makes the scores again."""
    scores = q @ k.T
    statistics = jax.nn.logsumexp(scores, -1)
    out = jnp.exp(scores - statistics[:, None]) @ v
    return out, (q, k, v, out, statistics)


def flash_backward(kept, g):
    q, k, v, out, statistics = kept
    p = jnp.exp(q @ k.T - statistics[:, None])
    ds = p * (g @ v.T - jnp.sum(out * g, -1)[:, None])
    return ds @ k, ds.T @ q, p.T @ g


flash.defvjp(flash_forward, flash_backward)


@pytest.mark.parametrize("scanned", [False, True])
def test_what_a_flash_attention_keeps_for_its_own_backward_pass_moves(scanned):
    def layer(x, w):
        q, k, v = jnp.split(x @ w[:, :48], 3, axis=-1)
        return x + flash(q, k, v) @ w[:, 48:].T

    def loss(ws, x):
        if scanned:
            return jnp.sum(jnp.sin(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]))
        for w in ws:
            x = layer(x, w)
        return jnp.sum(jnp.sin(x))

    layers, rows = 6, 24
    ws, x = jax.random.normal(jax.random.key(0), (layers, 16, 64)) / 8, jnp.linspace(-1, 1, rows * 16).reshape(rows, 16)
    ws = ws if scanned else list(ws)
    moved = nj.ActivationOffloader(offload_threshold_mb=rows * 4 / 2**20, prefetch_ahead=0).wrap(loss)
    there = [r.shape for r in nj.residuals(moved, ws, x) if r.place == "host"]
    stack = (layers,) if scanned else ()
    times = 1 if scanned else layers
    assert there.count((*stack, rows)) == times  # the statistics
    assert (
        there.count((*stack, rows, 16)) >= 3 * times
    )  # what flows from layer to layer, the output, queries, keys, values
    assert not any((*stack, rows) == r.shape for r in nj.residuals(moved, ws, x) if r.place == "device")
    assert_close(unfused(jax.grad(moved), ws, x), unfused(jax.grad(loss), ws, x))


def test_function_that_closes_over_what_is_differentiated():
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)

    def outer(w):
        return offloader.wrap(lambda x: jnp.sum(jnp.sin(x @ w)))(jnp.ones((4, 4)))

    expected = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.ones((4, 4)) @ w)))(jnp.eye(4))
    chex.assert_trees_all_close(jax.grad(outer)(jnp.eye(4)), expected)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 9),
    layers=st.integers(1, 3),  # of more, the last ones stay
    kb=st.floats(0, 2),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_gradients_are_equal_for_any_shape_and_threshold(rows, width, layers, kb, dtype):
    def f(w, x):
        for _ in range(layers):
            x = jnp.tanh(x @ w)
        return jnp.sum(x.astype(jnp.float32))

    w, x = jnp.eye(width, dtype=dtype) * 0.5, jnp.ones((rows, width), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nj.OffloadWarning)
        wrapped = nj.ActivationOffloader(offload_threshold_mb=kb * KB).wrap(f)
        ours, plain = (jax.grad(g, argnums=(0, 1))(w, x) for g in (wrapped, f))
        chex.assert_trees_all_close(ours, plain, rtol=1e-5)
        found = nj.residuals(wrapped, w, x)
    each = rows * width * w.dtype.itemsize  # of each layer, tanh: it makes its derivative, and is the next one's input
    assert found.host_bytes == (layers * each if each >= kb * 1024 else 0)


@pytest.mark.parametrize("pin", [True, False])
def test_by_hand(pin):
    offloader = nj.ActivationOffloader(pin_memory=pin, offload_threshold_mb=2 * KB)
    x = jnp.arange(1024.0)
    assert offloader._should_offload(x) and not offloader._should_offload(x[:100])
    assert not offloader._should_offload(jnp.arange(4096)) and not offloader._should_offload(
        jax.random.split(jax.random.key(0), 999)
    )
    assert not nj.ActivationOffloader(enabled=False)._should_offload(x)
    key = offloader._offload_to_cpu(x)
    assert offload._STORES[key].sharding.memory_kind == ("pinned_host" if pin else "unpinned_host")
    back = offloader._prefetch_to_gpu(key, jax.devices()[0])
    assert back.sharding.memory_kind == "device" and jnp.array_equal(back, x)
    with pytest.raises(ValueError, match="can be fetched once"):
        offloader._prefetch_to_gpu(key, jax.devices()[0])
    with pytest.raises(TypeError, match="concrete array"):
        jax.jit(offloader._offload_to_cpu)(x)
    with pytest.raises(TypeError, match=r"takes a jax\.Array"):
        offloader._offload_to_cpu("x")


def test_unpinned_is_its_own_memory_kind():
    w = jnp.eye(8)
    f = nj.ActivationOffloader(pin_memory=False, offload_threshold_mb=0.0).wrap(lambda w: jnp.sum(jnp.sin(w @ w)))
    offload._SAID.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pin_memory")  # eight devices, and nothing sharded over them: no word
        assert "unpinned_host" in str(jax.make_jaxpr(jax.grad(f))(w))
    assert nj.residuals(f, w).host_bytes == w.nbytes
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(w @ w)))(w)
    for grad in (jax.grad(f), jax.jit(jax.grad(f))):
        chex.assert_trees_all_close(grad(w), expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_unpinned_over_a_mesh(axis):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    w = jax.device_put(jnp.eye(8), NamedSharding(mesh, PartitionSpec("data")))
    f = lambda w: jnp.sum(jnp.sin(w @ jnp.ones((8, 8))))
    g = nj.ActivationOffloader(pin_memory=False, offload_threshold_mb=0.0).wrap(f)
    if axis == jax.sharding.AxisType.Auto:
        with pytest.raises(ValueError, match=r"with axes that are not Explicit is unknown .* write pin_memory=True"):
            jax.jit(jax.grad(g))(w)
    else:
        assert "unpinned_host" in str(jax.make_jaxpr(jax.grad(g))(w))
        chex.assert_trees_all_close(jax.jit(jax.grad(g))(w), jax.jit(jax.grad(f))(w), rtol=1e-6)


def test_devices_that_lack_a_memory(monkeypatch):
    w = jnp.eye(8)
    offload._SAID.clear()
    monkeypatch.setattr(offload, "_memory_kinds", lambda device: ["device"])
    f = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(lambda w: jnp.sum(jnp.sin(w)))
    with pytest.warns(nj.OffloadWarning, match="nothing is offloaded on cpu"):
        jax.grad(f)(w)
    with warnings.catch_warnings():  # says so once
        warnings.simplefilter("error")
        assert "host" not in str(jax.make_jaxpr(jax.grad(f))(w))
    monkeypatch.setattr(offload, "_memory_kinds", lambda device: ["device", "pinned_host"])
    with pytest.raises(ValueError, match=r"no unpinned_host memory .* write pin_memory=True"):
        nj.ActivationOffloader(pin_memory=False).offload_context().__enter__()


def test_the_cpu_says_once_that_nothing_moves():
    offload._SAID.clear()
    f = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(jnp.sin)
    with pytest.warns(nj.OffloadWarning, match="on the CPU, host memory is the device's own"):
        f(jnp.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(jnp.ones(3))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"offload_threshold_mb": -1}, ValueError, r"offload_threshold_mb=-1: write a finite number of MB"),
        ({"offload_threshold_mb": float("nan")}, ValueError, r"offload_threshold_mb=nan"),
        ({"offload_threshold_mb": "10"}, ValueError, r"offload_threshold_mb='10'"),
        ({"prefetch_ahead": -1}, ValueError, r"prefetch_ahead=-1: write a whole number of layers"),
        ({"prefetch_ahead": 1.5}, ValueError, r"prefetch_ahead=1\.5"),
        ({"pin_memory": 1}, TypeError, r"pin_memory=1: write True or False"),
        ({"enabled": None}, TypeError, r"enabled=None: write True or False"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        nj.ActivationOffloader(**kwargs)


def test_bad_objects():
    with pytest.raises(TypeError, match="wrap takes a Flax module or a function, got int"):
        nj.ActivationOffloader().wrap(3)
    with pytest.raises(TypeError, match="_should_offload takes an array, got str"):
        nj.ActivationOffloader()._should_offload("x")
