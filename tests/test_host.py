"""A host too small for what is offloaded: bytes wanted and bytes there, wherever a step is looked at."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest
from checks import needs

import nexus_jax as nj
from nexus_jax.targets import find_target, host, sheet
from nexus_jax.training import offload

pytestmark = pytest.mark.filterwarnings("ignore:on the CPU")
GIB = 2**30
ROWS, D = 2**17, 512
EACH = 5 * ROWS * D * 2  # what a layer keeps: its input, and tanh, four times as wide


def scanned(params, x):
    step = lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None)
    return jnp.sum(jnp.sin(jax.lax.scan(step, x, params)[0].astype(jnp.float32)))


def arguments(layers):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    return {"up": shape(layers, D, 4 * D), "down": shape(layers, 4 * D, D)}, shape(ROWS, D)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(offload, "_SAID", set())
    monkeypatch.delenv(host.GPU_POOL, raising=False)


@pytest.mark.parametrize(
    ("target", "environ", "limit", "says"),
    [
        ("v5e", {}, 48 * GIB, "memory of a v5e, by its data sheet"),
        ("v5e:4x4", {}, 48 * GIB, "memory of a v5e"),
        ("h200", {}, 64 * GIB, f"{host.GPU_POOL}, 64 by default"),
        ("h200", {host.GPU_POOL: "many"}, 64 * GIB, "64"),  # as XLA reads it
        ("h200", {host.GPU_POOL: "128"}, 128 * GIB, f"{host.GPU_POOL}, 128"),
        ("h200", {host.GPU_POOL: "1024"}, sheet("h200").host_memory_bytes, "memory of a h200"),
        ("h200:8", {}, 8 * GIB, "64 for 8 devices by default"),
    ],
)
def test_what_limits_a_target(target, environ, limit, says):
    found = host.host_limit(find_target(target), environ)
    assert found is not None and found.nbytes == limit
    assert not found.refuse(limit)
    assert says in found.refuse(limit + 1) and "go to the host, and there are" in found.refuse(limit + 1)


def test_a_cpus_memory_is_the_hosts():
    assert host.host_limit(find_target(None)) is None


@pytest.mark.parametrize(("backend", "pool"), [("tpu", False), ("gpu", True)])
def test_what_limits_this_machine(monkeypatch, backend, pool):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(host, "available_memory", lambda: 1000 * GIB)
    found = host.host_limit(find_target(None))
    devices = jax.local_device_count()
    assert found is not None and found.nbytes == (64 * GIB if pool else 1000 * GIB) // devices
    monkeypatch.setattr(host, "available_memory", lambda: 10 * GIB)
    found = host.host_limit(find_target(None))
    assert found is not None and found.of_all(devices).nbytes == 10 * GIB
    assert "memory of this machine that is free" in found.refuse(11 * GIB)


def test_the_free_memory_of_this_machine(monkeypatch, tmp_path):
    assert 2**20 < (host.available_memory() or GIB) < 2**50
    (tmp_path / "meminfo").write_text("MemTotal:       24 kB\nMemAvailable:       12 kB\n")
    monkeypatch.setattr(host.pathlib, "Path", lambda _: tmp_path / "meminfo")
    assert host.available_memory() == 12 * 1024


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_a_step_that_wants_more_than_its_host_has_does_not_fit(target):
    needs(target)
    limit = {"v5e": 48 * GIB, "h200": 64 * GIB}[target]
    layers = 2 * limit // EACH
    loss = nj.ActivationOffloader(offload_threshold_mb=1.0).wrap(scanned)
    found = nj.measure(loss, *arguments(layers), target=target)
    assert found.host_bytes > 1.9 * limit and found.host_limit_bytes == limit
    assert found.limit_bytes is not None and found.device_bytes < found.limit_bytes
    assert found.fits is False
    assert "go to the host, and there are" in found.message and found.message in str(found)
    assert nj.report.size(found.host_bytes) in found.message and nj.report.size(limit) in found.message
    half = nj.measure(loss, *arguments(layers // 4), target=target)
    assert half.fits is True and not half.message and half.host_bytes > 0.4 * limit


def test_the_offloader_says_so_when_it_traces(monkeypatch):
    offloader = nj.ActivationOffloader(offload_threshold_mb=1.0)
    trace = lambda f, layers: jax.make_jaxpr(jax.grad(f))(*arguments(layers))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("nexus_jax.offloading.transfer.check_loops", lambda: None)
    monkeypatch.setattr(host, "available_memory", lambda: 2 * EACH)
    with pytest.warns(
        nj.OffloadWarning, match=r"2\.50 GiB go to the host, and there are 1\.25 GiB: the memory of this"
    ):
        trace(offloader.wrap(scanned), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "on the CPU")
        trace(offloader.wrap(scanned), 4)  # once
        monkeypatch.setattr(host, "available_memory", lambda: 5 * EACH)
        trace(nj.ActivationOffloader(offload_threshold_mb=2.0).wrap(scanned), 4)


def test_with_a_target_it_is_the_targets_host(monkeypatch):
    monkeypatch.setattr("nexus_jax.offloading.window.Windows.out", lambda self, beside: 10**12)  # all of it is hidden
    offloader = nj.ActivationOffloader(offload_threshold_mb="auto", target="v5e", prefetch_ahead=1)
    with (
        pytest.warns(nj.OffloadWarning, match=r"56\.25 GiB go to the host, and there are 48\.00 GiB: .* of a v5e"),
        offloader.offload_context(),
    ):
        jax.make_jaxpr(jax.grad(scanned))(*arguments(90))


def test_the_doctor_says_so():
    loss = nj.ActivationOffloader(offload_threshold_mb=1.0).wrap(scanned)
    report = nj.doctor(loss, *arguments(90), target="v5e")
    [told] = [finding for finding in report if finding.check == "host memory"]
    assert "56.25 GiB go to the host, and it has 48.00 GiB" in told.found
    assert "host memory" in report.checked
    report = nj.doctor(loss, *arguments(70), target="v5e")
    assert not [finding for finding in report if finding.check == "host memory"]
    report = nj.doctor(loss, *arguments(90), target="v5e:2x2")  # four chips, sharded or not
    assert not [finding for finding in report if finding.check == "host memory"]


def test_a_limit_is_a_value():
    limit = host.HostLimit(nbytes=3, what="a", write="b")
    assert limit.of_all(2) == dataclasses.replace(limit, nbytes=6)
