"""Steps compiled for devices that nobody here owns: bytes as a compile by hand gives them, and every failure an answer."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import KINDS, needs
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import GPT, NNXGPT, Block, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax import _compat
from nexus_jax.measure import measurement
from nexus_jax.program import step_of
from nexus_jax.targets import compiler, worker

SIZE = dict(layers=2, d=256, heads=4, vocab=512, dtype=jnp.bfloat16)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "cache"))


def gpt(policy="none"):
    """A workload."""
    model = nj.apply_selective_checkpointing(GPT(**SIZE), policy)
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    return lambda p, t: linen_loss(model, t)(p), (jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


BY_HAND = {
    "v5e": """
        from jax.experimental import topologies
        device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    """,
    "h200": """
        from nexus_jax.targets.sheets import gpu_target_config, sheet
        from nexus_jax import _compat
        [device] = _compat.gpu_devices(gpu_target_config(sheet("h200")))
    """,
}


def compiled_by_hand(target):
    """``argument, output, alias, temp`` of the same step out of raw JAX, in a process of its own."""
    code = textwrap.dedent(BY_HAND[target]) + textwrap.dedent("""
        import sys, json, jax
        sys.path.insert(0, sys.argv[1])
        from test_measure import gpt
        from jax.sharding import SingleDeviceSharding
        loss, args = gpt("heavy_ops")
        place = SingleDeviceSharding(device)
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
        m = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().memory_analysis()
        print(json.dumps([m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes]))
    """)
    env = {**os.environ, **_compat.TPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    tests = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code, tests], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", KINDS)
def test_bytes_are_those_of_a_compile_by_hand(target):
    needs(target)
    loss, args = gpt("heavy_ops")
    before = dict(os.environ)
    m = nj.measure(loss, *args, target=target)
    assert dict(os.environ) == before, "nothing of the compiler is left in this process"
    maps = pathlib.Path("/proc/self/maps")  # JAX imports the package libtpu by itself, but not its library
    assert not maps.exists() or "libtpu.so" not in maps.read_text()
    assert [m.argument_bytes, m.output_bytes, m.alias_bytes, m.temp_bytes] == compiled_by_hand(target)
    assert m.device_bytes == m.argument_bytes + m.output_bytes - m.alias_bytes + m.temp_bytes
    assert m.fits is True and not m.cached
    again = nj.measure(loss, *args, target=target)
    assert again.cached and again == nj.measure(loss, *args, target=target)
    assert again.temp_bytes == m.temp_bytes


@pytest.mark.parametrize("target", KINDS)
def test_policies_side_by_side(target):
    needs(target)
    found = nj.compare(gpt, ["none", "all"], targets=target)
    none, all_ = found
    assert all_.measured[target].temp_bytes < 0.7 * none.measured[target].temp_bytes
    assert all_.residual_device_bytes < 0.3 * none.residual_device_bytes
    assert 1.1 < all_.flops / none.flops < 1.4
    loss, args = gpt("none")
    by_hand = GPT(**SIZE, block=nn.remat(Block, static_argnums=(2,)))
    theirs = nj.measure(lambda p, t: linen_loss(by_hand, t)(p), *args, target=target)
    assert theirs.temp_bytes == all_.measured[target].temp_bytes
    assert nj.measure(loss, *args, target=target).temp_bytes == none.measured[target].temp_bytes
    text = str(found)
    assert "none" in text and f"{target} device" in text and "1.000x" in text


def test_out_of_memory_is_an_answer():
    needs("v5e")
    big = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32)
    m = nj.measure(lambda w: jnp.sum(jnp.tanh(w) ** 2), big, target="v5e")
    assert m.fits is False and m.device_bytes > m.limit_bytes and "exceeds available HBM" in m.message
    assert m.device_bytes >= 2 * 4 * 60_000**2, "an argument and its gradient"
    again = nj.measure(lambda w: jnp.sum(jnp.tanh(w) ** 2), big, target="v5e")
    assert again.cached
    t = again.timeline()
    assert t.reserved == pytest.approx(m.device_bytes, abs=0.01 * 2**30), "libtpu says hundredths of a GiB"
    assert [(b.kind, b.bytes) for b in t.at_peak[:2]] == [
        ("argument", t.device.arguments),
        ("output", t.at_peak[1].bytes),
    ]
    assert t.at_peak[0].path == "args[0]"


def test_a_compiler_that_writes_no_schedule():
    answers = dict(
        device_bytes=3,
        host_bytes=0,
        limit_bytes=2,
        host_limit_bytes=None,
        flops=0,
        message="too much",
        seconds=0.0,
        cached=True,
    )
    parts = ("temp_bytes", "argument_bytes", "output_bytes", "alias_bytes", "host_temp_bytes")
    m = nj.Measurement(target="v5e", **answers, **dict.fromkeys(parts), texts=lambda name: None, parameters=list)
    with pytest.raises(ValueError, match=r"the compiler of v5e wrote no schedule .*predict_peak.* too much"):
        m.timeline()


def test_a_text_that_is_corrupt_is_made_again(tmp_path):
    loss, args = gpt("all")
    peak = nj.measure(loss, *args).timeline().peak_bytes
    [text] = (tmp_path / "cache").glob("*/*/hlo.gz")
    text.write_bytes(b"no gzip")
    with pytest.warns(UserWarning, match="hlo.gz: not a compressed text"):
        assert nj.measure(loss, *args).timeline().peak_bytes == peak


def test_what_libtpu_takes_fits():
    """Its temporaries count the holes of its heap twice: the sum may be more than the chip has."""
    program = step_of(lambda w: jnp.sum(w * w), (jnp.ones(3),))
    for target, fits in (("v5e", True), ("h200", False)):
        where = compiler.find_target(target)
        sizes = dict.fromkeys(worker.BYTES, 0) | {"temp": where.sheet.usable_bytes + 1}
        answer = compiler.Answer(bytes=sizes, out_of_memory=None, seconds=0.0, cached=True, text=lambda name: None)
        assert measurement(program, where, answer).fits is fits
    refused = {"wanted": where.sheet.usable_bytes - 1, "limit": where.sheet.usable_bytes, "message": "no"}
    answer = dataclasses.replace(answer, bytes=None, out_of_memory=refused)
    assert measurement(program, where, answer).fits is False


def test_a_slice_with_the_arguments_own_mesh():
    needs("v5e")
    mesh = nj.target_mesh("v5e:2x4", data=4, model=2)
    put = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    m = nj.measure(loss, put(P(None, "model"), 512, 512), put(P("data", None), 1024, 512), target="v5e:2x4")
    assert m.argument_bytes == 4 * (512 * 512 // 2 + 1024 * 512 // 4), "bytes of one device"


def test_the_local_device():
    loss, args = gpt("all")
    m = nj.measure(loss, *args)
    by_hand = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().memory_analysis()
    assert m.temp_bytes == by_hand.temp_size_in_bytes and m.argument_bytes == by_hand.argument_size_in_bytes
    assert m.target == "local" and m.fits is None, "a CPU does not say how much memory a program may take"


def test_an_nnx_model_is_measured_as_an_argument():
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    model = nnx.eval_shape(lambda: NNXGPT(rngs=nnx.Rngs(0)))
    loss = lambda model, t: loss_of(model(t), t)
    plain = nj.measure(loss, model, tokens)
    assert plain.output_bytes > sum(x.size * 4 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert nj.measure(loss, nj.apply_selective_checkpointing(model, "all"), tokens).flops > plain.flops


def test_a_compiler_option_reaches_the_compiler():
    loss, args = gpt("none")
    with pytest.raises(RuntimeError, match=r"does not compile for local: .*No such compile option: 'xla_no_such"):
        nj.measure(loss, *args, compiler_options={"xla_no_such_option": True})


def test_a_compiler_that_takes_too_long_is_stopped():
    needs("v5e")
    with pytest.raises(compiler.CompileError, match=r"gpt.* v5e: no answer within 0.5 s; give it longer"):
        loss, args = gpt("none")
        loss.__name__ = "gpt"
        nj.measure(loss, *args, target="v5e", timeout=0.5)


def test_a_compiler_that_dies_is_an_error_with_what_it_said(monkeypatch, tmp_path):
    needs("v5e")
    (tmp_path / "sitecustomize.py").write_text("import sys, os\nsys.stderr.write('killed by a test')\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    loss, args = gpt("none")
    with pytest.raises(compiler.CompileError, match="its compiler ended with status 9: killed by a test"):
        nj.measure(loss, *args, target="v5e")


def test_unknown_targets_and_missing_compilers(monkeypatch):
    with pytest.raises(ValueError, match=r"v9.*v5e"):
        nj.measure(jnp.sin, 1.0, target="v9")
    monkeypatch.setattr(_compat, "has_compiler", lambda kind: False)
    for target, kind in (("v5e", "tpu"), ("h100", "gpu")):
        with pytest.raises(RuntimeError, match=rf"needs a compiler .* pip install \"nexus-jax\[{kind}\]\""):
            nj.measure(jnp.sin, 1.0, target=target)


def test_the_policy_is_named_in_what_goes_wrong():
    def broken(policy):
        if policy == "all":
            raise ValueError("no such layer")
        return gpt(policy)

    with pytest.raises(ValueError, match="policy all: no such layer"):
        nj.compare(broken, ["none", "all"])
