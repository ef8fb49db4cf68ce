"""What autodiff keeps, told exactly."""

import functools
import json
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Literal
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax import report
from nexus_jax.costs import flops_of
from nexus_jax.flops import count_matmuls, matmul_flops

SMALL_OFFLOAD = nj.checkpoint_policies.offload(min_mb=0.0)
TOKENS = jnp.arange(32).reshape(2, 16) % 64


def init(model, *args):
    return jax.eval_shape(model.init, jax.random.key(0), *args)


def layers(policy):
    def loss(params):
        x = params["x"]
        for w in params["ws"]:
            layer = lambda w, x: jnp.tanh(jnp.sin(x @ w) @ w)
            x = layer(w, x) if policy == "none" else jax.checkpoint(layer, policy=nj.load_policy(policy))(w, x)
        return jnp.sum(x**2)

    return loss, {"x": jnp.ones((4, 8)), "ws": [jnp.eye(8) for _ in range(3)]}


def linen(policy, **kwargs):
    model = nj.apply_selective_checkpointing(GPT(layers=2, **kwargs), policy)
    rngs = {"dropout": jax.random.key(1)}
    return linen_loss(model, TOKENS, train=True, rngs=rngs), init(model, TOKENS)


def scanned(policy):
    model = nj.apply_selective_checkpointing(ScannedGPT(layers=3), policy)
    return linen_loss(model, TOKENS), init(model, TOKENS)


