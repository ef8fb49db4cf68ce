"""What memory buys, drawn."""

import re
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest

from nexus_jax import cli
from nexus_jax.planner import Planner, picture

SHAPES = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 8, jax.ShapeDtypeStruct((4096, 64), jnp.float32)

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA's CPU compiler of jax 0.10 frees nothing under remat: no plan fits there",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "planner"))


def loss(ws, x):
    for w in ws:
        x = jnp.sin(x @ w)
    return jnp.mean(x)


@pytest.fixture(scope="module")
def planner():
    return Planner(loss, SHAPES)


def test_the_picture_says_what_it_shows(planner, tmp_path):
    plan = planner.plan("12MiB")
    picture.draw(planner, plan, tmp_path / "plan.svg")
    text = " ".join(ElementTree.parse(tmp_path / "plan.svg").getroot().itertext())
    for part in ("What memory buys on local", "budget 12.00 MiB", "this plan, compiled", "knee", "saveable x"):
        assert part in text
    assert f"{len(planner.model.frontier.peaks)} plans" in text
    picture.draw(planner, plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_plan_gives_the_same_picture(planner, tmp_path):
    plan = planner.plan("12MiB")
    for name in ("one.svg", "two.svg"):
        picture.draw(planner, plan, tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    other = planner.plan("10MiB")
    picture.draw(planner, other, tmp_path / "three.svg")
    assert (tmp_path / "three.svg").read_text() != one


def test_what_cannot_be_drawn_is_an_error(planner, tmp_path):
    plan = planner.plan("12MiB")
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        picture.draw(planner, plan, tmp_path / "plan.pdf")
    with pytest.raises(ValueError, match="fits as it is"):
        picture.draw(planner, planner.plan("1GiB"), tmp_path / "plan.png")
    with pytest.raises(ValueError, match="did not make that plan"):
        picture.draw(Planner(loss, SHAPES), plan, tmp_path / "plan.png")


def test_one_planner_answers_as_plans_made_alone(planner):
    planner.plan("10MiB")
    again, alone = planner.plan("12MiB"), Planner(loss, SHAPES).plan("12MiB")
    assert again == alone


def test_the_command_line_draws(tmp_path, capsys):
    source = tmp_path / "work.py"
    source.write_text(
        "import jax, jax.numpy as jnp\n"
        "def loss(ws, x):\n"
        "    for w in ws:\n"
        "        x = jnp.sin(x @ w)\n"
        "    return jnp.mean(x)\n"
        "def workload():\n"
        "    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)\n"
        "    return loss, ([w] * 8, jax.ShapeDtypeStruct((4096, 64), jnp.float32))\n"
    )
    out = tmp_path / "p.svg"
    assert cli.main(["plan", f"{source}:workload", "--budget", "12MiB", "--picture", str(out)]) == 0
    assert re.search(r"plan for 12\.00 MiB", capsys.readouterr().out)
    assert "What memory buys" in out.read_text()
    assert cli.main(["plan", f"{source}:workload", "--budget", "1GiB", "--picture", str(out)]) != 0
    assert "fits as it is" in capsys.readouterr().err
