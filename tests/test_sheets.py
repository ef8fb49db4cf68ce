"""Data sheets: every figure there with a source, targets as users write them, and every target really compiles."""

import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import pytest
from checks import needs
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nexus_jax.program import step_of
from nexus_jax.targets import find_target, names, sheet, sheets, target_mesh
from nexus_jax.targets.compiler import compile_all
from nexus_jax.targets.worker import failure

TARGETS = ("a100-40gb", "a100-80gb", "b200", "h100", "h200", "tpu7x", "v4", "v5e", "v5p", "v6e")
GIB = 2**30


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path / "cache"))


def job(target, loss, *shapes, specs=None, mesh=None):
    """A step for a target; sharded over its mesh if there are specs, one for each argument."""
    shardings = [None] * len(shapes)
    if specs is not None:
        shardings = [NamedSharding(mesh or target_mesh(target), spec) for spec in specs]
    arguments = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=s) for x, s in zip(shapes, shardings, strict=True)]
    return step_of(loss, tuple(arguments)).job(find_target(target), target)


def matmul(w, x):
    return jnp.sum(jnp.tanh(x @ w).astype(jnp.float32) ** 2)


SHAPES = (256, 512), (1024, 256)


# --- the sheets ----------------------------------------------------------------------------------------------------


def test_the_known_targets():
    assert names() == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_figure_is_plausible_and_has_a_source(name):
    s = sheet(name)
    assert s.name == name and s.kind == ("tpu" if name[0] in "vt" else "gpu")
    assert set(s.sources) == set(sheets.FIGURES) and all("https://" in text for text in s.sources.values())
    assert 16 * GIB <= s.memory_bytes <= 192 * GIB
    assert 0.7 < s.usable_bytes / s.memory_bytes < 1
    assert 1e14 < s.f32_flops <= s.bf16_flops < 3e15
    assert 50 < s.bf16_flops / s.memory_bandwidth < 700, "FLOPs that one byte from memory pays for"
    assert s.memory_bandwidth > 30 * s.host_to_device_bandwidth
    assert hash(s) == hash(dataclasses.replace(s)) and pickle.loads(pickle.dumps(s)) == s
    text = str(s)
    for figure in sheets.FIGURES:
        assert figure in text
    assert "https://" in text and name in text and ("estimated: " in text) == bool(s.estimated)
    unpublished = {figure for figure, source in s.sources.items() if "not published" in source}
    assert unpublished <= set(s.estimated)


def test_some_figures_by_hand():
    assert sheet("v5e").usable_bytes == 16 * GIB - 258 * 2**20
    assert sheet("tpu7x").bf16_flops * sheet("tpu7x").devices_per_chip == 2307e12
    for name in ("a100-40gb", "a100-80gb", "h100", "h200", "b200"):
        s = sheet(name)
        assert s.usable_bytes == int(0.75 * s.gpu.reported_bytes), "one rule for all GPUs"
        assert 0.97 < s.gpu.reported_bytes / s.memory_bytes < 1


