"""The examples run, and say what the README says of them."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*args, cwd):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("script", ["train_gpt.py", "train_vit_nnx.py"])
def test_compare(script, tmp_path):
    done = run(ROOT / "examples" / script, "--compare", "--layers", 2, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for policy in ("none", "all", "alternate", "heavy_ops", "auto", "offload", "heavy_ops_offload"):
        assert policy in done.stdout
    [picture] = tmp_path.glob("*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_policy_is_one_sentence(tmp_path):
    done = run(ROOT / "examples" / "train_gpt.py", "--policy", "heavy", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "heavy_ops" in done.stderr