def nnx_model(policy):
    model = nnx.eval_shape(lambda: NNXGPT(layers=2, dropout=0.1, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(nj.apply_selective_checkpointing(model, policy))
    return (lambda state: loss_of(nnx.merge(graph, state)(TOKENS), TOKENS)), state


def offloaded(_):
    loss, params = linen("none")
    warnings.simplefilter("ignore", nj.OffloadWarning)  # on a CPU the host is the device
    return nj.ActivationOffloader(offload_threshold_mb=0.001).wrap(loss), params


def keys(policy):
    """A dropout key that is an argument, and one made in a boundary."""

    def layer(w, x, key):
        keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.9, x.shape)
        return jnp.where(keep, jnp.tanh(x @ w), 0.0)

    layer = layer if policy == "none" else jax.checkpoint(layer)

    def loss(params):
        x, key = params["x"], params["key"]
        for w in params["ws"]:
            key, own = jax.random.split(key)
            x = layer(w, x, own)
        return jnp.sum(x**2)

    return loss, {**layers("none")[1], "key": jax.random.key(3)}


CASES = {
    "jax.checkpoint": (layers, ("none", "all", "heavy_ops")),
    "linen": (linen, ("none", "all", "heavy_ops", SMALL_OFFLOAD)),
    "dropout": (lambda policy: linen(policy, dropout=0.1), ("none", "all")),
    "bfloat16": (lambda policy: linen(policy, dtype=jnp.bfloat16), ("none", "heavy_ops")),
    "scan": (scanned, ("none", "all", SMALL_OFFLOAD)),
    "nnx": (nnx_model, ("none", "all")),
    "ActivationOffloader": (offloaded, ("none",)),
    "keys": (keys, ("none", "all")),
}


@pytest.mark.parametrize(
    ("kind", "policy"), [(kind, p) for kind, (_, policies) in CASES.items() for p in policies], ids=str
)
def test_bytes_are_those_of_the_vjps_leaves(kind, policy):
    """Counted by hand, on the leaves that a jitted step sees: those that are arguments, and all others."""
    loss, params = CASES[kind][0](policy)
    floats, rest = split_floats(params)
    counted = {}

    def step(leaves):
        own = {id(x) for x in leaves}
        vjp = jax.vjp(lambda floats: loss(rest(floats, leaves)), [leaves[i] for i in floats])[1]
        kept = {id(x): x for x in jax.tree.leaves(vjp) if isinstance(x, jax.Array)}
        for name, mine in (("arguments", True), ("made", False)):
            counted[name] = sum(x.size * x.dtype.itemsize for i, x in kept.items() if (i in own) is mine)

    jax.eval_shape(step, jax.tree.leaves(params))
    found = nj.residuals(loss, params)
    assert found.nbytes > 0 and (found.host_bytes > 0) is (policy == SMALL_OFFLOAD or kind == "ActivationOffloader")
    assert found.nbytes + sum(r.nbytes for r in found.arguments if r.op != "argument") == counted["made"]
    assert sum(r.nbytes for r in found.arguments if r.op == "argument") == counted["arguments"]


def split_floats(params):
    """Which leaves are of floating point, and what puts them among the others: jax.vjp takes no others."""
    leaves, treedef = jax.tree.flatten(params)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def rest(values, leaves):
        return treedef.unflatten({**dict(enumerate(leaves)), **dict(zip(floats, values, strict=True))}.values())

    return floats, rest


def test_one_of_each_kind():
    def f(w, x):
        y = jnp.sin(x @ w)
        return jnp.sum(jnp.exp(y))

    w, x = jnp.ones((8, 4)), jnp.ones((2, 8), jnp.float32)
    found = nj.residuals(f, w, x)
    assert [(r.op, r.shape, r.dtype, r.nbytes, r.place) for r in found] == [
        ("cos", (2, 4), "float32", 32, "device"),
        ("exp", (2, 4), "float32", 32, "device"),
    ]
    assert sorted(r.path for r in found.arguments) == ["args[0]", "args[1]"] and {r.op for r in found.arguments} == {
        "argument"
    }
    assert all("test_residuals.py" in r.source and "(test_one_of_each_kind.<locals>.f)" in r.source for r in found)
    assert found.nbytes == sum(r.nbytes for r in found) == found.device_bytes == 64 and found.host_bytes == 0


def test_abstract_arguments_equal_real_ones():
    model = GPT(layers=2)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    loss = linen_loss(model, TOKENS)
    assert list(nj.residuals(loss, params)) == list(nj.residuals(loss, init(model, TOKENS)))


def test_module_paths():
    model = GPT(layers=2)
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    paths = {r.path for r in found}
    assert {"GPT/blocks_0/attn/q", "GPT/blocks_1/attn/v", "GPT/blocks_1/LayerNorm_0"} <= paths
    nnx_model = NNXGPT(layers=2, rngs=nnx.Rngs(0))
    paths = {r.path for r in nj.residuals(lambda m: loss_of(m(TOKENS), TOKENS), nnx_model)}
    assert {"NNXGPT/blocks/0/attn/q", "NNXGPT/blocks/1/attn", "NNXGPT/blocks/1/norm1"} <= paths


def test_in_a_scan_they_are_those_of_all_steps():
    model = ScannedGPT(layers=5)
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    stacked = [r for r in found if r.shape == (5, 2, 16, 128)]
    assert stacked and all(r.path.endswith("block") or "block/" in r.path for r in stacked)


# --- why, and what recomputing takes -----------------------------------------------------------------------------------


def only(fn, *args, op=None, **want):
    """The residual that is as wanted."""
    found = [r for r in nj.residuals(fn, *args) if op is None or r.op == op]
    [r] = [r for r in found if all(getattr(r, key) == value for key, value in want.items())]
    return r


F32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("fn", "op", "why"),
    [
        (lambda x: jnp.sum(jnp.exp(x)), "exp", "factor of mul"),
        (lambda x: jnp.sum(jnp.sin(x) @ jnp.cos(x)), "sin", "operand of dot_general"),
        (lambda x: jnp.sum(jnp.where(x > 0, x, 0.0)), "gt", "mask of select"),
        (lambda x: jnp.sum(jnp.exp(x) / jnp.log(x)), "log", "divisor of div"),
        (lambda x: jnp.sum(x[(x[0] * 8).astype(int)]), "broadcast_in_dim", "indices of scatter-add"),
        (lambda x: jnp.vdot(jnp.tanh(jax.lax.stop_gradient(x)), x), "tanh", "operand of dot_general"),
    ],
)
def test_why_it_is_kept(fn, op, why):
    found = [r.why for r in nj.residuals(fn, F32(8, 8)) if r.op == op]
    assert f"{why} in the backward of the function" in found


