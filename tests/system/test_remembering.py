"""What is kept for the next run: its own, or nothing."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest

from pair import Pair
from speculation.policy import Auto, Fate, Prospect
from system import remembering


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / remembering.NAME


def files(cache):
    return sorted(cache.iterdir()) if cache.exists() else []


def test_no_test_touches_the_users_cache():
    """Nor does a process that one starts."""
    script = "from system import remembering; print(remembering.folder())"
    project = Path(remembering.__file__).parents[1]
    there = subprocess.run(
        [sys.executable, "-c", script], cwd=project, capture_output=True, text=True
    ).stdout.strip()
    assert there == str(remembering.folder())
    assert Path(tempfile.gettempdir()) in Path(there).parents
    assert "cache-of-tests" in there


def test_a_round_trip(cache):
    assert remembering.recall("this") is None
    value = {"a": [1, 2.5, None], "é": "😀"}
    remembering.remember("this", value)
    assert remembering.recall("this") == value
    assert remembering.recall("that") is None
    remembering.remember("this", 2)
    assert remembering.recall("this") == 2
    assert len(files(cache)) == 1


@pytest.mark.parametrize("change", ["machine", "mlx", "threads", "form"])
def test_what_another_machine_found_out(cache, monkeypatch, change):
    """Even if it lies where ours would."""
    remembering.remember("this", 1)
    (file,) = files(cache)
    if change == "machine":
        monkeypatch.setattr(remembering, "machine", lambda: "another")
    elif change == "form":
        monkeypatch.setattr(remembering, "_FORM", 10**6)
    else:
        remembering.machine.cache_clear()
        if change == "mlx":
            monkeypatch.setattr(mx, "__version__", "0.0.1")
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", "63")
    try:
        assert remembering.recall("this") is None
        monkeypatch.setattr(remembering, "_path", lambda subject: file)
        assert remembering.recall("this") is None
    finally:
        monkeypatch.undo()
        remembering.machine.cache_clear()


ODD = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "nothing in it": b"{}",
    "a number": b"5",
    "huge": b" " * (1 << 20) + b"5",
    "many digits": b'{"subject": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
def test_a_damaged_file(cache, raw):
    remembering.remember("this", 1)
    (file,) = files(cache)
    file.write_bytes(raw)
    assert remembering.recall("this") is None
    remembering.remember("this", 3)
    assert remembering.recall("this") == 3


def test_too_large_for_what_it_is(cache):
    remembering.remember("this", "x" * (1 << 20))
    assert remembering.recall("this") is None


def test_what_is_no_file(cache):
    """Nobody waits for a pipe's writer; a folder stays as it is."""
    remembering.remember("this", 1)
    (file,) = files(cache)
    file.unlink()
    os.mkfifo(file)
    assert remembering.recall("this") is None
    remembering.remember("this", 2)
    assert remembering.recall("this") == 2
    file.unlink()
    file.symlink_to("/dev/zero")
    assert remembering.recall("this") is None
    file.unlink()
    file.mkdir()
    assert remembering.recall("this") is None
    remembering.remember("this", 3)
    assert files(cache) == [file]


def test_no_folder_to_keep_it_in(cache, tmp_path, monkeypatch):
    """A file where it would be, a link to nowhere, none of one's own."""
    (tmp_path / "cache").write_text("a file")
    remembering.remember("this", 1)
    assert remembering.recall("this") is None
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").symlink_to(tmp_path / "cache")
    remembering.remember("this", 1)
    assert remembering.recall("this") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/nothing")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remembering.remember("this", 1)
    assert not Path("relative").exists()
    assert remembering.recall("this") == 1
    assert tmp_path / "home" in remembering.folder().parents

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    remembering.remember("this", 1)
    assert remembering.recall("this") is None


