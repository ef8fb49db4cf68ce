"""The time of equations and steps from a data sheet, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from models import GPT, linen_loss

import nexus_jax as nj
from nexus_jax import flops, roofline
from nexus_jax.flops import Count, Record
from nexus_jax.targets.sheets import names, sheet


@dataclasses.dataclass(frozen=True)
class Device:
    """Round numbers."""

    name: str = "test"
    kind: str = "gpu"
    bf16_flops: float = 1000.0
    f32_flops: float = 100.0
    memory_bandwidth: float = 10.0
    host_to_device_bandwidth: float | None = 2.0
    device_to_host_bandwidth: float | None = 5.0


def record(**changed):
    given = {"op": "dot_general", "scope": "net", "phase": "forward", "flops": 0, "read": 0, "written": 0}
    return Record(**{**given, "fused": (0, 0), "dtype": "float32", **changed})


@pytest.mark.parametrize(
    "changed, seconds",
    [
        ({"flops": 1000}, 10.0),
        ({"flops": 1000, "times": 3}, 30.0),
        ({"flops": 1000, "dtype": "bfloat16"}, 1.0),
        ({"flops": 1000, "dtype": "float16"}, 1.0),
        ({"flops": 1000, "dtype": "int8"}, 1.0),
        ({"flops": 1000, "dtype": "float8_e4m3fn"}, 1.0),
        ({"flops": 1000, "dtype": "float64"}, 10.0),
        ({"flops": 1000, "passes": 6}, 60.0),
        ({"flops": 1000, "passes": 6, "dtype": "bfloat16"}, 1.0),
        ({"read": 60, "written": 40}, 10.0),
        ({"read": 60, "written": 40, "flops": 900}, 10.0),
        ({"read": 60, "written": 40, "flops": 1100}, 11.0),
        ({"read": 40, "written": 40, "place": "host", "phase": "transfer"}, 8.0),
        ({"read": 40, "written": 40, "place": "device", "phase": "transfer"}, 20.0),
        ({"read": 60, "written": 40, "fused": (10, 10)}, 10.0),
        ({"op": "tanh"}, 0.0),
    ],
    ids=str,
)
def test_the_time_of_an_equation(changed, seconds):
    assert roofline.seconds(record(**changed), Device()) == pytest.approx(seconds)


def test_a_tpu_fuses_what_is_around_a_matmul():
    r = record(read=60, written=40, fused=(10, 10))
    assert roofline.seconds(r, Device(kind="tpu")) == pytest.approx(2.0)


STEP = Count(
    (
        record(flops=1000),
        record(flops=2000, phase="backward", scope="other"),
        record(flops=500, phase="recompute"),
        record(written=40, phase="transfer", place="host"),
        record(written=40, phase="transfer", place="device"),
    )
)


def test_the_parts_of_a_step():
    found = roofline.step_time(STEP, Device())
    assert (found.forward, found.backward, found.recompute) == (10.0, 20.0, 5.0)
    assert (found.to_host, found.to_device, found.transfer) == (8.0, 20.0, 28.0)
    assert found.compute == found.seconds == 35.0 and found.seconds_without_overlap == 63.0
    assert [e.seconds for e in found.equations] == [20.0, 20.0, 10.0, 8.0, 5.0]
    assert [e.bound for e in found.equations] == ["FLOPs", "host link", "FLOPs", "host link", "FLOPs"]
    assert found.equations[0].path == "other"


def test_a_slow_link_bounds_the_step():
    found = roofline.step_time(STEP, Device(host_to_device_bandwidth=0.5))
    assert found.seconds == found.to_device == 80.0 and found.compute == 35.0


@settings(max_examples=25, deadline=None)
@given(devices=st.integers(1, 64))
def test_devices_share_a_step(devices):
    one, shared = roofline.step_time(STEP, Device()), roofline.step_time(STEP, Device(), devices)
    assert shared.seconds * devices == pytest.approx(one.seconds)
    assert sum(e.seconds for e in shared.equations) * devices == pytest.approx(63.0)


def test_the_longest_equations_are_printed_with_layers_together():
    layers = Count(tuple(record(flops=1000, scope=f"net/block_{i}") for i in range(12)))
    text = str(roofline.step_time(layers, Device(), 2))
    assert "60 s a step on 2 x test, at best" in text
    [line] = [line for line in text.splitlines() if "net/block_* dot_general" in line]
    assert "60 s" in line and "100 %" in line and " 12 " in line and "FLOPs" in line


def test_a_step_of_nothing_prints():
    assert "0 ns a step" in str(roofline.step_time(Count(()), Device()))


def test_what_is_not_known_is_named():
    x = jnp.ones((3, 3))
    found = roofline.step_time(flops.count(lambda x: jnp.linalg.eigh(x)[1], x), Device())
    assert "not counted, because their FLOPs are not known: eigh (runs 1x)" in str(found)


@pytest.mark.parametrize("devices", [0, -1, 1.5, True, None])
def test_bad_devices(devices):
    with pytest.raises(ValueError, match=r"devices=.*: write how many devices share the program, 1 or more"):
        roofline.step_time(STEP, Device(), devices)


@pytest.mark.parametrize("place, missing", [("host", "device_to_host"), ("device", "host_to_device")])
def test_a_device_without_a_host_link(place, missing):
    device = Device(host_to_device_bandwidth=None, device_to_host_bandwidth=None)
    count = Count((record(written=1, phase="transfer", place=place),))
    with pytest.raises(
        ValueError, match=f"copies to {place} memory, and test has no {missing}_bandwidth: give a sheet"
    ):
        roofline.step_time(count, device)
    assert roofline.step_time(Count((record(flops=1000),)), device).seconds == 10.0


@pytest.mark.parametrize("precision, passes", [(None, 1), ("high", 3), ("highest", 6), ("BF16_BF16_F32_X3", 3)])
def test_the_precision_of_a_float32_matmul(precision, passes):
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    [r] = flops.count(lambda x: jax.lax.dot(x, x, precision=precision), x).records
    assert r.passes == passes
    bf16 = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    [r] = flops.count(lambda x: jnp.dot(x, x, precision="highest"), bf16).records
    assert r.passes == 1 and r.dtype == "bfloat16"


@pytest.mark.parametrize("name", names())
def test_every_sheet_gives_a_gpt_step_a_time(name):
    found = roofline.step_time(gpt(None), sheet(name))
    flops_alone = gpt(None).matmul_flops / sheet(name).f32_flops
    assert found.seconds > flops_alone and 0 < found.forward < found.backward and found.recompute == 0


def gpt(policy):
    model = nj.apply_selective_checkpointing(GPT(layers=2), policy) if policy else GPT(layers=2)
    tokens = jnp.zeros((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return flops.count(jax.value_and_grad(linen_loss(model, tokens)), params)


def test_recomputing_takes_time_and_the_rest_stays():
    plain, all_ = (roofline.step_time(gpt(policy), sheet("h100")) for policy in (None, "all"))
    assert plain.recompute == 0 < all_.recompute < all_.forward
    assert all_.backward == pytest.approx(plain.backward, rel=0.1)
    assert all_.seconds > plain.seconds


def test_offloading_takes_the_host_link():
    offload = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    block = jax.checkpoint(lambda x: jnp.sin(jnp.sin(checkpoint_name(jnp.sin(x), "kept"))), policy=offload)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    found = roofline.step_time(flops.count(jax.grad(lambda x: jnp.sum(block(x))), x), sheet("v5e"))
    assert found.to_host == 2**22 / sheet("v5e").device_to_host_bandwidth
    assert found.to_device == 2**22 / sheet("v5e").host_to_device_bandwidth
    assert found.seconds == max(found.to_host, found.to_device) > found.compute > 0
