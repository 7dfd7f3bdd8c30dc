"""Processes that a launcher began together: how they meet, speak and end.

What they compute together is in ``architectures/test_parallel.py``.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import HANG
from hypothesis import example, given
from hypothesis import strategies as st
from ranked import ASKED, PROGRAM, PROJECT, Ranked, free_ports, run

from system import ranks as ranks_module
from system.errors import InputError
from system.launched import ADDRESS, Place, place_in
from system.ranks import Ranks
from system.wire import GoneError, Wire, connect, listen

#: A text that goes on until somebody ends it.
ENDLESS = ["--prompt", ASKED, "--max-tokens", "100000", "--suppress-tokens", "1"]
SHORT = ["--prompt", ASKED, "--max-tokens", "8"]


# What launchers say.


def written(folder, text, name="hosts.json"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_alone():
    """Nobody says anything, or what one process is told."""
    assert place_in({}) is None
    assert place_in({"MLX_RANK": "0"}) is None
    assert place_in({"MLX_HOSTFILE": "nowhere"}) is None
    assert place_in({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


@pytest.mark.parametrize("text", ["", "\n", "[]", '[["127.0.0.1:5000"]]'])
def test_a_ring_of_one(tmp_path, text):
    """mlx.launch -n 1 has an empty file."""
    path = written(tmp_path, text)
    assert place_in({"MLX_RANK": "0", "MLX_HOSTFILE": path}) is None


def test_a_ring(tmp_path):
    """Rank 0 listens where no rank of the ring does, however many ports each has."""
    hosts = [["10.0.0.1:5000"], ["10.0.0.2:5001", "10.0.0.2:5002"], ["[::1]:4000"]]
    said = {"MLX_RANK": "2", "MLX_HOSTFILE": written(tmp_path, json.dumps(hosts))}
    assert place_in(said) == Place(2, 3, "ring", "10.0.0.1", 5003)
    moved = place_in(said | {ADDRESS: "host:77"})
    assert moved == Place(2, 3, "ring", "host", 77)
    assert place_in(said | {ADDRESS: "[fe80::1]:77"})[3:] == ("fe80::1", 77)


def test_jaccl(tmp_path):
    devices = written(tmp_path, '[[null, "rdma_en5"], ["rdma_en5", null]]')
    said = {"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:6000"}
    said["MLX_IBV_DEVICES"] = devices
    assert place_in(said) == Place(1, 2, "jaccl", "10.0.0.1", 6001)


def test_nccl():
    said = {"MLX_RANK": "3", "MLX_WORLD_SIZE": "4"}
    said |= {"NCCL_HOST_IP": "10.0.0.9", "NCCL_PORT": "7000"}
    assert place_in(said) == Place(3, 4, "nccl", "10.0.0.9", 7001)


@pytest.mark.parametrize(
    "said",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
    ],
)
def test_mpi(said):
    """It says how many there are, but not where rank 0 is."""
    assert place_in(said | {ADDRESS: "host:5"}) == Place(1, 2, "mpi", "host", 5)
    with pytest.raises(InputError, match=f"{ADDRESS}=HOST:PORT"):
        place_in(said)


TWO = '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]'


@pytest.mark.parametrize(
    "said, file",
    [
        ({"MLX_RANK": "2"}, TWO),
        ({"MLX_RANK": "-1"}, TWO),
        ({"MLX_RANK": "one"}, TWO),
        ({"MLX_RANK": "²"}, TWO),
        ({"MLX_RANK": "9" * 5000}, TWO),
        ({ADDRESS: "host"}, TWO),
        ({ADDRESS: ":5"}, TWO),
        ({ADDRESS: "host:"}, TWO),
        ({ADDRESS: "host:99999"}, TWO),
        ({}, '[["127.0.0.1:99999"], ["127.0.0.1:5000"]]'),
        ({}, '[["127.0.0.1:65534"], ["127.0.0.1:65535"]]'),
        ({}, '[["127.0.0.1"], ["127.0.0.1"]]'),
        ({}, '[["127.0.0.1:5000"], []]'),
        ({}, '[["127.0.0.1:5000"], "127.0.0.1:5001"]'),
        ({}, '{"hosts": 2}'),
        ({}, "[["),
        ({}, "[" * 100_000),
        ({}, b"\xff\xfe"),
        ({"MLX_HOSTFILE": "nowhere\nat all"}, TWO),
        ({"MLX_HOSTFILE": "\0"}, TWO),
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_launchers(tmp_path, said, file):
    """Every one is said in a line; no rank is alone with a part of the work."""
    ring = {"MLX_RANK": "0", "MLX_HOSTFILE": written(tmp_path, file)}
    with pytest.raises(InputError):
        place_in(ring | said)


@pytest.mark.parametrize(
    "said",
    [
        {"NCCL_HOST_IP": "h", "MLX_WORLD_SIZE": "2"},
        {"NCCL_HOST_IP": "h", "NCCL_PORT": "7"},
        {"NCCL_HOST_IP": "h", "NCCL_PORT": "x", "MLX_WORLD_SIZE": "2"},
        {"MLX_JACCL_COORDINATOR": "h:5", "MLX_IBV_DEVICES": "nowhere"},
        {"MLX_JACCL_COORDINATOR": "h", "MLX_IBV_DEVICES": "nowhere"},
        {"OMPI_COMM_WORLD_SIZE": "many", ADDRESS: "h:5"},
        {"OMPI_COMM_WORLD_SIZE": "2", "MLX_RANK": "5", ADDRESS: "h:5"},
    ],
    ids=str,
)
def test_other_odd_launchers(said):
    with pytest.raises(InputError):
        place_in({"MLX_RANK": "0"} | said)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.just("127.0.0.1:5000"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    file=st.binary(max_size=40) | JSON.map(json.dumps),
    rank=st.text(max_size=3) | st.sampled_from("0123"),
    address=st.none() | st.text(max_size=8),
)
@example(file='[["a:1"], [{}]]', rank="0", address=None)
def test_any_file(tmp_path_factory, file, rank, address):
    """A place among some, or none, or one line."""
    path = written(tmp_path_factory.getbasetemp(), file, "any.json")
    said = {"MLX_RANK": rank, "MLX_HOSTFILE": path}
    try:
        place = place_in(said if address is None else said | {ADDRESS: address})
    except InputError:
        return
    if place:
        assert 0 <= place.rank < place.size and 0 < place.port < 65536 and place.host


# Wires.


@pytest.fixture
def ends():
    """Both ends of a wire."""
    with closing(listen("127.0.0.1", 0, 1)) as listening:
        port = listening.getsockname()[1]
        one = Wire(connect("127.0.0.1", port, time.monotonic() + HANG))
        other = Wire(listening.accept()[0])
    yield one, other
    one.close()
    other.close()


def test_messages_are_whole_and_in_order(ends):
    """Of every thread; also those that no buffer holds."""
    one, other = ends
    count, threads = 60, 4

    def speak(which):
        for number in range(count):
            size = 200_000 if number % 20 == 7 else number
            one.send([which, number, "é" * size])

    speaking = [threading.Thread(target=speak, args=(n,)) for n in range(threads)]
    for thread in speaking:
        thread.start()
    heard = {which: [] for which in range(threads)}
    for _ in range(count * threads):
        which, number, text = other.receive()
        assert set(text) <= {"é"}
        assert len(text) == (200_000 if number % 20 == 7 else number)
        heard[which].append(number)
    for thread in speaking:
        thread.join()
    assert heard == {which: list(range(count)) for which in range(threads)}


@pytest.mark.parametrize("message", [None, [], "", {"a": [1.5, None, True]}, "é\0\n"])
def test_any_message(ends, message):
    for one, other in (ends, ends[::-1]):
        one.send(message)
        assert other.receive() == message


def test_a_closed_end(ends):
    """What was said before is heard; then both know."""
    one, other = ends
    one.send("last")
    one.close()
    assert other.receive() == "last"
    with pytest.raises(GoneError):
        other.receive()
    with pytest.raises(GoneError):
        for _ in range(100):  # the first may still be taken
            other.send("x" * 100_000)
    with pytest.raises(GoneError):
        one.send("x")


def test_a_wait_that_is_closed(ends):
    """By another thread."""
    one, _ = ends
    found = []

    def wait():
        try:
            one.receive()
        except GoneError as error:
            found.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    one.close()
    waiting.join(HANG)
    assert len(found) == 1


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 8,
        (3).to_bytes(8, "big") + b"abc",
        (2).to_bytes(8, "big") + b"\xff\xfe",
        (100_000).to_bytes(8, "big") + b"[" * 100_000,
        b"\0\0",
    ],
    ids=["HTTP", "endless", "no JSON", "no UTF-8", "deep", "cut short"],
)
def test_junk_is_no_message(ends, junk):
    one, other = ends
    one._socket.sendall(junk)
    one.close()
    with pytest.raises(GoneError):
        other.receive()


def test_nobody_listens():
    with pytest.raises(OSError):
        connect("127.0.0.1", free_ports(1), time.monotonic() + 0.3)


# Meeting, among strangers.


@pytest.mark.parametrize("says", [None, b"", (4).to_bytes(8, "big") + b'"oh"'])
def test_a_stranger_in_the_place_of_rank_0(monkeypatch, says):
    """Who listens there and says nothing, leaves at once, or says something else."""
    monkeypatch.setattr(ranks_module, "_TOGETHER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = []

        def take():
            for _ in range(2):
                taken.append(stranger.accept()[0])
            if says is not None:
                taken[0].sendall(says)
                taken[0].shutdown(socket.SHUT_WR)

        threading.Thread(target=take, daemon=True).start()
        place = Place(1, 2, "ring", "127.0.0.1", stranger.getsockname()[1])
        with pytest.raises(InputError, match="rank 0 has ended, or"):
            Ranks(place, "main.py")
        for each in taken:
            each.close()


def say_to(port, data):
    """A stranger, who stays."""
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(data)
    return stranger


def message(value):
    data = json.dumps(value).encode()
    return len(data).to_bytes(8, "big") + data


STRANGERS = {
    "nothing": b"",
    "half a length": b"\0\0\0",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no rank": message([7, "orders"]),
    "rank 0": message([0, "orders"]),
    "odd rank": message([[1], "orders"]),
    "odd kind": message([1, "sparkles"]),
    "odd kinds": message([1, ["orders"]]),
    "a number": message(5),
    "deep": (100_000).to_bytes(8, "big") + b"[" * 100_000,
}


@pytest.fixture
def meeting(monkeypatch):
    """Rank 0 of two, as it waits for the other: its port, and what becomes of it."""
    monkeypatch.setattr(ranks_module, "_TOGETHER", 20.0)
    port = free_ports(1)
    first = Ranks.__new__(Ranks)
    first._place = Place(0, 2, "ring", "127.0.0.1", port)
    first._name = "test"
    found = []

    def accept():
        try:
            found.append(first._accept())
        except BaseException as error:
            found.append(error)

    waiting = threading.Thread(target=accept, daemon=True)
    waiting.start()
    until = time.monotonic() + HANG
    with suppress(OSError):  # it listens
        connect("127.0.0.1", port, until).close()
    yield port, waiting, found
    for each in found:
        if isinstance(each, list):
            for lines in each:
                for wire in lines.values():
                    wire.close()


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_do_not_stop_them(meeting, kind):
    """Who connects first and says anything, or nothing, and stays."""
    port, waiting, found = meeting
    stranger = say_to(port, STRANGERS[kind])
    other = Ranks.__new__(Ranks)
    other.rank = 1
    other._place = Place(1, 2, "ring", "127.0.0.1", port)
    (lines,) = other._connect()
    waiting.join(40)
    assert len(found) == 1, "rank 0 still waits for the stranger"
    stranger.close()
    assert isinstance(found[0], list), found
    (theirs,) = found[0]
    for kind in ("orders", "ends"):
        theirs[kind].send(kind)
        assert lines[kind].receive() == kind
        lines[kind].close()


# The program, among several.


def lines_of(ended):
    """What was said by all, line by line."""
    return "".join(each.err for each in ended).splitlines()


def refused(ended, *words):
    """One line on rank 0's stderr says it, and nobody goes on."""
    (line,) = lines_of(ended)
    assert line.startswith("main.py: "), line
    assert line == ended[0].err.rstrip("\n")
    for word in words:
        assert word in line
    assert ended[0].status == 2
    assert all(each.out == "" for each in ended)
    return line