def test_why_it_is_kept_past_views_conversions_loops_and_jitted_functions():
    def f(w, x):
        y = jnp.sin(x).T.astype(jnp.bfloat16)
        return jnp.sum(jax.jit(lambda w, y: jnp.reshape(y, (-1, 4)).astype(jnp.float32) @ w)(w, y))

    assert "operand of dot_general" in only(f, F32(4, 4), F32(4, 8), op="convert_element_type").why

    def loop(ws, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    found = nj.residuals(loop, F32(3, 8, 8), F32(2, 8))
    assert {r.why.partition(" in ")[0] for r in found} == {"factor of mul", "operand of dot_general"}
    assert {r.shape for r in found} == {(3, 2, 8)}


def test_why_names_the_module_and_the_boundary():
    model = GPT(layers=2)
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    q = next(r for r in found if r.path == "GPT/blocks_0/attn/q")
    assert q.why == "operand of dot_general in the backward of GPT/blocks_0/attn"
    model = nj.apply_selective_checkpointing(model, "all")
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    [x] = [r for r in found if r.path == "GPT/blocks_0"]
    assert x.why == "input of the recomputation of GPT/blocks_1" and x.op == "add"


def test_why_it_is_kept_behind_branches_and_loops_that_hand_it_on():
    """As where a value comes back from the host in a branch, or in a loop of its own."""

    def handed_on(through):
        @jax.custom_vjp
        def f(x):
            return jnp.sin(x)

        f.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda kept, ct: (through(kept, ct) * ct,))
        return lambda x: jnp.sum(f(x))

    branch = lambda kept, ct: jax.lax.cond(ct[0] < 9, lambda x: x, lambda x: x * 0, kept)
    loop = lambda kept, ct: jax.lax.scan(lambda c, _: (c, None), kept, None, length=2)[0]
    stacked = lambda kept, ct: jax.lax.scan(lambda c, x: (c, x), ct, kept)[1]
    for through in (branch, loop, stacked):
        [r] = nj.residuals(handed_on(through), F32(8))
        assert r.op == "cos" and "factor of mul in the backward of the function" in r.why


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash(q, k, v, scale):
    """As flash attention: its backward pass is its own, and makes the scores again from the inputs and their sums."""
    return flash_forward(q, k, v, scale)[0]


def flash_forward(q, k, v, scale):
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    sums = jax.nn.logsumexp(scores, -1)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(scores - sums[..., None]), v)
    return out, (q, k, v, out, sums)


def flash_backward(scale, kept, ct):
    q, k, v, out, sums = kept
    p = jnp.exp(scale * jnp.einsum("bqhd,bkhd->bhqk", q, k) - sums[..., None])
    d = jnp.einsum("bqhd,bkhd->bhqk", ct, v) - jnp.einsum("bqhd,bqhd->bhq", ct, out)[..., None]
    ds = scale * p * d
    einsum = jnp.einsum
    return einsum("bhqk,bkhd->bqhd", ds, k), einsum("bhqk,bqhd->bkhd", ds, q), einsum("bhqk,bqhd->bkhd", p, ct)


flash.defvjp(flash_forward, flash_backward)


class FlashAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(flash(q, k, v, 0.5))


class FlashModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + FlashAttention(name=f"attn_{i}")(x)
        return x


