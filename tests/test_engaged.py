"""A policy's intent, held against what a compiler left of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import KINDS, needs
from models import GPT, Block, linen_loss

import nexus_jax as nj
from nexus_jax.timeline import Timeline


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "cache"))


def step(policy, batch=2, length=32, **sizes):
    model = nj.apply_selective_checkpointing(GPT(**{"layers": 2, "d": 64, **sizes}), policy)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return lambda p, t: linen_loss(model, t)(p), (jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


def scanned(policy):
    """A scan over layers whose inside is under a policy of jax.checkpoint."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.remat(Block, policy=policy, static_argnums=(2,))(4, name="block")(x, False), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return scan(name="layers")(x, None)[0]

    x = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)
    params = jax.eval_shape(Model().init, jax.random.key(0), x)
    return (lambda p, x: jnp.sum(Model().apply(p, x) ** 2)), (params, x)


def test_what_is_not_meant_is_not_checked():
    loss, args = step("none")
    found = nj.engaged(loss, *args)
    assert len(found) == 0 and found.engaged and "nothing is meant to be" in str(found)


@pytest.mark.parametrize("target", KINDS)
def test_recomputation_engages(target):
    needs(target)
    loss, args = step("all")
    found = nj.engaged(loss, *args, target=target)
    assert {c.intent for c in found} == {"recompute"}
    assert {c.what for c in found} >= {"GPT/blocks_0/attn/q", "GPT/blocks_1/Dense_0"}
    assert found.engaged and all(0 < c.found <= c.meant for c in found), str(found)


def test_a_recomputation_that_the_compiler_undid_is_named(monkeypatch):
    """XLA merges what is recomputed with the forward pass where nothing keeps them apart: no barrier, here."""
    prevent = jax.checkpoint

    def without_barrier(fun, **kwargs):
        return prevent(fun, **{**kwargs, "prevent_cse": False})

    f = without_barrier(lambda w, x: jnp.tanh(jnp.sin(x @ w) @ w))
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    found = nj.engaged(lambda w, x: jnp.sum(f(w, x)), shape, shape)
    assert not found.engaged and found[0].found == 0 < found[0].meant
    assert "merged it with the forward pass" in str(found) and found.as_dict()["engaged"] is False


@pytest.mark.parametrize("target", KINDS)
def test_offloading_in_a_scan_engages(target):
    needs(target)
    loss, args = scanned(nj.checkpoint_policies.offload(min_mb=0.0))
    found = nj.engaged(loss, *args, target=target)
    moved = [c for c in found if c.intent == "offload"]
    assert moved and all(c.engaged and c.found == c.meant > 0 for c in moved), str(found)


def test_a_copy_that_is_not_in_the_program_is_named(monkeypatch):
    """A compiler cancels copies only in large steps; here, what is on the host is hidden from the account."""
    needs("v5e")
    loss, args = scanned(nj.checkpoint_policies.offload(min_mb=0.0))
    monkeypatch.setattr(Timeline, "host_temp_by_size", lambda t: {})
    found = nj.engaged(loss, *args, target="v5e")
    cancelled = [c for c in found if c.intent == "offload"]
    assert cancelled and not found.engaged and all(0 == c.found < c.meant for c in cancelled), str(found)
    assert "cancelled the copy to the host" in cancelled[0].cause and "NO" in str(found)


def test_on_a_cpu_nothing_moves_and_it_says_so():
    loss, args = step(nj.load_policy("offload_dot_with_no_batch_dims"))
    found = nj.engaged(loss, *args)
    moved = [c for c in found if c.intent == "offload"]
    assert moved and all("no memory apart from the host's" in c.cause for c in moved)