def alone(*flags):
    return subprocess.run(
        [*PROGRAM, *flags], cwd=PROJECT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def short():
    """What one process answers."""
    return alone(*SHORT, "--json")


def test_an_answer(short):
    """Whole, by rank 0 alone; in its order all have ended well."""
    ended = run(2, [*PROGRAM, *SHORT, "--json"])
    assert [each.status for each in ended] == [0, 0]
    (ours,), (theirs,) = ended[0].out.splitlines(), short.stdout.splitlines()
    ours, theirs = json.loads(ours), json.loads(theirs)
    assert ours["text"] == theirs["text"] and ours["tokens"] == theirs["tokens"]
    assert ended[1].out == ended[1].err == ""
    assert ended[0].err == ""


def test_of_mlx_launch(short):
    """The usual launcher itself."""
    launcher = Path(sys.executable).parent / "mlx.launch"
    port = free_ports(3)
    flags = ["-n", "2", "--starting-port", str(port), "--"]
    with subprocess.Popen(
        [launcher, *flags, *PROGRAM, *SHORT],
        cwd=PROJECT,
        stdin=subprocess.PIPE,  # at an end of input it would look for more, for ever
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launched:
        try:
            status = launched.wait(HANG)
        finally:
            launched.kill()
        assert status == 0, launched.stderr.read()
        assert json.loads(short.stdout)["text"] in launched.stdout.read()


@pytest.mark.parametrize(
    "count, dies, said",
    [
        (2, 1, "rank 1 (127.0.0.1) is gone"),
        (2, 0, "rank 0 is gone"),
        (3, 1, "rank 1 (127.0.0.1) is gone"),
        (3, 2, "rank 2 (127.0.0.1) is gone"),
        (3, 0, "rank 0 is gone"),
    ],
)
def test_one_dies(folders, count, dies, said):
    """In the middle of a text: the others end, and one line says why."""
    # The bundled pair takes three ranks long, where there are fewer cores.
    tiny = [*program_at(folders / "one" / "model"), *ENDLESS]
    command = [*PROGRAM, *ENDLESS] if count == 2 else tiny
    with Ranked(count, command) as ranked:
        ranked.until(lambda: len(ranked.out()) > 20)
        ranked.signal(signal.SIGKILL, dies)
        began = time.monotonic()
        ended = ranked.end()
    print(f"{time.monotonic() - began:.1f} s")
    (line,) = lines_of(ended)
    assert line.startswith("main.py: ") and said in line
    assert ended[dies].status == -signal.SIGKILL
    # Nobody has to know more than that rank 0 has ended.
    assert all(each.status in (0, 2) for each in ended[1:] if each is not ended[dies])
    assert ended[0].status != 0


def test_who_is_stopped_is_not_gone():
    """A machine may be slow: the text goes on where it was."""
    with Ranked(2, [*PROGRAM, *ENDLESS]) as ranked:
        ranked.until(lambda: len(ranked.out()) > 20)
        ranked.signal(signal.SIGSTOP, 1)
        time.sleep(3)
        stood = len(ranked.out())
        assert [process.poll() for process in ranked.processes] == [None, None]
        assert ranked.err() == ""
        ranked.signal(signal.SIGCONT, 1)
        ranked.until(lambda: len(ranked.out()) > stood + 20)
        ranked.signal(signal.SIGKILL, 0)
        ranked.end()


@pytest.fixture(scope="module")
def folders(make, tmp_path_factory):
    """Two folders with other models by the same name, and one with none."""
    found = tmp_path_factory.mktemp("folders")
    for name, seed in (("one", 20), ("other", 9)):
        shutil.copytree(make(seed=seed)[2], found / name / "model")
    (found / "none").mkdir()
    return found


def program_at(name="model", *flags):
    models = ["--model", name, "--draft-model", "none", "--prompt", "the cat"]
    return [sys.executable, PROJECT / "main.py", *models, "--max-tokens", "4", *flags]


def test_other_flags():
    command = [*PROGRAM, *SHORT]
    ended = run(2, command, commands={1: [*PROGRAM, *SHORT[:-1], "9"]})
    line = refused(ended, "rank 1 (127.0.0.1) has another command line than rank 0")
    assert "'9' there, '8' here" in line


def test_other_models(folders):
    where = {0: folders / "one", 1: folders / "other"}
    refused(run(2, program_at(), folders=where), "rank 1", "another target than rank 0")


def test_no_model_on_one(folders):
    where = {0: folders / "one", 1: folders / "none"}
    refused(run(2, program_at(), folders=where), "rank 1 (127.0.0.1): ", "'model'")
    # Rank 0's own is nobody else's.
    where = {0: folders / "none", 1: folders / "one"}
    assert "rank" not in refused(run(2, program_at(), folders=where), "'model'")


def test_another_program(tmp_path):
    """Even where only a comment differs: nobody can know that it is one."""
    kept = shutil.ignore_patterns(
        ".*", "tests", "docs", "__pycache__", "models", "*.npz"
    )
    shutil.copytree(PROJECT, tmp_path / "copy", ignore=kept)
    command = [sys.executable, "main.py", "--prompt", "x"]
    changed = tmp_path / "copy" / "system" / "wire.py"
    changed.write_text(changed.read_text() + "# another\n")
    ended = run(2, command, folders={1: tmp_path / "copy"})
    refused(ended, "rank 1 (127.0.0.1)", "another version of this program")


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparkle"],
        ["--prompt", ""],
        ["--model", "nowhere"],
        ["--input", "nowhere.txt"],
        ["--prompt", "x", "--delta", "2"],
    ],
    ids=str,
)
def test_an_error_of_all_is_said_once(flags):
    """As by one process."""
    ended = run(3 if flags[0] == "--model" else 2, [*PROGRAM, *flags])
    line = refused(ended)
    assert line == alone(*flags).stderr.rstrip("\n")