@pytest.mark.parametrize("policy", ("none", "all"))
def test_what_a_functions_own_backward_pass_keeps(policy):
    x = F32(2, 16, 8)
    variables = jax.eval_shape(FlashModel().init, jax.random.key(0), x)
    model = nj.apply_selective_checkpointing(FlashModel(), policy)
    loss = lambda v, x: jnp.sum(model.apply(v, x))
    found = nj.residuals(loss, variables, x)
    kept = [r for r in found if r.path.startswith("FlashModel/attn_0")]
    if policy == "all":
        assert kept == [] and any("recomputation of FlashModel/attn_1" in r.why for r in found)
        return
    assert {(r.path.rpartition("/")[2], r.op, r.shape) for r in kept} == {
        ("q", "add", (2, 16, 2, 4)), ("k", "add", (2, 16, 2, 4)), ("v", "add", (2, 16, 2, 4)),
        ("attn_0", "dot_general", (2, 16, 2, 4)), ("attn_0", "add", (2, 2, 16)),
    }  # fmt: skip
    own = "in the backward of FlashModel/attn_0"
    assert all(own in r.why for r in kept) and not any(r.shape == (2, 2, 16, 16) for r in found), "no scores"
    [out] = [r for r in kept if r.op == "dot_general"]
    assert out.why == f"operand of dot_general {own}, FlashModel/attn_0/out" and "(flash_forward)" in out.source
    assert "dot here and in out" in str(found)
    leaves = jax.tree.leaves(jax.eval_shape(lambda v, x: jax.vjp(loss, v, x)[1], variables, x))
    assert {x.shape for x in leaves} >= {r.shape for r in found}


def test_what_nothing_reads_says_so():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), jnp.cos(x) * 3), lambda kept, ct: (ct,))
    r = only(lambda x: jnp.sum(f(x)), F32(8))
    assert r.uses == () and r.why == "nothing reads it: compilers drop it" and r.nbytes == 32


@pytest.mark.parametrize(
    ("fn", "op", "matmuls", "flops"),
    [
        (lambda w, x: jnp.sum(jnp.sin(x @ w)), "cos", (("dot_general", 1),), 2 * 4 * 8 * 8 + 32),
        (lambda w, x: jnp.sum(jnp.sin(jnp.exp(x) @ w)), "exp", (), 32),
        (lambda w, x: jnp.sum(jnp.exp(jnp.exp(x) @ w)), "exp", (("dot_general", 1),), 2 * 4 * 8 * 8 + 32),
        (lambda w, x: jnp.sum(jnp.sin(x @ w @ w)), "cos", (("dot_general", 1),), 2 * 4 * 8 * 8 + 32),  # x @ w is kept
    ],
)
def test_what_recomputing_takes(fn, op, matmuls, flops):
    """One of them, the others kept."""
    found = [r for r in nj.residuals(fn, F32(8, 8), F32(4, 8)) if r.op == op]
    assert max((r.recompute.matmuls, r.recompute.flops) for r in found) == (matmuls, flops)


