"""Compiled bytes for devices that nobody here owns."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import GPT, Block, linen_loss

import nexus_jax as nj
from nexus_jax import targets

INSTALLED = {"v5e": "libtpu", "h200": "jax_plugins.xla_cuda13"}


def has(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def temp(target, model, tokens):
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    step = lambda p, t: jax.value_and_grad(linen_loss(model, t))(p)
    return targets.compiled_bytes(targets.compile_for(target, step, params, tokens)).temp


@pytest.mark.parametrize("target", INSTALLED)
def test_compiled_bytes_fall_and_equal_nn_remat_by_hand(target):
    if not has(INSTALLED[target]):
        pytest.skip(f"no compiler for {target}: pip install 'nexus-jax[tpu,gpu]'")
    size = dict(layers=4, d=256, heads=4, vocab=512, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    plain = GPT(**size)
    by_hand = GPT(**size, block=nn.remat(Block, static_argnums=(2,)))
    bytes_of = {
        p: temp(target, nj.apply_selective_checkpointing(plain, p), tokens) for p in ("none", "alternate", "all")
    }
    assert bytes_of["all"] < bytes_of["alternate"] < bytes_of["none"]
    assert bytes_of["all"] < 0.6 * bytes_of["none"]
    assert bytes_of["none"] == temp(target, plain, tokens)
    assert bytes_of["all"] == temp(target, by_hand, tokens)


def test_unknown_targets_and_missing_compilers(monkeypatch):
    with pytest.raises(ValueError, match="target='v9' is unknown: write one of v5e, h200"):
        targets.compile_for("v9", jnp.sin, jnp.ones(3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "nexus-jax\[tpu\]"'):
        targets.compile_for("v5e", jnp.sin, jnp.ones(3))
