"""Every example in a docstring and in the README, run."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import warnings

import pytest

import nexus_jax

MODULES = sorted(m.name for m in pkgutil.walk_packages(nexus_jax.__path__, "nexus_jax."))
README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nexus_jax.OffloadWarning)
        module = importlib.import_module(name)
        globs = {**vars(nexus_jax), **vars(module)}
        failed, _ = doctest.testmod(module, globs=globs, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_the_readmes_first_example_prints_what_it_says(capsys):
    """Within 12 %: what autodiff keeps of an elementwise op differs a little between versions of jax."""
    text = README.read_text()
    code, said = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.S).groups()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed, promised = (
        {line.split()[0]: int(line.split()[1]) for line in out.strip().splitlines()}
        for out in (capsys.readouterr().out, said)
    )
    assert printed.keys() == promised.keys()
    for policy, mib in promised.items():
        assert printed[policy] == pytest.approx(mib, rel=0.12), policy