def test_recomputing_in_a_loop_takes_every_step_and_what_carries_from_one_to_the_next():
    def loop(ws, x):
        def step(x, w):
            return jnp.sin(jax.lax.stop_gradient(x) * 2) * x * w, None

        return jnp.sum(jax.lax.scan(step, x, ws)[0])

    found = {r.op: r.recompute for r in nj.residuals(loop, F32(5, 8), F32(8))}
    # sin: from the carry, which is the product that the step before kept, times w; the product: from sin and the carry,
    # through all steps, since it is itself what is not there
    assert found["sin"].flops == 5 * 8 * 3 and found["mul"].flops == 5 * 8 * 2

    def chain(ws, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    r = only(chain, F32(5, 8, 8), F32(2, 8))
    assert r.op == "tanh" and r.recompute.matmuls == (("dot_general", 5),)
    assert str(r.recompute) == "5 dot_general, 1.36 kFLOP"


def test_branches_are_looked_into():
    def f(w, x, yes):
        with jax.named_scope("block"):
            kept = lambda x: jnp.sin(jnp.exp(x) @ w)
            return jnp.sum(jax.lax.cond(yes, kept, lambda x: jnp.zeros((4, 8)), x))

    found = {r.op: r for r in nj.residuals(f, F32(8, 8), F32(4, 8), jax.ShapeDtypeStruct((), bool))}
    assert {"cos", "exp"} <= set(found) and found["cos"].path == "block" and "test_residuals.py" in found["cos"].source
    assert found["cos"].recompute.matmuls == (("dot_general", 1),) and found["exp"].recompute.matmuls == ()
    assert found["cos"].recompute.flops == 2 * 4 * 8 * 8 + 32 and found["exp"].recompute.flops == 32
    assert "operand of dot_general" in found["exp"].why and "factor of mul" in found["cos"].why


def test_recomputing_starts_from_what_is_kept():
    """With the boundaries' inputs kept, a layer is one layer's work; without, all layers before it."""
    layer = lambda w, x: jnp.tanh(x @ w)

    def loss(boundary, ws, x):
        for w in ws:
            x = boundary(w, x)
        return jnp.sum(x)

    ws, x = [F32(8, 8)] * 4, F32(2, 8)
    found = nj.residuals(lambda ws, x: loss(jax.checkpoint(layer), ws, x), ws, x)
    assert [r.recompute.matmuls for r in found] == [(("dot_general", 1),)] * 3
    all_at_once = lambda ws, x: jnp.sum(jnp.sin(jax.checkpoint(lambda ws, x: loss(layer, ws, x) * x)(ws, x)))
    r = only(all_at_once, ws, x)
    assert r.op == "cos" and r.recompute.matmuls == (("dot_general", 4),)


def test_chains_are_counted_alike_from_every_end():
    """What all layers before it take, for each layer, though the walk stops where an earlier one began."""

    def loss(v, ws, x):
        total = 0.0
        for w in ws:
            x = jax.lax.stop_gradient(x @ w)
            total += jnp.sum(jnp.cos(x) * v)
        return total

    found = nj.residuals(loss, F32(8), [F32(8, 8)] * 6, F32(2, 8))
    assert sorted(sum(n for _, n in r.recompute.matmuls) for r in found) == [1, 2, 3, 4, 5, 6]
    assert sorted(r.recompute.flops for r in found) == [n * 2 * 2 * 8 * 8 + 16 for n in range(1, 7)]


OPS = {
    "sin": lambda a, b: jnp.sin(a),
    "exp": lambda a, b: jnp.exp(a),
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "dot": lambda a, b: a @ b,
    "stop": lambda a, b: jax.lax.stop_gradient(a) * 2.0,
}


def by_hand(fn, *args):
    """Bytes, and FLOPs to make each residual again, by walking back from it through the plain program."""
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args).jaxpr
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    known = lambda atoms: [v for v in atoms if not isinstance(v, Literal) and v in made]
    kept = set(known(jaxpr.outvars))

    def cost(var):
        needed, pending = [], [made[var]]
        while pending:
            eqn = pending.pop()
            if eqn not in needed:
                needed.append(eqn)
                pending += [made[v] for v in known(eqn.invars) if v not in kept]
        return sum(flops_of(eqn) for eqn in needed)

    return sorted((v.aval.size * 4, cost(v)) for v in kept)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_random_programs_against_a_walk_by_hand(steps):
    def fn(w, x):
        values = [w, x]
        for op, i, j in steps:
            values.append(OPS[op](values[i % len(values)], values[-1 - j % len(values)]))
        return sum(jnp.sum(v) for v in values[2:])

    found = nj.residuals(fn, F32(4, 4), F32(4, 4))
    assert sorted((r.nbytes, r.recompute.flops) for r in found) == by_hand(fn, F32(4, 4), F32(4, 4))
    assert all(r.uses for r in found)


def test_random_bits_and_reductions_are_named():
    def f(x, key):
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * 2, 0.0) * jax.nn.softmax(x))

    found = nj.residuals(f, F32(64), jax.eval_shape(lambda: jax.random.key(0)))
    said = {str(r.recompute).partition(",")[0] for r in found if r.shape == (64,)}
    assert "random bits" in said and any("reductions" in text for text in said)


