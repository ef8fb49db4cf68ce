"""The doctor: each check finds what it is for, and says nothing where all is well. Nothing is compiled."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from models import GPT, linen_loss

import nexus_jax as nj
from nexus_jax import _compat
from nexus_jax.doctor import CHECKS, case_of, doctor, environment, examine, program
from nexus_jax.doctor.case import Case

F32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
WS, X = [F32(8, 8)] * 3, F32(4, 8)
by_name = jax.checkpoint_policies.save_only_these_names
QUIET = Case(platform="cuda", environ={}, config={}, version=(0, 12, 0))


def offload(*names):
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


def layers(policy=None, name="h"):
    """Three layers, each under ``jax.checkpoint``."""
    layer = jax.checkpoint(lambda w, x: jnp.sin(checkpoint_name(x @ w, name)) @ w, policy=policy)

    def loss(ws, x):
        for w in ws:
            x = layer(w, x)
        return jnp.sum(x)

    return loss


def scanned(policy=None, name="h", steps=3):
    def loss(ws, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(checkpoint_name(x @ w, name)) @ w, None), policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, jnp.stack(ws[:steps]))[0])

    return loss


def case(fn=None, platform="cuda", environ=(), **config):
    made = case_of(fn, (WS, X), platform)
    return dataclasses.replace(made, environ=dict(environ), config=config, version=(0, 12, 0))


def found(check, case):
    return [str(finding) for finding in check(case)]


# --- flags and environment -------------------------------------------------------------------------------------------

LATENCY = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.mark.parametrize(
    ("fn", "platform", "environ", "says"),
    [
        (layers(offload("h")), "cuda", {}, "latency-hiding scheduler is on"),
        (
            layers(offload("h")),
            "cuda",
            {"XLA_FLAGS": f"{LATENCY}=false {LATENCY}=true"},
            "latency-hiding scheduler is on",
        ),
        (layers(offload("h")), "cuda", {"XLA_FLAGS": f"{LATENCY}=true {LATENCY}=false"}, None),
        (layers(offload("h")), "tpu", {}, "outside any loop, on a TPU"),
        (layers(offload("h")), "cpu", {}, None),
        (layers(by_name("h")), "cuda", {}, None),
        (scanned(offload("h")), "cuda", {}, None),
        (scanned(offload("h")), "tpu", {}, None),
        (scanned(offload("h"), steps=1), "tpu", {}, "outside any loop"),
    ],
)
def test_unrolled_offload(fn, platform, environ, says):
    told = found(environment.unrolled_offload, case(fn, platform, environ))
    assert [says in text for text in told] == ([True] if says else [])


def test_the_options_of_the_steps_own_jit_are_flags():
    options = {"xla_gpu_enable_latency_hiding_scheduler": False}
    step = jax.jit(layers(offload("h")), compiler_options=options)
    assert found(environment.unrolled_offload, case(step)) == []
    step = jax.jit(layers(offload("h")), compiler_options={"xla_gpu_autotune_level": 0})
    assert len(found(environment.unrolled_offload, case(step))) == 1
    assert nj.residuals(step, WS, X).host_bytes == 3 * 4 * 8 * 4


def test_what_goes_to_the_host_is_counted_over_all_steps_of_loops():
    assert case(scanned(offload("h"))).host_bytes == case(layers(offload("h"))).host_bytes == 3 * 4 * 8 * 4
    training = lambda ws, x: jax.grad(layers(offload("h")))(ws, x)  # a step that computes its gradients itself
    assert case(training).host_bytes == 3 * 4 * 8 * 4 and case(layers()).host_bytes == 0


def test_offload_on_a_cpu():
    told = found(environment.offload_on_cpu, case(layers(offload("h")), "cpu"))
    assert len(told) == 1 and "384 B go to the host" in told[0]
    assert found(environment.offload_on_cpu, case(layers(offload("h")), "cuda")) == []
    assert found(environment.offload_on_cpu, case(layers(by_name("h")), "cpu")) == []


GB_ = 2**30


@pytest.mark.parametrize(
    ("platform", "environ", "host", "says"),
    [
        ("cuda", {}, 65 * GB_, "allows 64.00 GiB by default"),
        ("cuda", {}, 63 * GB_, None),
        ("cuda", {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "128"}, 65 * GB_, None),
        ("cuda", {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "8"}, 16 * GB_, "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=20"),
        ("cuda", {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "64GB"}, 0, "'64GB' is no whole number"),
        ("tpu", {}, 5 * GB_, "TPU_PREMAPPED_BUFFER_SIZE=5368709120"),
        ("tpu", {}, 3 * GB_, None),
        ("tpu", {"TPU_PREMAPPED_BUFFER_SIZE": "17179869184"}, 5 * GB_, None),
        ("tpu", {"TPU_PREMAPPED_BUFFER_SIZE": "5000"}, 0, "'5000' is no multiple of 4096"),
        ("cpu", {}, 100 * GB_, None),
    ],
)
def test_pinned_memory(platform, environ, host, says):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Large(Case):
        @property
        def host_bytes(self):
            return host

    told = found(environment.pinned_memory, Large(platform=platform, environ=environ, config={}, version=(0, 12, 0)))
    assert [says in text for text in told] == ([True] if says else [])


@pytest.mark.parametrize(
    ("platform", "flags", "count"),
    [
        ("cuda", "", 0),
        ("cuda", "--xla_gpu_enable_host_memory_offloading=true", 1),
        ("cuda", "--xla_gpu_enable_host_memory_offloading", 1),
        ("cuda", "--xla_gpu_enable_host_memory_offloading=false", 0),
        ("cuda", "--xla_gpu_enable_pipelined_host_offloading=1", 1),
        ("tpu", "--xla_gpu_enable_host_memory_offloading=true", 0),
        ("tpu", "--xla_tpu_impure_disable_offloading=true --xla_tpu_rematerialization_use_host_memory_offload=true", 2),
    ],
)
def test_xla_offloading_flags(platform, flags, count):
    name = "LIBTPU_INIT_ARGS" if platform == "tpu" else "XLA_FLAGS"
    told = found(environment.xla_offloading, dataclasses.replace(QUIET, platform=platform, environ={name: flags}))
    assert len(told) == count and all("is on" in text for text in told)


@pytest.mark.parametrize(
    ("platform", "environ", "config", "says"),
    [
        ("cuda", {}, {}, None),
        ("cuda", {}, {"jax_compiler_enable_remat_pass": True, "jax_memory_fitting_level": "O2"}, None),
        ("cuda", {}, {"jax_compiler_enable_remat_pass": False}, "jax_compiler_enable_remat_pass is False"),
        ("cpu", {}, {"jax_compiler_enable_remat_pass": False}, None),
        ("tpu", {"XLA_FLAGS": "--xla_disable_hlo_passes=cse,rematerialization"}, {}, "names rematerialization"),
        ("cuda", {}, {"jax_memory_fitting_level": "O0"}, "jax_memory_fitting_level is O0"),
        ("tpu", {"LIBTPU_INIT_ARGS": "--xla_tpu_rematerialization_algo=3"}, {}, "--xla_tpu_rematerialization_algo=3"),
        ("cuda", {"LIBTPU_INIT_ARGS": "--xla_tpu_rematerialization_algo=3"}, {}, None),
        ("cuda", {"XLA_FLAGS": "--xla_gpu_memory_limit_slop_factor=80"}, {}, "xla_gpu_memory_limit_slop_factor=80"),
    ],
)
def test_xla_remat(platform, environ, config, says):
    made = dataclasses.replace(QUIET, platform=platform, environ=environ, config=config)
    told = found(environment.xla_remat, made)
    assert [says in text for text in told] == ([True] if says else [])


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "0.95", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, None),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "JAX may take .5 of the GPU's memory"),
        ({"XLA_CLIENT_MEM_FRACTION": "most"}, "JAX may take most"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, "are both set"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "fragments"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "very slow"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"}, None),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "mine"}, "one of default, platform"),
    ],
)
def test_gpu_memory(environ, says):
    told = found(environment.gpu_memory, dataclasses.replace(QUIET, environ=environ))
    assert [says in text for text in told] == ([True] if says else [])
    assert found(environment.gpu_memory, dataclasses.replace(QUIET, environ=environ, platform="tpu")) == []


@pytest.mark.parametrize(
    "name", ["jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_disable_most_optimizations", "jax_remat3"]
)
def test_settings_of_jax(name):
    told = found(environment.jax_config, dataclasses.replace(QUIET, config={name: True}))
    assert len(told) == 1 and f"{name} is on" in told[0]
    assert found(environment.jax_config, dataclasses.replace(QUIET, config={name: False})) == []
    if name == "jax_remat3":
        old = dataclasses.replace(QUIET, config={name: True}, version=(0, 10, 2))
        assert "policies that offload fail" in found(environment.jax_config, old)[0]


def test_settings_are_read_from_jax():
    with jax.debug_nans(True):
        assert any("jax_debug_nans is on" in finding.found for finding in doctor())
    assert not any("jax_debug_nans" in finding.found for finding in doctor())


def test_versions():
    told = found(environment.versions, dataclasses.replace(QUIET, platform="cpu", version=(0, 10, 2)))
    assert len(told) == 1 and "jax 0.10.2 on the CPU" in told[0] and "frees nothing" in told[0]
    assert found(environment.versions, dataclasses.replace(QUIET, platform="cpu")) == []
    assert found(environment.versions, dataclasses.replace(QUIET, platform="cuda", version=(0, 10, 2))) == []


# --- the step ----------------------------------------------------------------------------------------------------------


def test_scan_of_length_one():
    told = found(program.scan_of_one, case(scanned(steps=1)))
    assert len(told) == 1 and "1 scan of length 1: test_doctor.py:" in told[0]
    told = found(program.scan_of_one, case(scanned(offload("h"), steps=1)))
    assert "128 B that go to the host in it" in told[0]
    assert found(program.scan_of_one, case(scanned())) == [] == found(program.scan_of_one, case(layers()))


def test_nested_remat():
    inner = layers()
    told = found(program.nested_remat, case(jax.checkpoint(inner)))
    assert len(told) == 1 and "3 jax.checkpoints inside another" in told[0]
    assert found(program.nested_remat, case(inner)) == []
    model = GPT(layers=2)
    tokens = jnp.zeros((2, 16), int)
    ours = nj.apply_selective_checkpointing(model, "all")
    loss = linen_loss(ours, tokens)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert found(program.nested_remat, case_of(loss, (params,), "cuda")) == []
    assert len(found(program.nested_remat, case_of(jax.checkpoint(loss), (params,), "cuda"))) == 1


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (layers(by_name("hh"), name="h"), "write: 'h', which is borne"),
        (layers(by_name("context"), name="h"), "write: checkpoint_name(x, 'context') on a value"),
        (scanned(offload("hh"), name="h"), "goes by the name 'hh'"),
        (layers(jax.checkpoint_policies.save_from_both_policies(by_name("q"), by_name("h"))), "the name 'q'"),
        (
            layers(nj.Policy(residual=(nj.ResidualRule(name="hh", place="save"), nj.ResidualRule(place="recompute")))),
            "'hh'",
        ),
        (layers(by_name("h")), None),
        (layers(offload("h")), None),
        (layers(), None),
        (layers(jax.checkpoint_policies.dots_saveable), None),
        (layers(nj.load_policy("heavy_ops")), None),
        (layers(lambda prim, *_, **__: False), None),
    ],
)
def test_policy_names(fn, says):
    told = found(program.policy_names, case(fn))
    assert [says in text for text in told] == ([True] if says else [])


@pytest.mark.parametrize(
    ("fn", "unused"),
    [
        (layers(), True),
        (layers(by_name("q")), True),
        (layers(jax.checkpoint_policies.dots_saveable), True),
        (lambda ws, x: jnp.sum(jnp.sin(checkpoint_name(x, "h"))), True),
        (layers(by_name("h")), False),
        (scanned(offload("h")), False),
        (layers(jax.checkpoint_policies.save_any_names_but_these("q")), False),
        (layers(lambda prim, *_, **__: False), False),
        (lambda ws, x: jnp.sum(x @ ws[0]), False),
    ],
)
def test_unused_names(fn, unused):
    told = found(program.unused_names, case(fn))
    assert ["no policy asks for: 'h'" in text for text in told] == [True] * unused


def test_names_that_a_policy_of_ours_reads_are_used():
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return checkpoint_name(nn.Dense(8)(nn.gelu(checkpoint_name(nn.Dense(32)(x), "up"))), "down")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = Block(name=f"blocks_{i}")(x)
            return x

    rules = (nj.ResidualRule(name="up", place="save"), nj.ResidualRule(place="recompute"))
    policy = nj.Policy(checkpoint=(nj.CheckpointRule(layers="::"),), residual=rules)
    model = nj.apply_selective_checkpointing(Model(), policy)
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    told = found(program.unused_names, case_of(lambda p, x: jnp.sum(model.apply(p, x)), (params, X), "cuda"))
    assert len(told) == 1 and "asks for: 'down'" in told[0]


def test_offloaded_names_that_stay():
    """The output of a scanned block is the next one's input: it is kept as that, not by its name."""

    def output_named(ws, x):
        step = lambda x, w: (checkpoint_name(x + jnp.sin(x @ w), "out"), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(step, policy=offload("out")), x, jnp.stack(ws))[0])

    told = found(program.unmoved_names, case(output_named))
    assert len(told) == 1 and "'out' to be offloaded, and nothing goes to the host" in told[0]
    assert found(program.unmoved_names, case(scanned(offload("h")))) == []
    assert found(program.unmoved_names, case(scanned(by_name("h")))) == []


