"""Policies side by side: facts once, compiles once, and a difference that names what grew."""

import json

import jax
import jax.numpy as jnp
import pytest
from models import GPT, linen_loss

import nexus_jax as nj
from nexus_jax.compare import difference
from nexus_jax.targets import compiler


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "cache"))


def gpt(policy="none", batch=2, length=32, layers=2):
    """A workload."""
    model = nj.apply_selective_checkpointing(GPT(layers=layers), policy)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return lambda p, t: linen_loss(model, t)(p), (jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


def test_rows_hold_what_residuals_and_measure_say():
    found = nj.compare(gpt, ["none", "all", nj.load_policy("alternate")])
    assert [row.policy for row in found] == ["none", "all", "alternate"] and found.targets == ("local",)
    for row in found:
        loss, args = gpt(row.policy)
        kept, measured = nj.residuals(loss, *args), nj.measure(loss, *args)
        assert (row.residual_device_bytes, row.residual_host_bytes) == (kept.device_bytes, kept.host_bytes)
        assert sum(row.residuals.values()) == kept.nbytes
        assert row.measured["local"] == measured and row.flops == measured.flops
    assert found[1].residual_device_bytes < found[2].residual_device_bytes < found[0].residual_device_bytes
    assert found[0].flops < found[2].flops < found[1].flops


def test_a_second_time_nothing_is_compiled(monkeypatch):
    first = nj.compare(gpt, ["none", "all"])

    def refuse(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "_compile", refuse)
    again = nj.compare(gpt, ["none", "all"])
    assert again == first and all(row.measured["local"].cached for row in again)
    with pytest.raises(AssertionError, match="compiled again"):
        nj.compare(lambda policy: gpt(policy, batch=4), ["none"])


def test_one_policy_is_no_sequence_of_letters():
    for policy in ("all", nj.load_policy("all")):
        assert [row.policy for row in nj.compare(gpt, policy)] == ["all"]
    with pytest.raises(ValueError, match=r"targets=\[\]: give at least one target"):
        nj.compare(gpt, "all", targets=[])


def test_without_policies_the_workload_as_it_is():
    [row] = nj.compare(lambda: gpt("all"), ())
    assert row.policy == "" and row.measured["local"].device_bytes > 0
    assert "as it is" in str(nj.compare(lambda: gpt("all"), ()))


def test_the_difference_names_what_grew():
    before, after = (nj.compare(lambda policy, n=n: gpt(policy, length=n), ["none"]).as_dict() for n in (32, 64))
    lines = difference(json.loads(json.dumps(before)), json.loads(json.dumps(after)))
    assert lines[0].startswith("none on local: +") and "of device bytes" in lines[0]
    assert any("% FLOPs" in line for line in lines)
    assert any("GPT/blocks[0..1]/attn" in line and "+" in line for line in lines)
    assert difference(before, before) == []
    other = nj.compare(gpt, ["all"]).as_dict()
    assert difference(before, other) == ["none: only in the first report", "all: only in the second report"]


@pytest.mark.parametrize("report", [{}, {"version": 0, "rows": []}, [], "text", {"version": 1}])
def test_what_is_no_report_is_refused(report):
    with pytest.raises(ValueError, match="not a report of `nexus-jax compare --json`"):
        difference(report, report)
