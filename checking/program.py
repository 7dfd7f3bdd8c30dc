"""What check.py does: section by section, into a report that can be gone on with."""

import os
import signal
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checking import child, children, kept, report
from checking.children import DONE, INTERRUPTED
from checking.task import GRACE, KEPT, LEAST, SECTIONS, TOTAL
from system.errors import InputError, Parser, say

#: The status of what was not begun.
LEFT_OUT = "left out"


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags, read.

    Raises:
        InputError: they are odd.
    """
    parser = Parser(
        prog="check.py",
        description="Measure on this machine whether the program is exact, and how "
        f"fast. The report is {kept.TEXT} and {kept.JSON} in the current folder; the "
        "same command goes on with one that was interrupted.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="within 4 minutes, not 10")
    add("--fresh", action="store_true", help="begin anew, whatever there is already")
    add("--section", metavar="NAME", help=SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Do what the flags say; the exit status.

    Raises:
        InputError: the flags are odd, or the report's files are somebody else's.
    """
    args = parse_arguments()
    if args.section:
        return child.main(args.section)
    folder = Path.cwd()
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write into {folder}: go to a folder of your own")
    earlier = kept.read(folder, args.fresh)
    try:
        if earlier:
            report.markdown(earlier)
    except Exception:  # of any kind, for whatever was written into it
        raise InputError(f"{kept.JSON} has odd results: --fresh begins anew") from None
    ends = (signal.SIGTERM, signal.SIGHUP)  # a closed terminal, too
    before = {each: signal.signal(each, signal.default_int_handler) for each in ends}
    try:
        with tempfile.TemporaryDirectory(prefix="check-") as temporary:
            return _Check(args.quick, folder, Path(temporary)).run(earlier)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Check:
    """One run."""

    def __init__(self, quick: bool, folder: Path, temporary: Path):
        self._quick = quick
        self._folder = folder
        self._began = time.monotonic()
        # What children make is gone with this, however they end; and what was learnt
        # here before decides nothing.
        for name in ("temporary", "cache"):
            (temporary / name).mkdir()
        self._environment = {"TMPDIR": str(temporary / "temporary")}
        self._cache = {"XDG_CACHE_HOME": str(temporary / "cache")}
        self._report: dict[str, Any] = {}
        self._earlier = 0.0  # seconds of earlier runs

    @property
    def _left(self) -> float:
        return TOTAL[not self._quick] - (time.monotonic() - self._began)

    def run(self, earlier: dict[str, Any] | None) -> int:
        """Whatever is not done yet; the exit status."""
        with _Bar(self._quick) as bar:
            machine = self._section("machine", None, bar)
            if machine["status"] == INTERRUPTED:
                raise KeyboardInterrupt  # nothing is known, and what is there stays
            self._report = self._begin(earlier, machine)
            todo = self._todo()
            bar.expect(todo)
            for name in ("machine", *todo):
                record = machine if name == "machine" else None
                if record is None:
                    record = self._section(name, self._records.get(name), bar)
                self._keep(name, record)
                if record["status"] == INTERRUPTED:
                    break
        if self._report["interrupted"]:
            say("interrupted: the same command goes on from there")
            return 130
        if not todo:
            say("all of it had been measured before; --fresh measures anew")
        for line in report.summary(self._report):
            print(line)
        print(f"written: {kept.TEXT} and {kept.JSON}")
        return 0

    @property
    def _records(self) -> dict[str, Any]:
        return self._report["sections"]

    def _begin(
        self, earlier: dict[str, Any] | None, machine: dict[str, Any]
    ) -> dict[str, Any]:
        """The report to fill: the earlier one, if it is of the same."""
        about = machine["result"] or {}
        identity = {
            "machine": about.get("identity", "unknown"),
            "mlx": about.get("mlx", "unknown"),
            "code": kept.code(),
        }
        if earlier:
            why = kept.difference(earlier, self._quick, identity)
            if why is None:
                self._earlier = earlier["seconds"]
                return earlier
            say(f"{kept.JSON} is not gone on with: {why}; this begins anew")
        return kept.begin(self._quick, identity)

    def _todo(self) -> list[str]:
        return [
            name
            for name in SECTIONS
            if name != "machine" and not kept.is_finished(name, self._records.get(name))
        ]

    def _section(
        self, name: str, record: dict[str, Any] | None, bar: "_Bar"
    ) -> dict[str, Any]:
        """A section's record."""
        share = SECTIONS[name][not self._quick]
        seconds = self._left if share is None else min(share, self._left)
        if seconds < LEAST:
            return {"status": LEFT_OUT, "seconds": 0.0, "result": None}
        before = kept.before(name, record)
        task = {"quick": self._quick, "seconds": seconds, "before": before}
        bar.begin(name, seconds)
        done = children.run(
            children.command_of(name),
            task,
            seconds + GRACE,
            bar.tick,
            {**self._environment, **(self._cache if name != KEPT else {})},
        )
        if done["result"] is None and before:
            done["result"] = before  # what was reached is not lost
        bar.end(name, done)
        return done

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        """Have it in both files."""
        self._records[name] = record
        self._report["interrupted"] = record["status"] == INTERRUPTED
        seconds = self._earlier + time.monotonic() - self._began
        self._report["seconds"] = round(seconds, 1)
        self._report["written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        kept.write(self._folder, self._report, report.markdown(self._report))


class _Bar:
    """How far it is, on a terminal; else a line for each section."""

    def __init__(self, quick: bool):
        self._quick = quick
        self._bar = tqdm(
            total=TOTAL[not quick],
            disable=None,
            leave=False,
            bar_format="{desc:<10} {percentage:3.0f}% |{bar}|{postfix}",
        )
        self._base = 0.0  # seconds of what is over, as they were planned
        self._planned = 0.0
        self._began = 0.0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def expect(self, names: list[str]) -> None:
        """What there is to do, beside what is over."""
        shares = [SECTIONS[name][not self._quick] for name in names]
        if None not in shares:  # without the suite it does not take all the time
            self._bar.total = self._base + sum(shares)

    def begin(self, name: str, seconds: float) -> None:
        """A section of so many seconds at most."""
        self._began, self._planned = time.monotonic(), seconds
        self._bar.set_description_str(name)
        self.tick()

    def tick(self) -> None:
        """Time goes by."""
        done = self._base + min(time.monotonic() - self._began, self._planned)
        self._bar.n = min(done, self._bar.total)
        left = self._bar.format_interval(max(0, self._bar.total - self._bar.n))
        self._bar.set_postfix_str(f"{left} left at most")

    def end(self, name: str, record: dict[str, Any]) -> None:
        """It is over."""
        self._base += self._planned
        self.tick()
        status = "" if record["status"] == DONE else f", {record['status']}"
        line = f"{name}: {record['seconds']:.0f} s{status}"
        with suppress(OSError):
            self._bar.write(line, file=sys.stderr)