def test_help():
    ended = run(2, [*PROGRAM, "--help"])
    assert ended[0].status == 0 and ended[0].out == alone("--help").stdout
    assert ended[1].out == "" and lines_of(ended) == []


@pytest.mark.parametrize("which", [(), (0,)], ids=["all", "rank 0"])
def test_ctrl_c(which):
    """At any moment: from a terminal all of them get it, from a launcher some."""
    with Ranked(2, [*PROGRAM, *ENDLESS]) as ranked:
        ranked.until(lambda: len(ranked.out()) > 20)
        ranked.signal(signal.SIGINT, *which)
        ended = ranked.end()
    assert ended[0].status == 130, ended
    assert ended[1].status in (0, 2, 130), ended
    assert [each.err for each in ended] == ["", ""]


def test_ctrl_c_while_they_begin():
    """Before, while and after they meet."""
    for after in (0, 0.5):
        with Ranked(2, [*PROGRAM, *ENDLESS]) as ranked:
            ranked.until(ranked.takes_signals)
            time.sleep(after)
            ranked.signal(signal.SIGINT)
            ended = ranked.end()
        assert [each.err for each in ended] == ["", ""]
        assert ended[0].status == 130, ended


def test_ctrl_c_between_prompts(folders):
    """What was stopped leaves no trace in what is asked next."""
    models = ["--model", folders / "one" / "model", "--draft-model", "none"]
    flags = [*models, "--min-new-tokens", "60", "--max-tokens", "60"]
    program = [sys.executable, "main.py"]
    with Ranked(2, [*program, "--interactive", *flags]) as ranked:
        ranked.type("the cat sat\n")
        ranked.until(lambda: len(ranked.out()) > 20)
        ranked.signal(signal.SIGINT)
        ranked.until(lambda: "stopped" in ranked.err())
        stopped = len(ranked.out())
        ranked.type("on a b c\n")
        ended = ranked.end()
    assert [each.status for each in ended] == [0, 0]
    assert lines_of(ended) == ["stopped"]
    answer = subprocess.run(
        [*program, *flags, "--prompt", "on a b c"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ended[0].out[stopped:].strip("\n") == answer.strip("\n")
