"""Programs that a stranger's folder brings, run in a process with limits.

A chat template is a program, so is a regular expression, and what transformers does
with a tokenizer's files is whatever they ask for. All of that happens in a process of
its own: it can take only so much time and memory, has no input to read and nothing to
print to, and takes nobody along when it crashes. Nothing is pickled between the two.

Time is measured in the process's own computing, so a busy machine changes nothing.
macOS does not enforce the limit of memory.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from system.errors import InputError
from text.tokenizer_files import FILES

#: Seconds of computing for a call, and more for each megabyte of tokenizer.
SECONDS, SECONDS_PER_MB = 2, 0.25
#: Seconds more to begin with: transformers imports what it needs then, which takes two
#: on an idle machine and more beside busy processes.
IMPORTS = 8
#: Bytes of memory, and more for each byte of tokenizer.
MEMORY, MEMORY_PER_BYTE = 1 << 30, 32
#: The most bytes of a tokenizer's files that count.
COUNTED = 40_000_000
THREADED = ("MKL", "OMP", "OPENBLAS", "RAYON", "VECLIB_MAXIMUM")
#: Seconds to wait for a process that computes nothing and says nothing.
PATIENCE = 300
#: Bytes of an answer.
ANSWER = 1 << 27


class Confined:
    """An object of another process: ``call`` calls its methods.

    Whoever starts one ends it by letting go of it.
    """

    def __init__(self, module: str, folder: Path):
        """Start a process that has made ``module.open_folder(folder)``.

        Raises:
            InputError: as for :meth:`call`.
        """
        self._module, self._folder = module, folder
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        secrets = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
        environment = {k: v for k, v in os.environ.items() if k not in secrets}
        # A library's threads would take their memory before anything is read.
        environment |= {f"{name}_NUM_THREADS": "1" for name in THREADED}
        path = [
            str(Path(__file__).resolve().parents[1]),
            os.environ.get("PYTHONPATH", ""),
        ]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        module, folder = self._module, str(self._folder)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, module, folder, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # Ctrl-C is for whoever waits
            )
        self._pipe = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._pipe)
        self._receive("loading")

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method with arguments, and return a value, that JSON has a form for.

        Raises:
            InputError: the method failed, crashed, or went beyond a limit: the process
                is gone then, and the next call starts another.
        """
        if not self._end.alive:
            self._start()
        try:
            self._pipe.send_bytes(_encode([method, *arguments]))
        except OSError:
            pass  # it is gone: receiving says so
        except BaseException:
            self._end()
            raise
        return self._receive(method)

    def _receive(self, what: str) -> Any:
        try:
            answer = {"error": f"{self._folder}: {what} does not end: it is stopped"}
            if self._pipe.poll(PATIENCE):
                answer = json.loads(self._pipe.recv_bytes(ANSWER))
            else:
                self._end()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)  # of whatever ended it, not of being killed
            self._end()
            if self._process.returncode == -signal.SIGXCPU:
                raise InputError(
                    f"{self._folder}: {what} takes longer than it may, which no "
                    f"tokenizer or chat template needs"
                ) from None
            raise InputError(
                f"{self._folder}: {what} crashes or takes more memory than it may"
            ) from None
        except BaseException:  # Ctrl-C among them: what it was at is of no more use
            self._end()
            raise
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["value"]


def _encode(value: Any) -> bytes:
    """JSON, whose escapes hold what names of files may hold and UTF-8 does not."""
    return json.dumps(value).encode("ascii")


def _end(process: subprocess.Popen, pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


def limit_memory(size: int) -> None:
    """Let this process allocate, and write to a file, only so many bytes in all."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit in (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, (size, size))


def limit_seconds(seconds: float) -> None:
    """Let this process compute only so many seconds from now on; SIGXCPU ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        until = min(until, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


def serve(module: str, folder: Path, pipe: Connection) -> None:
    """In the other process: make the object, then answer calls until nobody asks."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    opener = importlib.import_module(module).open_folder
    paths = [folder / name for name in FILES]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    size = min(size, COUNTED)
    seconds = SECONDS + SECONDS_PER_MB * size / 1e6
    limit_memory(MEMORY + MEMORY_PER_BYTE * size)
    limit_seconds(seconds + IMPORTS)
    held = []
    pipe.send_bytes(_answer(folder, lambda: held.append(opener(folder))))
    while held:
        method, *arguments = json.loads(pipe.recv_bytes())
        limit_seconds(seconds)
        pipe.send_bytes(_answer(folder, getattr(held[0], method), *arguments))


def _answer(folder: Path, call: Any, *arguments: Any) -> bytes:
    """What a call returns, or why it does not, as it is sent."""
    try:
        return _encode({"value": call(*arguments)})
    except InputError as error:
        return _encode({"error": str(error)})
    except BaseException as error:  # a panic of Rust's is no Exception
        text = (str(error) or type(error).__name__).splitlines()[0]
        return _encode({"error": f"{folder}: its tokenizer fails: {text}"})


if __name__ == "__main__":
    with suppress(EOFError, OSError):
        serve(sys.argv[1], Path(sys.argv[2]), Connection(int(sys.argv[3])))