# --- what is there anyway ----------------------------------------------------------------------------------------------


def test_arguments_and_their_views_are_apart():
    def f(w, x):
        return jnp.sum((x[:4].T @ w[:4]) * jnp.broadcast_to(w[0], (8, 8)) * w.T * w.astype(jnp.bfloat16))

    found = nj.residuals(f, F32(8, 8), F32(8, 8))
    assert {r.op for r in found} == {"convert_element_type", "dot_general", "mul"}
    assert {r.path for r in found.arguments} <= {"args[0]", "args[1]"} and {r.recompute for r in found.arguments} == {
        None
    }
    views = {r.op for r in found.arguments}
    assert "broadcast_in_dim of argument" in views and all(v.endswith("argument") for v in views)


def test_constants_are_apart():
    """A causal mask that the program makes; the one that a boundary takes as an argument is an argument."""

    def f(w, x):
        mask = jnp.tril(jnp.ones((8, 8), bool))
        return jnp.sum(jnp.where(mask, jnp.sin(x) @ w, -1e30))

    found = nj.residuals(f, F32(8, 8), F32(4, 8, 8))
    assert {r.op for r in found} == {"sin", "cos"}
    [mask] = [r for r in found.arguments if r.dtype == "bool"]
    assert mask.op == "constant" and mask.why.startswith("mask of select") and mask.shape == (4, 8, 8)
    random = lambda x: jnp.sum(jnp.sin(x) * jax.random.normal(jax.random.key(0), (8,)))
    assert any(r.recompute.random for r in nj.residuals(random, F32(8)))  # drawn, and kept: no constant


def test_arguments_by_name():
    model = GPT(layers=2)
    loss = lambda variables, given, scale=1.0: linen_loss(model, TOKENS)(variables) * given["x"] * scale
    found = nj.residuals(loss, init(model, TOKENS), {"flag": True, "x": F32()}, scale=F32())
    assert {"params/norm/scale", "x", "scale"} <= {r.path for r in found.arguments}
    found = nj.residuals(lambda m: loss_of(m(TOKENS), TOKENS), nnx.eval_shape(lambda: NNXGPT(rngs=nnx.Rngs(0))))
    assert any(r.path.startswith("blocks/1/") for r in found.arguments)


# --- many together -----------------------------------------------------------------------------------------------------


def test_groups_are_layer_families():
    model = GPT(layers=3)
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    groups = found.groups()
    assert sum(g.nbytes for g in groups) == found.nbytes and sum(g.count for g in groups) == len(found)
    assert [g.nbytes for g in groups] == sorted((g.nbytes for g in groups), reverse=True)
    [q] = [g for g in groups if g.pattern == "GPT/blocks[0..2]/attn/q"]
    assert q.count == 3 and q.nbytes == 3 * q.each.nbytes and q.each.path == "GPT/blocks_0/attn/q"
    assert [u.path for u in q.uses] == ["GPT/blocks[0..2]/attn"]
    names = {
        g.pattern
        for g in nj.residuals(
            lambda m: loss_of(m(TOKENS), TOKENS), nnx.eval_shape(lambda: NNXGPT(rngs=nnx.Rngs(0)))
        ).groups()
    }
    assert "NNXGPT/blocks[0..3]/attn/q" in names


def test_a_layer_that_differs_is_no_member():
    def f(ws, x):
        for i, w in enumerate(ws):
            with jax.named_scope(f"blocks_{i}"):
                x = jnp.tanh(x @ w)
        return jnp.sum(x)

    ws = [F32(8, 8), F32(8, 16), F32(16, 8), F32(8, 8), F32(8, 8)]
    groups = {(g.pattern, g.each.shape) for g in nj.residuals(f, ws, F32(2, 8)).groups()}
    assert ("blocks[0,2..4]", (2, 8)) in groups and ("blocks_1", (2, 16)) in groups