def kernel(x):
    body = lambda x_ref, o_ref: o_ref.__setitem__(..., jnp.sin(x_ref[...]))
    call = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)
    sin = jax.custom_vjp(call)
    sin.defvjp(lambda x: (call(x), x), lambda x, ct: (ct * jnp.cos(x),))
    return sin(x)


def attention(policy):
    layer = jax.checkpoint(lambda w, x: checkpoint_name(kernel(x @ w), "context") @ w, policy=policy)
    return lambda ws, x: jnp.sum(layer(ws[0], x))


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (jax.checkpoint_policies.dots_saveable, 1),
        (jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"), 1),
        (lambda prim, *_, **__: prim.name == "dot_general", 1),
        (lambda prim, *_, **__: prim.name in ("dot_general", "pallas_call"), 0),
        (by_name("context"), 0),
        (None, 0),
    ],
)
def test_kernels_that_a_policy_does_not_know(policy, count):
    told = found(program.unknown_kernels, case(attention(policy)))
    assert len(told) == count and all("1 kernel (pallas_call)" in text for text in told)


def test_names_and_boundaries_are_read_under_remat3_too(monkeypatch):
    jax.config.update("jax_remat3", True)
    try:
        told = found(program.policy_names, case(layers(by_name("hh"), name="h")))
        quiet = found(program.policy_names, case(layers(by_name("h"), name="h")))
    finally:
        jax.config.update("jax_remat3", False)
    assert len(told) == 1 and "'h', which is borne" in told[0] and quiet == []