def test_a_folder_that_cannot_be_written_to(cache, monkeypatch):
    """Also where the disk is full: nothing is said, and nothing lies about."""
    remembering.remember("this", 1)

    def denied(*_, **__):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", denied)
        remembering.remember("this", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", denied)
        remembering.remember("this", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        assert remembering.recall("this") is None
    assert remembering.recall("this") == 1
    assert len(files(cache)) == 1


def test_what_has_no_name(cache):
    """Bytes in the environment that are no text."""
    remembering.remember("\udcff", 1)
    assert remembering.recall("\udcff") is None
    assert files(cache) == []


def test_many_writers_at_once(cache):
    value = ["x" * 1000] * 20
    failed = []

    def work(number):
        for _ in range(40):
            remembering.remember("this", [number, *value])
            found = remembering.recall("this")
            if found[1:] != value:
                failed.append(found)

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(files(cache)) == 1


def test_a_fingerprint_is_a_models(tmp_path):
    one = remembering.fingerprint(tmp_path)
    assert remembering.fingerprint(tmp_path / "none") == one
    (tmp_path / "notes.txt").write_text("x")
    assert remembering.fingerprint(tmp_path) == one
    (tmp_path / "config.json").write_text("{}")
    two = remembering.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    three = remembering.fingerprint(tmp_path)
    assert len({one, two, three}) == 3


def test_another_training_is_another_model(tmp_path):
    """Weights of the same size, of which only some bytes were read."""
    (tmp_path / "config.json").write_text("{}")
    rng, weights = np.random.default_rng(0), tmp_path / "weights.npz"
    seen = set()
    for _ in range(20):
        np.savez(weights, a=rng.normal(size=200_000).astype(np.float32))
        seen.add((weights.stat().st_size, remembering.fingerprint(tmp_path)))
    assert len(seen) == 20
    assert len({size for size, _ in seen}) == 1


def experienced(most=4):
    """A policy that has seen some rounds."""
    policy = Auto(most)
    rows = [
        Prospect("greedy, delta 0.0", most, found=2, match=3),
        Prospect("greedy, delta 0.0", most),
    ]
    for number in range(60):
        plan = policy.choose(2, rows)
        fates = [
            Fate(
                "greedy, delta 0.0",
                3 * has,
                plan.size,
                plan.size // 2,
                1 + plan.size // 2,
            )
            for has in plan.looked_up
        ]
        took = 0.01 * (1 + 0.1 * plan.size + 0.01 * (number % 3))
        policy.observe(2, plan, fates, took, 0.02, number % 2)
    return policy


def paths(value, at=()):
    """The way to everything in it."""
    yield at
    if isinstance(value, dict):
        for key, each in value.items():
            yield from paths(each, (*at, key))
    elif isinstance(value, list):
        for place in (0, len(value) - 1) if value else ():
            yield from paths(value[place], (*at, place))


def changed(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(copy[at[0]], at[1:], new)
    return copy


NAN, INF = float("nan"), float("inf")
HOSTILE = [None, NAN, INF, -INF, -1, 1e300, 10**400, "x", "", True, [], {}, [[]]]
HOSTILE += [[NAN] * 5, {"x": NAN}, [[[1] * 5] * 9] * 2, "9" * 5000]


def test_a_policy_goes_on_from_what_it_was():
    was = experienced()
    kept = json.loads(json.dumps(was.as_dict()))
    again = Auto(4)
    again.restore(kept)
    assert again.as_dict()["chances"] == kept["chances"]
    np.testing.assert_allclose(again._costs[2].of, was._costs[2].of, rtol=0.05)
    assert again._entering == was._entering
    other = Auto(5)
    other.restore(kept)
    assert other.as_dict() == Auto(5).as_dict()


def test_a_policy_believes_nothing_odd():
    """Whatever is changed in what was kept, it decides by numbers, and learns."""
    kept = json.loads(json.dumps(experienced().as_dict()))
    nothing = Auto(4).as_dict()
    rows = [
        Prospect("greedy, delta 0.0", 4, found=2, match=3),
        Prospect("greedy, delta 0.0", 4),
    ]
    ways = list(paths(kept))
    assert len(ways) > 40
    for at in ways:
        for new in HOSTILE:
            policy = Auto(4)
            policy.restore(changed(kept, at, new))
            if policy.as_dict() == nothing:
                continue  # as it begins without
            for _ in range(6):
                plan = policy.choose(2, rows)
                assert 0 <= plan.steps <= plan.size <= 4
                assert np.isfinite(plan.gain)
                fate = Fate("greedy, delta 0.0", 0, plan.size, 0, 1)
                policy.observe(2, plan, [fate, fate], 0.01)
            assert np.isfinite(policy._costs_of(2).of).all(), (at, new)
            assert np.isfinite(policy._costs_of(2).plain_seconds), (at, new)
            json.dumps(policy.as_dict(), allow_nan=False)


def test_a_pair_keeps_and_finds_it(make, cache):
    folders = str(make()[2]), str(make(noise=0.05)[2])
    pair = Pair.load(*folders)
    text = pair.generate("the cat on", max_tokens=30).finish().text
    (file,) = files(cache)
    kept = json.loads(file.read_text())["value"]
    assert kept["chances"]
    again = Pair.load(*folders)
    assert again.policy.as_dict()["chances"] == kept["chances"]
    # Another pair, another subject; a lookup in front makes one, too.
    for other in (Pair.load(folders[0]), Pair.load(*folders, lookup=True)):
        assert not other.policy.as_dict()["chances"]
    for odd in (b"[" * 100_000, b"x", file.read_bytes().replace(b"0.", b"NaN,", 3)):
        file.write_bytes(odd)
        again = Pair.load(*folders)
        assert again.generate("the cat on", max_tokens=30).finish().text == text