V5E = dict(sheet("v5e").__dict__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "npu"}, r"kind='npu': write \"tpu\" or \"gpu\""),
        ({"memory_bytes": 0}, "memory_bytes=0: write a positive whole number"),
        ({"memory_bytes": 17e9}, r"memory_bytes=17000000000.0: write a positive whole number"),
        ({"bf16_flops": "fast"}, "bf16_flops='fast': write a positive number"),
        ({"memory_bandwidth": float("nan")}, "memory_bandwidth=nan: write a positive number"),
        ({"usable_bytes": 17 * GIB}, r"usable_bytes=18253611008 is more than memory_bytes="),
        ({"sources": {}}, "sources has nothing for memory_bytes: say where"),
        ({"estimated": ("speed",)}, "estimated names 'speed', which is no figure: the figures are memory_bytes"),
        ({"topology": "v5e"}, r"topology='v5e': write libtpu's name of a slice, \"v5e:2x2\""),
        ({"topology": "v5p:2x2x1"}, "topology='v5p:2x2x1': write libtpu's name"),
        ({"max_chips": 0}, "max_chips=0: write a positive whole number"),
        ({"kind": "gpu"}, "gpu is missing: XLA needs it"),
    ],
)
def test_a_bad_sheet_is_refused_where_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        sheets.Sheet(**{**V5E, **change})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bf16_flops = 989.5e12\n", "", "key bf16_flops is missing"),
        ("kind =", "knid =", "unknown key knid: the keys are name, kind"),
        ("[gpu]", "gpu = 3\n[gup]", r"gpu=3: write a table"),
        ("l2_bytes = 62_914_560", "l2_bytes = -1", "gpu.l2_bytes=-1: write a positive whole number"),
        ('compute_capability = "9.0"', "compute_capability = 9.0", "gpu.compute_capability=9.0: write a string"),
        (
            'compute_capability = "9.0"',
            'compute_capability = "90"',
            r"gpu.compute_capability='90': write it as \"9.0\"",
        ),
        ("multiprocessors = 132\n", "", "key gpu.multiprocessors is missing"),
        ("kind = ", "kind = = ", "Invalid value"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, old, new, message):
    text = (sheets._DATA / "h200.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert dataclasses.replace(sheets.load_sheet(path), name="h200") == sheet("h200")
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"mine.toml: {message}"):
        sheets.load_sheet(path)


# --- what a user writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "devices", "topology"),
    [
        ("v5e", None, 1, "v5e:2x2"),
        ("v5e:1x1", (1, 1), 1, "v5e:1x1"),
        ("v5e:2x4", (2, 4), 8, "v5e:2x4"),
        ("v5p:4x4x4", (4, 4, 4), 64, "v5p:4x4x4"),
        ("v4:12x12x24", (12, 12, 24), 3456, "v4:12x12x24"),
        ("tpu7x", None, 1, "tpu7x:2x2x1"),
        ("tpu7x:2x2x1", (2, 2, 1), 8, "tpu7x:2x2x1"),
        ("h200", None, 1, ""),
        ("h100:8", (8,), 8, ""),
    ],
)
def test_targets_as_users_write_them(text, shape, devices, topology):
    found, given = sheets.parse_target(text)
    assert (found.name, given) == (text.partition(":")[0], shape)
    target = find_target(text)
    assert (target.devices, target.topology, target.sheet) == (devices, topology, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9", "is unknown: write one of a100-40gb, a100-80gb, b200, h100, h200, tpu7x, v4, v5e, v5p, v6e, or local"),
        ("", "is unknown: write one of"),
        ("a100:2", "is unknown: write one of a100-40gb"),
        ("v5e:", "write v5e for one device, or a slice as 2 positive numbers of chips, v5e:4x4"),
        ("v5e:2xx2", "or a slice as 2 positive numbers of chips, v5e:4x4"),
        ("v5e:0x2", "or a slice as 2 positive numbers of chips, v5e:4x4"),
        ("v5e:2x2x2", "or a slice as 2 positive numbers of chips, v5e:4x4"),
        ("v5p:4x4", "or a slice as 3 positive numbers of chips, v5p:4x4x4"),
        ("v5e:4", "or a slice as 2 positive numbers of chips, v5e:4x4"),
        ("v5e:3x2", "a host holds 2x2 chips, so the first two numbers must be even. Write v5e:4x4"),
        ("v5e:32x4", "is too large: a slice has at most 256 chips, 16 a side"),
        ("v5p:32x32x32", "is too large: a slice has at most 6144 chips. Try v5p:4x4x4"),
        ("h100:2x2", "write how many GPUs of one host, h100:1 to h100:8"),
        ("h100:0", "write how many GPUs of one host"),
        ("h100:16", "write how many GPUs of one host"),
    ],
)
def test_what_is_no_target_is_said_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=rf"target={re.escape(repr(text))}.*{message}"):
        sheets.parse_target(text)
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        find_target(text)


