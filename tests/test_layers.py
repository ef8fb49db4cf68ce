"""The layers of CONTRIBUTING.md: imports at the top of a file lead downward, so that no two parts need each other."""

import ast
import graphlib
import pathlib

import nexus_jax

ROOT = pathlib.Path(nexus_jax.__file__).parent


def imported(path):
    """The modules that a file imports at its top, dotted."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def parts():
    """Each part (a folder, or a file at the top) and the other parts that it imports."""
    names = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    found = {name: set() for name in names - {"__init__"}}
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imported(path):
            head, *rest = module.split(".")
            if head == "nexus_jax" and rest and rest[0] in found and rest[0] != own:
                found[own].add(rest[0])
    return found


def test_no_two_parts_import_each_other():
    graph = parts()
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("_compat") < order.index("boundary") < order.index("planner") < order.index("training")
    assert len(graph) > 20


def test_private_names_of_jax_and_flax_are_in_one_file():
    private = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(
            part.startswith("_") for m in imported(path) if m.split(".")[0] in ("jax", "flax") for part in m.split(".")
        )
    }
    assert private == {"_compat.py"}
