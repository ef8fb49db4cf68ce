"""Calibration: tiny sizes, and no figure is held to anything but being one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from nexus_jax import flops, roofline
from nexus_jax.calibration import Calibration, calibrate

TINY = {"matmul_size": 32, "memory_bytes": 2**12, "host_bytes": 2**12, "repeats": 2}

MADE = Calibration(
    name="NVIDIA H100 80GB HBM3",
    kind="gpu",
    bf16_flops=7e14,
    f32_flops=3.5e14,
    memory_bandwidth=3e12,
    host_to_device_bandwidth=5e10,
    device_to_host_bandwidth=4e10,
    date="2026-01-31",
    versions={"jax": "0.12.0"},
)


def test_a_cpu_has_no_host_link_and_says_so():
    found = calibrate(**TINY)
    rates = (found.bf16_flops, found.f32_flops, found.memory_bandwidth)
    assert all(0 < rate < math.inf for rate in rates)
    assert found.host_to_device_bandwidth is None and found.device_to_host_bandwidth is None
    assert found.kind == "cpu" and found.name == jax.devices()[0].device_kind
    assert found.versions["jax"] == jax.__version__ and len(found.date) == 10
    assert "no host link: this device is the host." in str(found)


def test_another_device_than_the_default_one_is_measured(monkeypatch):
    from nexus_jax import calibration

    used = []
    median = calibration._median
    monkeypatch.setattr(calibration, "_median", lambda run, x, n: used.append(x.devices()) or median(run, x, n))
    calibrate(jax.devices()[3], **TINY)
    assert used == [{jax.devices()[3]}] * 3


class Accelerator:
    """A CPU device that says it is another, so that the copies to pinned_host are made."""

    platform = "gpu"
    device_kind = "test"

    def __init__(self, kinds=("device", "pinned_host")):
        self.kinds = kinds

    def addressable_memories(self):
        return [m for m in jax.devices()[0].addressable_memories() if m.kind in self.kinds]

    def default_memory(self):
        return jax.devices()[0].default_memory()


def test_the_host_link_is_measured_each_way(monkeypatch):
    from nexus_jax import calibration

    put = []
    monkeypatch.setattr(calibration, "SingleDeviceSharding", lambda _, memory_kind: sharding(memory_kind))
    sharding = lambda kind: jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    real = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, where: put.append(where.memory_kind) or real(x, where))
    to_host, to_device, notes = calibration._host_link(Accelerator(), 2**12, 2)
    assert to_host > 0 and to_device > 0 and notes == ()
    assert put[1:] == ["pinned_host", put[0]] * 3


def test_a_device_without_pinned_memory_says_so():
    from nexus_jax import calibration

    found = calibration._host_link(Accelerator(kinds=("device",)), 2**12, 2)
    assert found[:2] == (None, None) and found[2][0].startswith(
        "no host link: the device reaches no pinned_host memory"
    )


@pytest.mark.parametrize("name", ["matmul_size", "memory_bytes", "host_bytes", "repeats"])
@pytest.mark.parametrize("value", [0, -4, 1.5, True])
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: write a positive whole number"):
        calibrate(**{**TINY, name: value})


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [MADE, dataclasses.replace(MADE, device_to_host_bandwidth=None, notes=("no link",))])
def test_saved_and_loaded_it_is_the_same(made, tmp_path):
    made.save(tmp_path / "here.toml")
    found = Calibration.load(tmp_path / "here.toml")
    assert found == made and hash(found) == hash(made) and found.notes == made.notes


def test_a_measured_one_survives_its_file(tmp_path):
    found = calibrate(**TINY)
    found.save(str(tmp_path / "here.toml"))
    assert Calibration.load(str(tmp_path / "here.toml")) == found


GOOD = 'name = "x"\nkind = "gpu"\ndate = "2026-01-31"\nbf16_flops = 1e12\nf32_flops = 1e12\nmemory_bandwidth = 1e12\n'

BAD = {
    "no TOML": ("name = ", "Invalid value"),
    "a key missing": (GOOD.replace("f32_flops = 1e12\n", ""), "key f32_flops is missing"),
    "an unknown key": (GOOD + "flops = 3\n", "unknown key flops: the keys are name, kind, bf16_flops"),
    "a string for a number": (GOOD.replace("f32_flops = 1e12", 'f32_flops = "fast"'), "f32_flops='fast': write a pos"),
    "a negative": (
        GOOD.replace("f32_flops = 1e12", "f32_flops = -1"),
        "f32_flops=-1: write a positive number of FLOP/s",
    ),
    "infinite": (GOOD.replace("f32_flops = 1e12", "f32_flops = inf"), "f32_flops=inf: write a positive number"),
    "true": (GOOD.replace("f32_flops = 1e12", "f32_flops = true"), "f32_flops=True: write a positive number"),
    "a bad link": (
        GOOD + "host_to_device_bandwidth = 0\n",
        "host_to_device_bandwidth=0: write a positive number of B/s",
    ),
    "a number for a string": (GOOD.replace('"x"', "3"), "name=3: write a string"),
    "a date of its own": (GOOD.replace('"2026-01-31"', "2026-01-31"), "date=.*: write a string"),
    "versions": (GOOD + "versions = 3\n", "versions=3: write a table of strings"),
    "a version": (GOOD + "[versions]\njax = 0.12\n", "versions=.*: write a table of strings"),
    "notes": (GOOD + 'notes = "n"\n', "notes='n': write a list of strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_key(name, tmp_path):
    text, message = BAD[name]
    (tmp_path / "here.toml").write_text(text)
    with pytest.raises(ValueError, match=f"here.toml: .*{message}"):
        Calibration.load(tmp_path / "here.toml")


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "here.toml").write_text(GOOD)
    assert Calibration.load(tmp_path / "here.toml").f32_flops == 1e12


def test_no_text_at_all(tmp_path):
    (tmp_path / "here.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"here.toml: .*can't decode"):
        Calibration.load(tmp_path / "here.toml")
    with pytest.raises(FileNotFoundError, match=r"there.toml"):
        Calibration.load(tmp_path / "there.toml")


# --- in place of a data sheet ----------------------------------------------------------------------------------------


def test_measured_figures_replace_a_data_sheets():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    count = flops.count(jnp.dot, x, x)
    assert roofline.step_time(count, MADE).seconds == 2 * 4096**3 / 7e14
    slower = dataclasses.replace(MADE, bf16_flops=3.5e14)
    assert roofline.step_time(count, slower).seconds == 2 * roofline.step_time(count, MADE).seconds
    assert "NVIDIA H100 80GB HBM3" in str(roofline.step_time(count, MADE))


def test_the_table_of_a_calibration():
    text = " ".join(str(MADE).split())
    assert "measured 2026-01-31 with jax 0.12.0" in text and "7e+14 FLOP/s" in text