def test_table():
    model = GPT(layers=3)
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    for width, most in ((160, 160), (100, 110)):
        said = report.residuals_table(found, width)
        lines = said.splitlines()
        assert lines[0].startswith("residuals in GPT: ") and "on the device" in lines[0]
        assert max(map(len, lines[:-2])) <= most
        assert "blocks[0..2]/attn" in said and "models.py" in said and "dot in attn/{k,q,v}" in said
        assert "to recompute" in said and "elementwise only" in said and "1 dot" in said
        assert "not counted: " in said and "of constants" in said
    assert "residuals: 0 B on the device" in str(nj.residuals(lambda x: x * 2, F32(8)))


def test_small_groups_share_a_line():
    def f(x, ys):
        return jnp.sum(jnp.sin(x)) + sum(jnp.sum(jnp.sin(y)) for y in ys)

    said = str(nj.residuals(f, F32(4096), [F32(1), F32(2), F32(3)]))
    assert "3 groups of less than 0.1% each" in said and said.count("cos") == 1


def test_as_dict_is_json():
    model = nj.apply_selective_checkpointing(GPT(layers=3), nj.checkpoint_policies.offload(min_mb=0.0))
    found = nj.residuals(linen_loss(model, TOKENS), init(model, TOKENS))
    told = json.loads(json.dumps(found.as_dict()))
    assert told["nbytes"] == found.nbytes == told["device_bytes"] + told["host_bytes"]
    assert sum(g["nbytes"] for g in told["kept"]) == found.nbytes and told["host_bytes"] == found.host_bytes > 0
    group = next(g for g in told["kept"] if g["path"] == "GPT/blocks[0..2]/attn/q")
    assert (group["count"], group["place"], group["op"]) == (3, "host", "dot_general")
    assert group["why"] == "input of the recomputation of GPT/blocks[0..2]"
    assert group["recompute"]["matmuls"] == {"dot_general": 1} and group["recompute"]["flops"] > 0
    assert {g["recompute"] for g in told["arguments"]} == {None}


# --- where it is called ------------------------------------------------------------------------------------------------


def test_without_jit_and_over_a_mesh():
    fn, x = lambda x: jnp.sum(jax.jit(jnp.sin)(x) ** 2), F32(8, 8)
    with jax.disable_jit():
        assert list(nj.residuals(fn, x)) == list(nj.residuals(fn, x)) and nj.residuals(fn, x).nbytes == 2 * 256

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    local = lambda w, x: jnp.sin(x @ w)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    r = only(lambda w, x: jnp.sum(sharded(w, x)), F32(4, 4), F32(16, 4))
    assert r.shape == (16, 4) and r.recompute.matmuls == (("dot_general", 8),)
    assert r.recompute.flops == 2 * 16 * 4 * 4 + 16 * 4


def test_a_scan_inside_a_boundary_that_keeps_weight_matmuls():
    def f(ws, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    boundary = jax.checkpoint(f, policy=nj.load_policy("heavy_ops"))
    r = only(boundary, F32(3, 8, 8), F32(2, 8))
    assert r.op == "dot_general" and r.shape == (3, 2, 8)


def test_flags_among_the_arguments():
    found = nj.residuals(lambda x, flag, note=None: jnp.sin(x).sum() if flag else x.sum(), jnp.ones(8), True, note="n")
    assert found.nbytes == 32


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match="no argument is an array"):
        nj.residuals(lambda n: n, 3)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 8), k=st.integers(1, 8), n=st.integers(1, 8), steps=st.integers(1, 5))
def test_flops_of_matmuls_and_loops(m, k, n, steps):
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    assert matmul_flops(jnp.dot, a, b) == 2 * m * k * n
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ jnp.ones((k, k)), None), x, None, length=steps)[0]
    assert matmul_flops(loop, a) == steps * 2 * m * k * k
    assert count_matmuls(loop, a) == steps


def test_flops_of_a_convolution():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert matmul_flops(conv, x, w) == 2 * (2 * 16) * (3 * 22 * 22)  # of the 3 * 8 taps of a row, 2 are in the padding
