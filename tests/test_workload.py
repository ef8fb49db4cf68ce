"""A workload: a function in a user's file; what is wrong with one is said with file and line."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from nexus_jax.workload import Workload, WorkloadError, load

GOOD = """
import jax, jax.numpy as jnp
import neighbour

def step(policy="none", batch=8, name="x"):
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w)) * neighbour.SCALE
    return loss, (jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((batch, 4), jnp.float32))
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("SCALE = 2.0\n")

    def write(text):
        path = tmp_path / "work.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_a_workload_is_called_with_its_settings(file):
    workload = load(f"{file(GOOD)}:step", {"batch": "16", "name": "not a literal"})
    loss, args = workload("all")
    assert args[1].shape == (16, 4) and workload.settings["name"] == "not a literal"
    assert workload(batch=2)[1][1].shape == (2, 4)
    assert (workload.default("batch"), workload.default("policy")) == (16, "none")
    assert jax.eval_shape(loss, *args).shape == ()


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (GOOD, "stepp", r"work.py has no 'stepp'; its functions are step"),
        ("def step(:\n", "step", r"work.py: line 1: SyntaxError"),
        (
            "import jax\n\nimport nothing_of_this_name\n",
            "step",
            r"work.py: line 3: ModuleNotFoundError: No module named",
        ),
        ("step = 3\n", "step", r"a workload is a function .* not int"),
        ("def step():\n    return 3\n", "step", r"work.py:step must return \(loss, arguments\).*returned int"),
        ("def step():\n    return (lambda x: x), 3\n", "step", "with a tuple of arguments, not int"),
        ("def step():\n    return (lambda x: x), (True,)\n", "step", "no arguments that hold arrays"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(file, text, name, message):
    with pytest.raises(WorkloadError, match=message):
        load(f"{file(text)}:{name}")()


def test_what_is_no_workload_at_all(tmp_path):
    with pytest.raises(WorkloadError, match=r"'step' is no workload: write file\.py:function"):
        load("step")
    with pytest.raises(WorkloadError, match=r"gone.py: no such file"):
        load(f"{tmp_path}/gone.py:step")


def test_parameters_that_the_function_does_not_take(file):
    path = file("def step(batch):\n    return (lambda x: x), ()\n")
    with pytest.raises(WorkloadError, match=r"takes no parameter 'policy' \(it has batch\)"):
        load(f"{path}:step")("all")
    with pytest.raises(WorkloadError, match="takes no parameter 'length'"):
        load(f"{path}:step", {"length": "3"})
    with pytest.raises(WorkloadError, match="the parameter 'batch' has no default"):
        load(f"{path}:step").default("batch")


def test_a_workload_in_python():
    made = Workload(lambda n=3: (jnp.sum, (jnp.ones(n),)))
    assert made(n=5)[1][0].shape == (5,)