def test_other_things_are_no_target():
    with pytest.raises(ValueError, match="target=3: write a string"):
        sheets.parse_target(3)
    with pytest.raises(ValueError, match="target='v9' is unknown"):
        sheet("v9")
    with pytest.raises(ValueError, match="v5e is no GPU"):
        sheets.gpu_target_config(sheet("v5e"))


# --- they compile --------------------------------------------------------------------------------------------------

TPUS = [t for t in TARGETS if sheet(t).kind == "tpu"]
GPUS = [t for t in TARGETS if sheet(t).kind == "gpu"]
W, X = 2 * 256 * 512, 2 * 1024 * 256  # bytes


def test_every_gpu_compiles():
    needs(*GPUS)
    for target, answer in zip(GPUS, compile_all([job(t, matmul, *SHAPES) for t in GPUS]), strict=True):
        found = answer.bytes
        assert found["argument"] == W + X and W <= found["output"] < W + 512, target
        assert 0 < found["temp"] < 64 * 2**20, target


def test_every_tpu_compiles_and_says_how_much_a_program_may_take():
    """The limit also proves that a device is what the sheet takes it for: a v4 chip is one, half a TPU7x chip is one."""
    needs(*TPUS)
    too_large = (200, GIB // 2)
    jobs = [job(t, matmul, *SHAPES) for t in TPUS] + [job(t, lambda w: jnp.sum(w**2), too_large) for t in TPUS]
    answers = compile_all(jobs)
    for target, small, large in zip(TPUS, answers[: len(TPUS)], answers[len(TPUS) :], strict=True):
        assert small.bytes["argument"] == W + X and W <= small.bytes["output"] < W + 4096, target
        assert large.out_of_memory["limit"] == pytest.approx(sheet(target).usable_bytes, rel=1e-3), target
        assert large.out_of_memory["wanted"] >= 200 * GIB, target


@pytest.mark.parametrize(("targets", "kind"), [(("v5p:2x2x2", "tpu7x:1x1x1", "v4:2x2x1"), "tpu"), (("h100:8",), "gpu")])
def test_steps_over_several_devices(targets, kind):
    needs(*targets)
    answers = compile_all([job(t, matmul, *SHAPES, specs=(P("data"), P("data"))) for t in targets])
    for target, answer in zip(targets, answers, strict=True):
        assert answer.bytes["argument"] == (W + X) // find_target(target).devices, f"{target}: bytes of one device"


def test_a_mesh_with_explicit_axes():
    needs("v5e")
    mesh = AbstractMesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    [answer] = compile_all([job("v5e:2x2", matmul, *SHAPES, specs=(P(None, "x"), P()), mesh=mesh)])
    assert answer.bytes["argument"] == W // 4 + X


@pytest.mark.parametrize(
    ("said", "wanted", "limit"),
    [
        (
            "memory required for HLO temporaries (2.00T) exceeds available HBM (15.75G). HLO module: f.",
            2 * 2**40,
            15.75,
        ),
        (
            "Ran out of memory in memory space hbm. Used 30.80G of 30.75G hbm. Exceeded hbm capacity by 51M.",
            30.8 * GIB,
            30.75,
        ),
        ("Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 46.5K.", 15.75 * GIB + 1, 15.75),
        ("memory required for HLO temporaries (15.75G) exceeds available HBM (15.75G).", 15.75 * GIB + 1, 15.75),
    ],
)
def test_both_ways_in_which_libtpu_runs_out_of_memory(said, wanted, limit):
    found = failure(RuntimeError(f"RESOURCE_EXHAUSTED: {said}\nmore"))["out_of_memory"]
    assert (found["wanted"], found["limit"]) == (int(wanted), int(limit * GIB)) and found["wanted"] > found["limit"]
    assert said in found["message"] and "more" not in found["message"]
    assert failure(RuntimeError("something else")) == {"error": "RuntimeError: something else"}
