"""The processes of one program that a launcher began together, often on several
machines: its ranks, from 0 on.

Rank 0 is the program as a person sees it: it alone reads and prints. From it a wire
goes to each other rank, over which it says what is to be done; numbers go from rank to
rank by MLX's own means. They end together: when one is gone, all are, within seconds,
and one line says why.
"""

import ctypes
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn

import mlx.core as mx

from system import errors
from system.errors import InputError, leave, one_line, say
from system.launched import ADDRESS, Place, place_in
from system.wire import GoneError, Wire, connect, listen

#: Seconds in which all ranks have to be there.
_TOGETHER = 60.0
#: Seconds after which it is looked who has come.
_LOOK = 0.05
#: Seconds that rank 0 has to end for a reason of its own when another fails: it is
#: often the same.
_OWN_REASON = 1.0
#: Seconds that Ctrl-C may take.
_UNANSWERED = 10.0
#: Signals that a program may take, and raise something then.
_TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
#: What each wire is for: orders and answers; and who ends, and why.
_ORDERS, _ENDS = "orders", "ends"
#: What rank 0 says to who has come.
_WELCOME = "all are here"


class Ranks:
    """This process among the others.

    Attributes:
        rank, size: which of how many it is.
        wires: on rank 0 one to each other, in order; elsewhere the one to rank 0.
        together: whether MLX has connected them, for a model that they hold.
        group: which MLX adds up by, once they are.
        sums, summed_bytes: how often :meth:`add_up` was asked, and of how many bytes.
    """

    def __init__(self, place: Place, name: str):
        """Meet the others.

        Raises:
            InputError: one does not come, or is of another program or other flags.
        """
        self.rank, self.size = place.rank, place.size
        self.together = False
        self.sums = self.summed_bytes = 0
        self._place, self._name = place, name
        self.group: mx.distributed.Group | None = None
        self._ending = threading.Lock()
        self._ended = False
        lines = (self._accept if self.rank == 0 else self._connect)()
        self.wires = [ends[_ORDERS] for ends in lines]
        self._ends = [ends[_ENDS] for ends in lines]
        watch = self._watch_other if self.rank == 0 else self._watch_first
        for number, wire in enumerate(self._ends, start=1):
            threading.Thread(target=watch, args=(number, wire), daemon=True).start()
        if self.rank == 0:
            errors.at_end(self._end)
            self._take_interrupts()
        else:
            self._become_quiet()
        self.require_same("version of this program", _version())
        self.require_same("version of MLX", mx.__version__)
        self.require_same("command line", sys.argv[1:])

    def come_together(self) -> None:
        """Have MLX connect the ranks; all ask at the same time, before they add up.

        Raises:
            InputError: it cannot.
        """
        # Meanwhile no other thread runs, nor Ctrl-C: who waits for nobody is ended by
        # the system, without a word, which the others notice.
        alarm = signal.alarm(int(_TOGETHER))
        first = self.group is None
        try:
            self.group = mx.distributed.init(strict=True, backend=self._place.backend)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the ranks do not come together: {error}") from None
        finally:
            signal.alarm(alarm)
        self.together = True
        if first:
            _hush_libraries()
            _outlive_crashes()

    def add_up(self, part: mx.array) -> mx.array:
        """The sum of what each rank has, for all; where the same sums are begun with in
        the same order everywhere."""
        self.sums += 1
        self.summed_bytes += part.nbytes
        return mx.distributed.all_sum(part, group=self.group)

    def traffic(self) -> str:
        """What went from rank to rank so far, in words. (Of compiled passes there are
        only those that were traced.)"""
        megabytes = self.summed_bytes / 1e6
        return f"{self.size} ranks: {self.sums:,} sums of {megabytes:,.1f} MB so far"

    def require_same(self, what: str, value: Any) -> None:
        """See to it that all ranks have the same of something; all of them ask.

        Args:
            value: JSON.

        Raises:
            InputError: on rank 0, one has another.
        """
        if self.rank:
            self.answer(value)
            self.hear()  # where it is another, the end comes instead
            return
        for number, wire in enumerate(self.wires, start=1):
            other = self.hear_from(number)
            if other != value:
                raise InputError(
                    f"rank {number} ({wire.where}) has another {what} than rank 0: "
                    f"{_difference(other, value)}"
                )
        self.tell(True)

    def tell(self, message: Any) -> None:
        """On rank 0: say something to all others."""
        for number in range(1, self.size):
            self.tell_one(number, message)

    def tell_one(self, number: int, message: Any) -> None:
        """On rank 0: say something to one other."""
        try:
            self.wires[number - 1].send(message)
        except GoneError:
            self._wait_for_end(number)

    def asked(self, message: Any) -> list[Any]:
        """On rank 0: what all others answer to something."""
        self.tell(message)
        return self.heard()

    def heard(self) -> list[Any]:
        """On rank 0: what all others say next."""
        return [self.hear_from(number) for number in range(1, self.size)]

    def hear_from(self, number: int) -> Any:
        """On rank 0: what one other says next."""
        try:
            return self.wires[number - 1].receive()
        except GoneError:
            self._wait_for_end(number)

    def hear(self) -> Any:
        """Elsewhere: what rank 0 says next."""
        try:
            return self.wires[0].receive()
        except GoneError:
            self._wait_for_end(0)

    def answer(self, message: Any) -> None:
        """Elsewhere: say something to rank 0."""
        try:
            self.wires[0].send(message)
        except GoneError:
            self._wait_for_end(0)

    def give_up(self, reason: str) -> NoReturn:
        """On rank 0: nothing brings the ranks together any more. The end of all."""
        self._end(f"{self._name}: {one_line(reason)}")
        leave(2)

    # Meeting.

    def _accept(self) -> list[dict[str, Wire]]:
        """On rank 0: wires to all others."""
        _, size, _, host, port = self._place
        try:
            listening = listen(host, port, 2 * size)
        except OSError as error:
            raise InputError(
                f"rank 0 cannot listen at {host}, port {port}, for the others: "
                f"{error.strerror or error} (mlx.launch --starting-port N takes others)"
            ) from None
        until = time.monotonic() + _TOGETHER
        found: dict[int, dict[str, Wire]] = {n: {} for n in range(1, size)}
        came: SimpleQueue[tuple[Any, Any, Wire]] = SimpleQueue()
        with listening:
            while any(len(ends) < 2 for ends in found.values()):
                if time.monotonic() > until:
                    missing = [n for n, ends in found.items() if len(ends) < 2]
                    raise InputError(
                        f"rank {missing[0]} of {size} has not come in "
                        f"{_TOGETHER:.0f} seconds"
                    )
                listening.settimeout(_LOOK)
                with suppress(TimeoutError):
                    connected, _ = listening.accept()
                    # A stranger may say nothing, for ever.
                    threading.Thread(
                        target=_greet, args=(connected, came), daemon=True
                    ).start()
                while not came.empty():
                    number, kind, wire = came.get()
                    known = number in found and kind in (_ORDERS, _ENDS)
                    if known and kind not in found[number]:
                        found[number][kind] = wire
                    else:
                        wire.close()
        for ends in found.values():
            with suppress(GoneError):  # which is noticed at once
                ends[_ORDERS].send(_WELCOME)
        return [found[number] for number in range(1, size)]

    def _connect(self) -> list[dict[str, Wire]]:
        """Elsewhere: wires to rank 0."""
        _, _, _, host, port = self._place
        until = time.monotonic() + _TOGETHER
        ends = {}
        for kind in (_ORDERS, _ENDS):
            try:
                ends[kind] = Wire(connect(host, port, until))
                ends[kind].send([self.rank, kind])
            except (OSError, GoneError) as error:
                raise InputError(
                    f"rank {self.rank} does not reach rank 0 at {host}, port {port}: "
                    f"{error} ({ADDRESS}=HOST:PORT says where it is to listen)"
                ) from None
        # All are there by then; a stranger may say nothing, for ever.
        try:
            welcome = ends[_ORDERS].receive(within=2 * _TOGETHER)
        except GoneError:
            welcome = None
        if welcome != _WELCOME:
            for wire in ends.values():
                wire.close()
            raise InputError(
                f"rank {self.rank} has reached {host}, port {port}, and rank 0 has "
                f"ended, or this is another program"
            )
        return [ends]

    # Ending.

    def _become_quiet(self) -> None:
        """Rank 0 speaks for all, and takes Ctrl-C for all."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        errors.speak_by(lambda _: None, self._report)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _take_interrupts(self) -> None:
        """On rank 0: have Ctrl-C end what waits for a sum that never comes, in which
        Python does not come to it; where Ctrl-C is ours."""
        handler = signal.getsignal(signal.SIGINT)
        ours = getattr(handler, "__module__", None) == errors.__name__
        if not ours or threading.current_thread() is not threading.main_thread():
            return
        out, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)

        def watch() -> None:
            while True:
                if os.read(out, 1) != bytes([signal.SIGINT]):
                    continue
                came = time.monotonic()
                time.sleep(_UNANSWERED)
                if errors.interrupts[0] < came - _OWN_REASON:
                    self._end(f"{self._name}: interrupted; the ranks do not answer")
                    leave(130)

        threading.Thread(target=watch, daemon=True).start()

    def _report(self, line: str) -> None:
        """A failure is told by rank 0."""
        with suppress(GoneError):
            self._ends[0].send(line)

    def _end(self, line: str | None = None) -> bool:
        """On rank 0: it is over, for all; say why, if that is not known yet, which is
        what is returned."""
        with self._ending:
            if self._ended:
                return False
            self._ended = True
            if line:
                say(line)
        for wire in self._ends:
            with suppress(GoneError):
                wire.send("end")
        return True

    def _watch_other(self, number: int, wire: Wire) -> None:
        """On rank 0: end when another does."""
        which = f"{self._name}: rank {number} ({wire.where})"
        try:
            said = str(wire.receive())
            time.sleep(_OWN_REASON)
            why = one_line(f"{which}: {said}")
        except GoneError:
            why = f"{which} is gone, and its part of the work with it"
        if self._end(why):  # else it ends for a reason of its own, or in order
            leave(2)

    def _watch_first(self, _: int, wire: Wire) -> None:
        """Elsewhere: end when rank 0 does."""
        try:
            wire.receive()
        except GoneError:
            if self.rank == 1:  # one of those that are left
                sys.stderr.write(f"{self._name}: rank 0 is gone\n")
            leave(2)
        leave(0)

    def _wait_for_end(self, number: int) -> NoReturn:
        """A rank is gone, which is noticed elsewhere as well, and said there."""
        time.sleep(4 * _OWN_REASON)
        raise InputError(f"rank {number} does not answer")


def _hush_libraries() -> None:
    """Have stderr for lines of our own: MLX writes a dozen there when a rank is gone,
    in the midst of the one that says which."""
    sys.stderr.flush()
    encoding, how = sys.stderr.encoding, sys.stderr.errors
    # First, as another thread may say something meanwhile.
    sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding=encoding, errors=how)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)


def _outlive_crashes() -> None:
    """Have a thread that crashes wait some seconds first, as MLX's can when a rank is
    gone: in these the process ends, and says which. (Where the C library is GNU's.)"""
    library = ctypes.CDLL(None)
    if hasattr(library, "sysv_signal"):  # which is for one time
        library.sysv_signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        sleep = ctypes.cast(library.sleep, ctypes.c_void_p)
        for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
            library.sysv_signal(number, sleep)  # its number is seconds, 6 to 11


def _greet(
    connected: socket.socket, came: "SimpleQueue[tuple[Any, Any, Wire]]"
) -> None:
    """Have one say who it is; of a stranger nothing comes."""
    try:
        wire = Wire(connected)
        number, kind = wire.receive()
        hash(number)
    except (GoneError, OSError, TypeError, ValueError):
        connected.close()
    else:
        came.put((number, kind, wire))


_lock = threading.Lock()
_met: list[Ranks | None] = []  # once it is known


def meet(name: str | None = None) -> Ranks | None:
    """The ranks that this process is one of; None where it is the only one.

    Args:
        name: the program's, for messages.

    Raises:
        InputError: the first time, see :class:`Ranks`; or the launcher says odd things.
    """
    with _lock:
        if not _met:
            place = place_in(os.environ)
            name = name or Path(sys.argv[0]).name or "python"
            _met.append(Ranks(place, name) if place else None)
        return _met[0]


@contextmanager
def whole() -> Iterator[None]:
    """Ctrl-C waits for what is done inside, and so does any other signal that a program
    takes: what all ranks do, none leaves halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    before = {n: signal.getsignal(n) for n in _TAKEN}
    before = {n: taken for n, taken in before.items() if callable(taken)}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, taken in before.items():
            signal.signal(number, taken)
    for number, frame in dict(came).items():
        before[number](number, frame)


def _version() -> str:
    """What tells this program from another version of it: its files."""
    digest = hashlib.sha256()
    home = Path(__file__).resolve().parents[1]
    for path in sorted([*home.glob("*.py"), *home.glob("*/*.py")]):
        digest.update(f"{path.relative_to(home)} {path.stat().st_size}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _difference(other: Any, own: Any) -> str:
    """How two values differ, in words."""
    if isinstance(other, list) and isinstance(own, list):
        longest = max(len(other), len(own))
        for place in range(longest):
            pair = [each[place] if place < len(each) else "" for each in (other, own)]
            if pair[0] != pair[1]:
                other, own = pair
                break
    return f"'{other}' there, '{own}' here"
