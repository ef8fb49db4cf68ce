"""The command line: tables for people, JSON for machines, statuses for CI, and one line for whatever goes wrong."""

import ctypes
import json
import os
import subprocess
import sys

import jax
import pytest

import nexus_jax as nj
from nexus_jax import _compat, cli

WORK = """
import flax.linen as nn, jax, jax.numpy as jnp
import nexus_jax as nj


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Block(name=f"blocks_{i}")(x)
        return x


def step(policy="none", batch=64, extra=False):
    model = nj.apply_selective_checkpointing(Model(), policy)
    x = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    more = lambda p, x: jnp.mean(jnp.sin(model.apply(p, 2 * x))) if extra else 0.0
    loss = lambda p, x: jnp.mean(model.apply(p, x) ** 2) + more(p, x)
    return loss, (jax.eval_shape(model.init, jax.random.key(0), x), x)


def vector(policy="none"):
    return (lambda w: w * 2), (jax.ShapeDtypeStruct((3,), jnp.float32),)


def integers():
    return (lambda n: jnp.sum(n * 1.0)), (jax.ShapeDtypeStruct((3,), jnp.int32),)


def breaks():
    return {}["key"]


def ends():
    raise SystemExit


def silent():
    raise ValueError


def inside(policy="none"):
    def loss(w):
        if policy == "all":
            raise RuntimeError("out of luck")
        return jnp.sum(w)

    return loss, (jax.ShapeDtypeStruct((3,), jnp.float32),)


def branches(policy="none"):
    return (lambda w: jnp.sum(w) if jnp.sum(w) > 0 else -jnp.sum(w)), (jax.ShapeDtypeStruct((3,), jnp.float32),)


def two():
    return (lambda w: (jnp.sum(w), w)), (jax.ShapeDtypeStruct((3,), jnp.float32),)


def imaginary():
    return (lambda w: 1j * jnp.sum(w)), (jax.ShapeDtypeStruct((3,), jnp.float32),)


def sized(batch):
    return step(batch=batch)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(WORK)


def run(capsys, *argv):
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_compare_prints_a_table_and_writes_json(capsys, tmp_path):
    status, out, err = run(capsys, "compare", "work.py:step", "--policy", "none", "--policy", "all", "--json", "a.json")
    assert (status, err) == (0, "")
    assert "local device" in out and "none" in out and "all" in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [r["policy"] for r in rows] == ["none", "all"]
    assert rows[1]["residual_device_bytes"] < rows[0]["residual_device_bytes"]
    assert rows[1]["flops"] > rows[0]["flops"]
    status, out, _ = run(capsys, "compare", "work.py:step", "--policy", "all", "--json")
    assert json.loads(out)["rows"][0]["measured"]["local"]["cached"] is True


def test_statuses_for_ci(capsys):
    assert run(capsys, "measure", "work.py:step", "--max-device-bytes", "1GiB")[0] == 0
    status, _, err = run(capsys, "measure", "work.py:step", "--max-device-bytes", "10KiB")
    assert status == cli.TOO_LARGE and "work.py:step on local" in err and "is more than 10.00 KiB" in err


def test_diff_names_what_grew(capsys):
    for name, extra in (("a.json", "False"), ("b.json", "True")):
        assert run(capsys, "measure", "work.py:step", "--set", f"extra={extra}", "--json", name)[0] == 0
    status, out, _ = run(capsys, "diff", "a.json", "b.json")
    assert status == 0 and "of residuals in" in out and "blocks[0..2]" in out and "% FLOPs" in out
    assert run(capsys, "diff", "a.json", "b.json", "--max-growth", "0")[0] == cli.TOO_LARGE
    assert run(capsys, "diff", "a.json", "a.json") == (0, "no change\n", "")


def test_residuals(capsys):
    status, out, _ = run(capsys, "residuals", "work.py:step", "--policy", "none", "--policy", "all")
    assert status == 0 and "blocks[0..2]" in out
    status, out, _ = run(capsys, "residuals", "work.py:step", "--json")
    assert status == 0 and json.loads(out)


def test_timeline_writes_a_picture_and_a_page(capsys, tmp_path):
    status, out, err = run(
        capsys, "timeline", "work.py:step", "--policy", "none", "--policy", "all", "--out", "pictures"
    )
    assert status == 0, err
    written = {p.suffix: p for p in (tmp_path / "pictures").iterdir()}
    assert set(written) == {".png", ".svg", ".html"} and "blocks" in out
    assert written[".png"].read_bytes()[:4] == b"\x89PNG" and "<html" in written[".html"].read_text()[:200].lower()


def test_engaged_is_a_status(capsys):
    status, out, err = run(capsys, "engaged", "work.py:step", "--policy", "none", "--json")
    assert (status, json.loads(out)) == (0, {"none": {"target": "local", "engaged": True, "checks": []}}), err
    status, out, _ = run(capsys, "engaged", "work.py:step", "--policy", "offload_dot_with_no_batch_dims")
    assert status == cli.NOT_ENGAGED and "NO: this device has no memory apart from the host's" in out


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    _, out, _ = run(capsys, "measure", "work.py:step", "--set", "batch=2048", "--json")
    plain = json.loads(out)["rows"][0]["measured"]["local"]["device_bytes"]
    argv = ("plan", "work.py:step", "--set", "batch=2048", "--budget")
    status, out, err = run(capsys, *argv, str(2 * plain), "--json")
    assert status == 0 and json.loads(out)["device_bytes"] == plain and json.loads(out)["extra_flops"] == 0, err
    status, out, err = run(capsys, *argv, "1KiB")
    assert status == cli.FAILED and "is too small on local: the step takes" in err
    assert run(capsys, *argv, "much")[0] == cli.FAILED
    smaller = int(0.9 * plain)
    status, out, err = run(capsys, *argv, str(smaller), "--out", "plan.toml")
    if jax.__version_info__ >= (0, 11):  # jax 0.10's XLA frees nothing on a CPU
        assert status == 0 and "plan for" in out and nj.Plan.load("plan.toml").device_bytes <= smaller, err


def test_the_doctor_looks_at_a_step(capsys):
    status, out, err = run(capsys, "doctor", "work.py:step", "--policy", "all")
    assert status == 0 and "work.py" not in err and out.startswith("all")
    assert isinstance(json.loads(run(capsys, "doctor", "work.py:step", "--json")[1])["None"], list)


def test_fit_finds_the_largest_batch(capsys):
    status, out, err = run(capsys, "fit", "work.py:step", "--limit", "4MiB", "--json")
    assert status == 0, err
    [found] = json.loads(out)["fits"]
    assert found["device_bytes"] <= 4 * 2**20 < found["next_bytes"] and found["compiles"] <= 8
    status, out, _ = run(capsys, "fit", "work.py:step", "--limit", "1KiB", "--json")
    assert json.loads(out)["fits"][0]["largest"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("measure", "work.py:gone"), "work.py has no 'gone'; its functions are step"),
        (("measure", "gone.py:step"), "gone.py: no such file"),
        (("measure", "work.py:vector"), r"must return a scalar loss of floating point, and returned float32[3]"),
        (("measure", "work.py:integers"), "argument 0 holds an array of int32, which has no gradient"),
        (("measure", "work.py:breaks"), "work.py: line 37: KeyError: 'key'"),
        (("measure", "work.py:ends"), "work.py: line 41: it ended the program (exit status 0)"),
        (("measure", "ends.py:step"), "ends.py: line 1: it ended the program (exit status 3)"),
        (("measure", "work.py:silent"), "work.py: line 45: ValueError: no message"),
        (("compare", "work.py:inside"), "work.py: line 51: policy all: out of luck"),
        (
            ("compare", "work.py:branches"),
            "work.py: line 58: TypeError: policy none: Attempted boolean conversion of traced array",
        ),
        (
            ("measure", "work.py:two"),
            "work.py:62) must return a scalar loss, and returned tuple. Return the loss alone",
        ),
        (("measure", "work.py:imaginary"), "must return a scalar loss of floating point, and returned complex64[]"),
        (("measure", "work.py:sized"), "work.py:sized: the parameter 'batch' has no default; write batch=... (--set)"),
        (("residuals", "work.py:vector"), "must return a scalar loss of floating point, and returned float32[3]"),
        (("residuals", "work.py:integers"), "argument 0 holds an array of int32, which has no gradient"),
        (("residuals", "work.py:step", "--target", "v9"), "target='v9' is unknown"),
        (("doctor", "work.py:vector"), "must return a scalar loss of floating point, and returned float32[3]"),
        (("measure", "work.py:step", "--policy", "gone.toml"), "gone.toml: No such file or directory"),
        (("timeline", "work.py:step", "--out", "work.py"), "work.py: File exists"),
        (("diff", "odd.json", "odd.json"), "not a report of `nexus-jax compare --json`"),
        (("measure", "work.py:integers", "--policy", "all"), "takes no parameter 'policy'"),
        (("measure", "work.py:step", "--target", "v9"), "v9"),
        (("measure", "work.py:step", "--target", "v5e:2xx2"), "v5e:2xx2"),
        (("compare", "work.py:step", "--policy", "nonsense"), "nonsense"),
        (("fit", "work.py:step", "--vary", "length", "--limit", "1MB"), "takes no parameter 'length'"),
        (("fit", "work.py:step"), "the memory of target='local' is not known: write limit_bytes="),
        (("timeline", "work.py:step", "--target", "v5e", "--target", "h200"), "takes one --target"),
        (("plan", "work.py:step", "--budget", "1MB", "--host-budget", "1GiB"), "how fast local reaches its host"),
        (("diff", "work.py", "work.py"), "work.py: not JSON"),
        (("targets", "v9"), "v9"),
    ],
)
def test_what_goes_wrong_is_one_line(capsys, tmp_path, argv, message):
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "odd.json").write_text('{"version": 1, "rows": [{"policy": "none"}]}')
    status, out, err = run(capsys, *argv)
    assert status == cli.FAILED and out == ""
    assert message in err and err.startswith("nexus-jax: ") and err.count("\n") == 1 and "Traceback" not in err


def test_a_table_is_not_lost_where_its_file_cannot_be_written(capsys):
    status, out, err = run(capsys, "measure", "work.py:step", "--json", "gone/a.json")
    assert (
        status == cli.FAILED and "device bytes" in out and err == "nexus-jax: gone/a.json: No such file or directory\n"
    )
    status, out, err = run(capsys, "plan", "work.py:step", "--budget", "1GiB", "--out", "gone/p.toml")
    assert status == cli.FAILED and "plan for local" in out and "gone/p.toml: No such file or directory" in err


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.parametrize("content", ["{}", "null", '{"bytes": {"temp": "x"}}', '{"out_of_memory": {}}', '{"flops"'])
def test_a_corrupt_cache_costs_a_compile(capsys, tmp_path, content):
    measured = lambda out: json.loads(out)["rows"][0]["measured"]["local"]["device_bytes"]
    status, before, _ = run(capsys, "measure", "work.py:step", "--json")
    for path in (tmp_path / "cache").glob("*/*/result.json"):
        path.write_text(content)
    status, out, err = run(capsys, "measure", "work.py:step", "--json")
    assert status == 0 and measured(out) == measured(before) and err.count("compiling again") == 2
    assert run(capsys, "measure", "work.py:step", "--json")[2] == "", "it was replaced"


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_cache_that_cannot_be_written_costs_a_warning(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "file"))
    status, out, err = run(capsys, "measure", "work.py:step")
    assert status == 0 and "device bytes" in out
    assert "cannot be written" in err and "Set NEXUS_JAX_CACHE" in err and "Traceback" not in err


def test_bad_flags(capsys):
    for argv, message in (
        (("measure", "work.py:step", "--max-device-bytes", "much"), "'much' is no size: write 15GiB"),
        (("measure", "work.py:step", "--set", "batch"), "'batch' is no setting: write name=value"),
        (("measure", "work.py:step", "--timeout", "-1"), "'-1' is no time: write a number of seconds above 0"),
        (("measure", "work.py:step", "--timeout", "nan"), "'nan' is no time"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(argv)
        assert message in capsys.readouterr().err


def test_the_targets_are_listed(capsys):
    status, out, _ = run(capsys, "targets")
    assert status == 0 and all(name in out for name in ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "b200"))
    assert "https://" in run(capsys, "targets", "h200")[1]


def test_it_runs_as_a_module_from_another_folder():
    argv = [sys.executable, "-m", "nexus_jax.cli", "measure", "work.py:step", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["measured"]["local"]["device_bytes"] > 0


def local(tmp_path, **extra):
    """``nexus-jax measure`` of the local device in a process that JAX is free to look for devices in."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | extra
    argv = [sys.executable, "-m", "nexus_jax.cli", "measure", "work.py:step", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"][0]["measured"]["local"]["device_bytes"] > 0
    return done.stderr


def test_the_local_device_without_an_accelerator(tmp_path):
    """Also where the compilers of TPUs and GPUs are installed, which are plugins of JAX."""
    if not _compat.no_accelerator():
        pytest.skip("there is an accelerator here")
    assert local(tmp_path) == ""


def test_a_platform_that_is_not_there_is_named():
    argv = [sys.executable, "-m", "nexus_jax.cli", "residuals", "work.py:step"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "abacus"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nexus-jax: JAX_PLATFORMS=abacus: JAX has no such device here (")


def test_a_plugin_that_does_not_start_is_one_line(tmp_path):
    plugin = tmp_path / "plugins" / "jax_plugins" / "of_a_test"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("def initialize():\n    raise RuntimeError('no such device')\n")
    err = local(
        tmp_path, PYTHONPATH=os.pathsep.join([str(plugin.parents[1]), *filter(None, [os.getenv("PYTHONPATH")])])
    )
    lines = [line for line in err.splitlines() if line.startswith("nexus-jax:")]
    assert len(lines) == 1 + _compat.has_compiler("gpu") and "Traceback" not in err, err
    assert any("of_a_test.initialize(): RuntimeError no such device" in line for line in lines)


def test_what_a_library_prints_is_not_in_the_output(capfd):
    libc = ctypes.CDLL(None)
    with cli._libraries_silenced():
        libc.puts(b"from C, buffered")
        os.write(1, b"from C")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "after\n"