# --- the report --------------------------------------------------------------------------------------------------------


def test_nothing_found_is_one_line_that_says_what_was_checked():
    said = str(examine(QUIET, "h200"))
    assert said.startswith("doctor: nothing found for h200; checked: ") and "\n" not in said
    assert "pinned memory" in said and "not without a step: unrolled offload" in said
    said = str(examine(case(layers(by_name("h"))), "h200"))
    assert "nothing found" in said and all(check.name in said for check in CHECKS) and "without a step" not in said


def test_findings_say_what_to_write():
    report = doctor(layers(offload("hh"), name="h"), WS, X, target="v5e")
    assert [f.check for f in report] == ["policy names", "unused names"] and report[0].write == "'h', which is borne"
    said = str(report)
    assert said.startswith("doctor: 2 findings for v5e") and max(map(len, said.splitlines())) <= 110
    assert said.count("why it matters: ") == said.count("write: ") == 2
    told = json.loads(json.dumps(report.as_dict()))
    assert (
        told["target"] == "v5e" and told["findings"][0]["check"] == "policy names" and "nested remat" in told["checked"]
    )


def test_each_finding_is_of_its_check():
    """The names in the report are those of the list."""
    names = {check.name for check in CHECKS}
    everything = dataclasses.replace(
        case(jax.checkpoint(scanned(offload("h", "q"), steps=1)), "cpu"),
        version=(0, 10, 2),
        config={"jax_debug_nans": True},
    )
    report = examine(everything, "local")
    assert len({f.check for f in report}) >= 6 and {f.check for f in report} <= names


