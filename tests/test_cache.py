"""Compiled results on disk: shared, replaced, trimmed, and never in the way."""

import os
import stat

import pytest

from nexus_jax.targets import cache as caches


def test_what_was_put_is_found_by_another_cache_object(tmp_path):
    key = caches.key_of("compile", "abc", {"v5e": 1})
    assert caches.Cache(tmp_path).get(key) is None
    caches.Cache(tmp_path).put(key, {"bytes": {"temp": 7}}, {"hlo": "HloModule jit_é"})
    assert caches.Cache(tmp_path).get(key) == {"bytes": {"temp": 7}}
    assert caches.Cache(tmp_path).text(key, "hlo") == "HloModule jit_é"
    assert caches.Cache(tmp_path).text(key, "live_range") is None
    caches.Cache(tmp_path).put(key, {"bytes": {"temp": 8}})
    assert caches.Cache(tmp_path).get(key) == {"bytes": {"temp": 8}}
    assert caches.Cache(tmp_path).text(key, "hlo") is None, "an entry is replaced whole"
    assert not list(tmp_path.rglob(".new-*"))


def test_keys_tell_apart_what_differs_and_nothing_else():
    assert caches.key_of("a", {"x": 1, "y": 2}) == caches.key_of("a", {"y": 2, "x": 1})
    assert len({caches.key_of("a"), caches.key_of("b"), caches.key_of("a", 1), caches.key_of("a", "1")}) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_corrupt_entry_is_a_warning_and_a_miss(tmp_path, content):
    cache = caches.Cache(tmp_path)
    cache.put("ab12", {"bytes": {}})
    (tmp_path / "ab" / "ab12" / "result.json").write_text(content)
    with pytest.warns(UserWarning, match=r"not a cached result .*; compiling again"):
        assert cache.get("ab12") is None
    cache.put("ab12", {"bytes": {"temp": 1}})
    assert cache.get("ab12") == {"bytes": {"temp": 1}}


@pytest.mark.parametrize("content", [{}, {"bytes": 3}, {"bytes": {}}, {"bytes": {"temp": "1"}}, {"temp": 1}])
def test_an_entry_that_holds_something_else_is_corrupt(tmp_path, content):
    cache, kinds = caches.Cache(tmp_path), {"bytes": {"temp": int}}
    cache.put("ab12", content)
    with pytest.warns(UserWarning, match=r"not a cached result \(it holds something else\); compiling again"):
        assert cache.get("ab12", kinds) is None
    cache.put("ab12", {"bytes": {"temp": 1, "more": 2}})
    assert cache.get("ab12", kinds) == {"bytes": {"temp": 1, "more": 2}}


def test_a_corrupt_text_is_a_warning(tmp_path):
    cache = caches.Cache(tmp_path)
    cache.put("ab12", {}, {"hlo": "text"})
    (tmp_path / "ab" / "ab12" / "hlo.gz").write_bytes(b"no gzip")
    with pytest.warns(UserWarning, match="not a compressed text"):
        assert cache.text("ab12", "hlo") is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where the folder should be: refused to root too
    with pytest.warns(UserWarning, match=r"cannot be written .* Set NEXUS_JAX_CACHE"):
        caches.Cache(blocked).put("ab12", {"bytes": {}})
    assert caches.Cache(tmp_path / "none").get("ab12") is None
    if os.geteuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.warns(UserWarning, match="cannot be written"):
            caches.Cache(tmp_path).put("ab12", {"bytes": {}})


def test_the_entries_unused_for_longest_go_first(tmp_path):
    cache = caches.Cache(tmp_path)
    for i, key in enumerate(("aa1", "bb2", "cc3")):
        cache.put(key, {"n": "x" * 1000})
        os.utime(tmp_path / key[:2] / key / "result.json", (i, i))
    cache.trim(limit=2500)
    assert [cache.get(k) is None for k in ("aa1", "bb2", "cc3")] == [True, False, False]


def test_the_folder_is_the_users_to_choose(monkeypatch, tmp_path):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path))
    assert caches.folder() == tmp_path
    monkeypatch.delenv("NEXUS_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert caches.folder() == tmp_path / "x" / "nexus_jax"
