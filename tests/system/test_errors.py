"""errors.py: whatever happens ends in a status and at most one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from system import errors
from system.errors import (
    InputError,
    Parser,
    PromptError,
    TooLongError,
    blame_prompt,
    run,
)


@pytest.mark.parametrize("code", [0, 1, None, "pip install it\nfirst"])
def test_a_library_that_ends_the_program(capsys, code):
    assert run(lambda: sys.exit(code), "x.py") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("x.py: a library ended the program: ")
    assert err.count("\n") == 1


def test_help_is_no_error(capsys):
    assert run(lambda: Parser(prog="x.py").parse_args(["--help"]), "x.py") == 0
    assert capsys.readouterr().out.startswith("usage: x.py")


def test_help_on_a_full_disk():
    program = Path(errors.__file__).parents[1] / "convert.py"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, str(program), "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_a_status_that_is_returned():
    assert run(lambda: 2, "x.py") == 2
    assert run(lambda: None, "x.py") == 0


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[malloc_or_wait] Unable to allocate 80000000000 bytes."),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 9 bytes which is greater than the "
            "maximum allowed buffer size of 8 bytes."
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_no_memory(capsys, error):
    assert run(failing(error), "x.py") == 2
    said = capsys.readouterr().err
    assert said.startswith("x.py: no memory is left")
    assert said.count("\n") == 1
    with pytest.raises(PromptError, match="no memory is left"), blame_prompt():
        raise error


def test_defects_keep_their_traceback():
    with pytest.raises(RuntimeError, match="another"):
        run(failing(RuntimeError("another generation has begun")), "x.py")
    with pytest.raises(RuntimeError, match="another"), blame_prompt():
        raise RuntimeError("another generation has begun")


def test_whose_errors_they_are():
    """A prompt's stay what they are, others become the prompt's."""
    with pytest.raises(TooLongError), blame_prompt():
        raise TooLongError
    with pytest.raises(PromptError, match="odd"), blame_prompt():
        raise InputError("odd")


def test_ctrl_c_when_all_is_done(tmp_path):
    """While Python takes itself down: what was to be done is done, and the status 0."""
    code = (
        "import system.startup, os, sys\n"
        "from system.errors import run\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        "        kill(pid, 2)\n"
        "late = Late()\n"
        "sys.exit(run(lambda: print('done'), 'x.py'))\n"
    )
    (tmp_path / "program.py").write_text(code)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": str(Path(errors.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_ctrl_c_inside_an_import(tmp_path):
    """The process ends there: what is imported would make an abort of it, or an error.
    Elsewhere it is an exception, that cleans up."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        "    print('caught')\n"
    )
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\n"
        "from system.errors import run\n"
        "def main():\n"
        "    if len(sys.argv) > 1:\n"
        "        import slow\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "sys.exit(run(main, 'program.py'))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(errors.__file__).parents[1])])
    for arguments, out in ((["import"], ""), ([], "cleaned up\n")):
        result = subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), *arguments],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout, result.stderr) == (130, out, "")


@pytest.mark.parametrize("gap", [0, 0.002, 0.02, 0.2])
def test_ctrl_c_twice(tmp_path, gap):
    """The second has nothing to interrupt once the first is being dealt with."""
    (tmp_path / "program.py").write_text(
        "import system.startup, sys, time\n"
        "from system.errors import run\n"
        "def main():\n"
        "    print('begun', flush=True)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "sys.exit(run(main, 'program.py'))\n"
    )
    path = str(Path(errors.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_ctrl_c_when_main_is_over(where, capsys):
    """While the error is said, say: it is not lost. Inside, it is an interruption."""

    def main():
        if where == "inside":
            os.kill(os.getpid(), signal.SIGINT)
        raise Interrupting

    class Interrupting(errors.InputError):
        def __str__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return "the reason"

    status = errors.run(main, "x.py")
    said = capsys.readouterr().err
    assert (status, said) == {
        "outside": (2, "x.py: the reason\n"),
        "inside": (130, ""),
    }[where]


def test_the_current_folder_is_gone(tmp_path):
    """MKL would say that its library cannot be loaded."""
    (tmp_path / "gone").mkdir()
    program = Path(errors.__file__).parents[1] / "convert.py"
    code = (
        "import os, sys; os.rmdir(os.getcwd());"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(program), "--list"],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "convert.py: the current folder is gone: leave it\n"


def test_two_dashes_are_no_value():
    parser = errors.Parser(prog="x.py")
    parser.add_argument("--model")
    assert parser.parse_args(["--model", "a"]).model == "a"
    with pytest.raises(errors.InputError, match="'--' is no value of --model"):
        parser.parse_args(["--model=--"])


def test_bytes_that_are_no_text_are_shown_as_bytes():
    shown = errors.one_line(b"a\xc3\xbc\x1b".decode("ascii", "surrogateescape"))
    assert shown == "a\\xc3\\xbc\\x1b"