def test_bad_input():
    with pytest.raises(TypeError, match="no argument is an array"):
        doctor(lambda n: n, 3)
    with pytest.raises(ValueError, match="v9"):
        doctor(target="v9")


# --- private names -----------------------------------------------------------------------------------------------------


def test_names_in_jaxs_own_policies():
    """They are no part of JAX's interface: told here when they move."""
    policies, names = jax.checkpoint_policies, _compat.names_in_policy
    assert names(policies.save_only_these_names("q", "k")) == {"q", "k"}
    assert names(policies.save_from_both_policies(by_name("q"), policies.dots_saveable)) == {"q"}
    assert names(policies.dots_saveable) == names(policies.everything_saveable) == frozenset()
    assert names(policies.save_any_names_but_these("q")) is None and names(lambda *_, **__: True) is None
    both = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["q"],
        names_which_can_be_offloaded=["k"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    assert names(both) == {"q", "k"} and names(both, offloaded=True) == {"k"}


def test_the_options_of_a_jitted_function():
    jitted = jax.jit(jnp.sin, compiler_options={"xla_cpu_enable_fast_math": True})
    assert _compat.jit_options(jitted) == {"xla_cpu_enable_fast_math": "True"}
    assert _compat.jit_options(jax.jit(jnp.sin)) == _compat.jit_options(jnp.sin) == {}
