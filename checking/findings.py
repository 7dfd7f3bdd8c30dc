"""What is unexpected in a report, in words, and what to do about it."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from checking.children import CRASHED, DONE, HUNG, INTERRUPTED
from checking.task import SECTIONS

#: Below these shares of the fastest K's speed and of plain decoding's, by more than the
#: intervals say, auto is not what it is to be.
AUTO_OF_BEST, AUTO_OF_PLAIN = 0.95, 0.98
#: Roundings of the largest logit by which passes over several tokens may differ.
ROUNDINGS = 50.0
#: The share of the cores that were busy before anything was measured, from which on the
#: machine is.
BUSY = 0.4
#: From which MLX on Metal has kernels for several rows.
MLX = (0, 32, 1)

_SEND = "please report it, with both files"


class Finding(NamedTuple):
    """What is the matter, and what to do."""

    what: str
    todo: str


def findings(report: dict[str, Any]) -> list[Finding]:
    """All of them, what matters most first."""
    parts = {
        name: (record["result"] or {}) for name, record in report["sections"].items()
    }
    found = [
        *_exactness(parts.get("exactness", {})),
        *_suite(parts.get("suite", {})),
        *_processes(report["sections"]),
        *_machine(parts.get("machine", {}), parts.get("curve", {})),
        *_speed(parts.get("speed", {}), "the bundled pair"),
        *_compiled(parts.get("compiled", {})),
        *_shapes(parts.get("shapes", {})),
        *_curve(parts.get("curve", {})),
        *_memory(parts),
    ]
    return list(dict.fromkeys(found))


def _exactness(part: dict[str, Any]) -> Iterator[Finding]:
    for each in part.get("variants", ()):
        differ = sum(each["differ"].values())
        if each["name"] == "float32" and differ:
            yield Finding(
                f"not exact in float32: {differ} texts of {each['texts']} prompts "
                f"differ from plain decoding's, {each['unexplained']} of them by more "
                "than rounding explains",
                _SEND
                + (
                    "; on CUDA try MLX_ENABLE_TF32=0 before that, as TensorFloat-32 "
                    "is no float32"
                ),
            )
        elif each["unexplained"]:
            yield Finding(
                f"{each['name']}: of the texts {each['unexplained']} differ from plain "
                "decoding's where rounding does not explain it",
                _SEND,
            )
        if each["name"] == "float32" and each["texts"] < part["wanted"]:
            yield Finding(
                f"exactness ran out of time: float32 had {each['texts']} of "
                f"{part['wanted']} sentences",
                "close other programs, and run it again with --fresh",
            )
        if (each["rounding"] or 0) > ROUNDINGS:
            yield Finding(
                f"{each['name']}: logits of a pass over several tokens are "
                f"{each['rounding']:.0f} roundings from those of passes over one: a "
                f"few are usual, {ROUNDINGS:g} are not",
                _SEND,
            )


def _suite(part: dict[str, Any]) -> Iterator[Finding]:
    failed = part.get("failed")
    if failed:
        names = ", ".join(list(failed)[:5]) + (", ..." if len(failed) > 5 else "")
        yield Finding(
            f"of the tests {len(failed)} failed: {names}",
            f"{_SEND}; the reasons are below",
        )
    if part.get("said"):
        yield Finding("the test suite did not run: its last lines are below", _SEND)


def _processes(sections: dict[str, Any]) -> Iterator[Finding]:
    for name in SECTIONS:
        record = sections.get(name)
        if record is None:
            continue
        status, more = (
            record["status"],
            ""
            if record["result"] is None
            else ("; what it had found out by then is below"),
        )
        last = record.get("stderr") or ["nothing"]
        said = f"its last line was: {last[-1]}"
        if status == CRASHED:
            which = record["signal"]
            why = which + (
                ", as the system does where memory is short"
                if which == "SIGKILL"
                else ""
            )
            yield Finding(f"{name} crashed ({why}); {said}{more}", _SEND)
        elif status == HUNG:
            yield Finding(
                f"{name} did not end in its time, and was ended; {said}{more}",
                "run it again with nothing else at work; if that does not help, "
                + _SEND,
            )
        elif status == INTERRUPTED:
            yield Finding(f"{name} was interrupted", "the same command goes on from it")
        elif status != DONE and "exit" in record:
            yield Finding(f"{name} failed (exit {record['exit']}); {said}{more}", _SEND)
        elif status != DONE:
            yield Finding(
                f"{name} was left out: there was no time", "run the same command again"
            )


def _machine(part: dict[str, Any], curve: dict[str, Any]) -> Iterator[Finding]:
    if not part:
        return
    if part["rosetta"]:
        yield Finding(
            "this Python is an Intel one, translated by Rosetta: MLX has no GPU there",
            "make clean, then make check PYTHON=... with a Python for arm64",
        )
    if part["macos"] and _numbers(part["mlx"]) < MLX:
        yield Finding(
            f"MLX is {part['mlx']}: before 0.32.1 several rows take longer on M3 and "
            "later",
            ".venv/bin/pip install --upgrade mlx, then again",
        )
    busy = part["load"] > BUSY * (part["cores"] or 1)
    if busy or curve.get("restless"):
        why = (
            f"{part['load']:.1f} processes were at work on {part['cores']} cores "
            "before it began"
            if busy
            else "even plain rounds differed much"
        )
        yield Finding(
            f"the machine was busy with other things: {why}",
            "close other programs, and run it again with --fresh",
        )
    if part["power"] == "battery" or part["low_power"]:
        saving = "low power mode is on" if part["low_power"] else "it ran on battery"
        yield Finding(
            f"{saving}: processors are slower then",
            "plug it in, turn low power mode off, and run it again with --fresh",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _speed(part: dict[str, Any], of: str) -> Iterator[Finding]:
    if not part.get("rows"):
        return
    best = next(row for row in part["rows"] if row["num_draft"] == part["best"])
    # By the interval's end, and by the figure itself where there is none.
    if best.get("high", best["speedup"]) <= 1:
        yield Finding(
            f"{of}: no number of draft tokens is faster than plain decoding "
            f"(K = {part['best']}: {best['speedup']:.2f} times its speed)",
            "use --regular-decode for such models here; auto should come to the same",
        )
    for other, name, least in (
        ("best", f"K = {part['best']}", AUTO_OF_BEST),
        ("plain", "plain decoding", AUTO_OF_PLAIN),
    ):
        ratio, low, high = part[f"auto_over_{other}"]
        if high is not None and high < least:
            yield Finding(
                f"{of}: auto has {ratio:.2f} ({low:.2f} to {high:.2f}) times the speed "
                f"of {name}",
                f"{_SEND}; until then --num-draft {part['best']} is faster"
                if other == "best"
                else f"{_SEND}; until then use --regular-decode",
            )


def _compiled(part: dict[str, Any]) -> Iterator[Finding]:
    for row in part.get("rows", ()):
        other = part["prompts"] - row["equal"]
        if other:
            yield Finding(
                f"compiled passes, {row['name']}: {other} of {part['prompts']} texts "
                "are others in float32",
                f"{_SEND}; until then use --compile off",
            )


def _shapes(part: dict[str, Any]) -> Iterator[Finding]:
    for pair in part.get("pairs", ()):
        name = f"{pair['target']} with {pair['draft']}"
        if "left_out" in pair:
            yield Finding(
                f"{name} was left out: {pair['left_out']}",
                "a larger or a faster machine would have it",
            )
        yield from _speed(pair, name)


def _curve(part: dict[str, Any]) -> Iterator[Finding]:
    for step in part.get("steps", ()):
        rows = step["rows"]
        yield Finding(
            f"a pass over {rows + 1} tokens costs {step['more']:.2f} plain passes more "
            f"than one over {rows}: the curve has a step there",
            f"auto knows; with --num-draft K, K = {rows - 1} is the last before it"
            if rows > 1
            else "auto knows: any draft pays for that step, so a small K gains least",
        )


def _memory(parts: dict[str, Any]) -> Iterator[Finding]:
    for each in entries(parts):
        if each["peak"] > each["expected"]:
            yield Finding(
                f"{each['name']}: MLX had {each['peak'] / 1e6:.0f} MB at most, where "
                f"{each['expected'] / 1e6:.0f} MB were expected",
                _SEND,
            )


def entries(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines on memory of all sections' results, each with its ``section``."""
    found = []
    for name, part in parts.items():
        its = [part, *part.get("variants", ()), *part.get("pairs", ())]
        found += [{"section": name, **each} for each in its if "peak" in each]
    return found
