"""Layers counted together: patterns name exactly the paths that they stand for."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_jax.families import families, pattern, ranges


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        ([f"GPT/blocks_{i}/attn" for i in range(12)], ["GPT/blocks[0..11]/attn"]),
        ([f"GPT/blocks/{i}/attn" for i in range(12)], ["GPT/blocks[0..11]/attn"]),
        ([f"blocks_{i}" for i in (0, 2, 4)], ["blocks[0,2,4]"]),
        ([f"blocks_{i}" for i in range(1, 96, 2)], ["blocks[1..95 by 2]"]),
        ([f"blocks_{i}" for i in (0, 1, 2, 5, 9, 10)], ["blocks[0..2,5,9..10]"]),
        ([f"h{i}/ln_1" for i in range(3)], ["h[0..2]/ln_1"]),
        ([f"stage_{s}/block_{b}" for s in range(2) for b in range(3)], ["stage[0..1]/block[0..2]"]),
        (["stage_0/block_0", "stage_0/block_1", "stage_1/block_0"], ["stage_0/block[0..1]", "stage_1/block_0"]),
        (["blocks_0", "head"], ["blocks_0", "head"]),
        (["layer_00", "layer_01"], ["layer[0..1]"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_patterns(paths, patterns):
    assert list(families(paths)) == patterns and pattern(paths) == ", ".join(patterns)
    assert sorted(itertools.chain(*families(paths).values())) == sorted(set(paths))


def expanded(text):
    """Every path of a pattern, read by its own rules."""
    before, bracket, rest = text.partition("[")
    if not bracket:
        return [text]
    inside, _, after = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        run, _, step = part.partition(" by ")
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{before}_{n}{tail}" for n in numbers for tail in expanded(after)]


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from(["attn", "mlp"])), max_size=40))
def test_a_pattern_stands_for_its_members_and_no_others(found):
    told = families(f"stage_{a}/block_{b}/{name}" for a, b, name in found)
    for text, members in told.items():
        assert expanded(text) == list(members)
    assert sorted(itertools.chain(*told.values())) == sorted(f"stage_{a}/block_{b}/{name}" for a, b, name in found)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 30), min_size=1))
def test_ranges_say_all_numbers(numbers):
    assert expanded(f"blocks[{ranges(sorted(numbers))}]") == [f"blocks_{n}" for n in sorted(numbers)]
