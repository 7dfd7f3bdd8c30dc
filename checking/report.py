"""The report for a person: Markdown, made of the JSON alone."""

from collections.abc import Callable, Iterator
from typing import Any

from checking.children import DONE
from checking.findings import entries, findings
from checking.kept import JSON, TEXT, TITLE
from checking.tables import cell, interval, line, megabytes, number, table
from checking.task import SECTIONS

_SENDING = (
    "Open an issue with both files, "
    f"`{TEXT}` and `{JSON}`. They hold figures, the machine's description and "
    "sentences of the bundled file: nothing of yours."
)

_ON_CPU = (
    "On a CPU all weights become float32 as they are loaded: these lines test what "
    "rounding or packing the weights does, not arithmetic in these dtypes."
)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    lines = [TITLE, "", *summary(report), "", *_unexpected(report), ""]
    for name, show in _SHOWN.items():
        record = report["sections"].get(name)
        if record is None:
            continue
        lines += [f"## {name.capitalize()}", ""]
        result = record["result"]
        lines += show(result) if result else [f"Nothing: {record['status']}.", ""]
        if record.get("stderr"):
            lines += ["Its last lines:", "", *_quoted("\n".join(record["stderr"])), ""]
    lines += ["## Memory", "", *_memory(report)]
    lines += ["## Sections", "", *_sections(report)]
    lines += ["## Where to send it", "", _SENDING]
    return "\n".join(lines) + "\n"


def summary(report: dict[str, Any]) -> list[str]:
    """Some lines in words: what most want to know."""
    parts = _parts(report)
    kind = "--quick" if report["quick"] else "the long one"
    lines = [
        *_machine_in_words(parts.get("machine")),
        _exact_in_words(parts.get("exactness")),
        _drafts_in_words(parts.get("speed")),
        _auto_in_words(parts.get("speed")),
        _theirs_in_words(parts.get("speed")),
        _shapes_in_words(parts.get("shapes")),
        _suite_in_words(parts.get("suite")),
        f"unexpected: {len(findings(report)) or 'nothing'}"
        f"; {kind}, {report['seconds']:.0f} s",
    ]
    return [f"- {each}" for each in lines if each]


def _parts(report: dict[str, Any]) -> dict[str, Any]:
    return {name: record["result"] or {} for name, record in report["sections"].items()}


def _machine_in_words(part: dict[str, Any] | None) -> list[str]:
    if not part:
        return []
    return [
        f"machine: {part['device']}, {part['kind']}, {part['memory'] / 1e9:.0f} GB; "
        f"{part['os']}, Python {part['python']}, MLX {part['mlx']}"
    ]


def _exact_in_words(part: dict[str, Any] | None) -> str:
    if not part or not part.get("variants"):
        return "exact: not known"
    words = []
    for each in part["variants"]:
        equal = each["texts"] * len(each["differ"]) - sum(each["differ"].values())
        text = f"{equal} of {each['texts'] * len(each['differ'])} in {each['name']}"
        if each["unexplained"]:
            text += f" ({each['unexplained']} not explained by rounding)"
        elif each["ties"]:
            text += " (the others are ties in its rounding)"
        words.append(text)
    first = part["variants"][0]
    yes = not sum(first["differ"].values()) and not any(
        each["unexplained"] for each in part["variants"]
    )
    return f"exact: {'yes' if yes else 'NO'}, texts equal to plain decoding's: " + (
        ", ".join(words)
    )


def _row(part: dict[str, Any], size: Any) -> dict[str, Any]:
    return next(row for row in part["rows"] if row.get("num_draft") == size)


def _drafts_in_words(part: dict[str, Any] | None) -> str:
    if not part or not part.get("rows"):
        return "speed: not known"
    plain, best = _row(part, 0), _row(part, part["best"])
    return (
        f"fastest: K = {part['best']}, {interval(best)} times plain decoding's speed, "
        f"{best['tokens_per_second']:.0f} tokens/s instead of "
        f"{plain['tokens_per_second']:.0f} ({part['prompts']} sentences)"
    )


def _auto_in_words(part: dict[str, Any] | None) -> str:
    if not part or not part.get("rows"):
        return ""
    best, plain = (_ratio(part[f"auto_over_{name}"]) for name in ("best", "plain"))
    return f"auto: {best} times the speed of K = {part['best']}, {plain} of plain"


def _ratio(value: list[float | None]) -> str:
    ratio, low, high = value
    return f"{ratio:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _theirs_in_words(part: dict[str, Any] | None) -> str:
    if not part or not part.get("rows"):
        return ""
    if not part["torch"]:
        return "transformers: torch is not installed"
    theirs = part["theirs"]
    if not theirs:
        return f"transformers: {part.get('failed') or 'there was no time'}"
    return (
        f"{theirs['name']}: {interval(theirs)} times the speed of plain decoding here"
    )


def _shapes_in_words(part: dict[str, Any] | None) -> str:
    words = []
    for pair in (part or {}).get("pairs", ()):
        if pair.get("rows"):
            best = _row(pair, pair["best"])
            words.append(
                f"{pair['target']} {best['speedup']:.2f} with K = {pair['best']}, "
                f"{pair['auto_over_plain'][0]:.2f} with auto"
            )
        else:
            words.append(f"{pair['target']} left out")
    return f"simulated, alpha {part['alpha']:g}: {'; '.join(words)}" if words else ""


def _suite_in_words(part: dict[str, Any] | None) -> str:
    if not part:
        return "tests: not run"
    if not part["installed"]:
        return "tests: not installed: make test"
    counts = [len(part[name]) for name in ("passed", "failed", "skipped")]
    text = "tests: {} passed, {} failed, {} skipped".format(*counts)
    left = _unreached(part)
    if left is None:
        return "tests: none was reached in time: the same command begins with them"
    if not left:
        return text
    return (
        f"{text}, {left} were not reached in time: the same command goes on with them"
    )


def _unreached(part: dict[str, Any]) -> int | None:
    """How many tests were not; None where nobody knows how many there are."""
    if part["tests"] is None:
        return None
    reached = sum(len(part[name]) for name in ("passed", "failed", "skipped"))
    return max(0, part["tests"] - reached)


def _unexpected(report: dict[str, Any]) -> Iterator[str]:
    yield "## Unexpected, and what to do"
    yield ""
    found = findings(report)
    for each in found:
        yield f"- {cell(each.what)}. What to do: {each.todo}."
    if not found:
        yield "nothing"


def _machine(part: dict[str, Any]) -> Iterator[str]:
    words = {True: "yes", False: "no", None: "not known"}
    shown = {
        "device": f"{part['device']} ({part['kind']})",
        "chip": part["chip"],
        "cores": part["cores"],
        "memory": f"{part['memory'] / 1e9:.1f} GB",
        "system": part["os"],
        "macOS": part["macos"],
        "Python": f"{part['python']}, {part['processor']}",
        "Rosetta": words[part["rosetta"]],
        "MLX": part["mlx"],
        "BLAS": part["blas"] or "MLX's own",
        "torch": part["torch"] or "not installed",
        "transformers": part["transformers"],
        "power": part["power"] or "not known",
        "low power mode": words[part["low_power"]],
        "load before it began": f"{part['load']:.2f}",
        "variables": ", ".join(f"{k}={v}" for k, v in part["variables"].items())
        or "none",
        "git revision": part["revision"] or "not known",
        **{f"mx.device_info: {k}": v for k, v in part["mlx_device"].items()},
    }
    yield line(("", ""))
    yield "|---|---|"
    for name, value in shown.items():
        if value is not None:
            yield line((name, value))
    yield ""


def _exactness(part: dict[str, Any]) -> Iterator[str]:
    yield (
        "The bundled pair, greedily: with drafts, are texts the target's own? Where "
        "they are not, the margin says whether the two tokens were a tie: the "
        "difference of their logits in plain decoding, in epsilons of the largest "
        "logit. The last column is by how many of those a pass over 5 tokens differs "
        "at most from passes over one."
    )
    yield ""
    yield from table(
        part["variants"],
        [
            ("weights", lambda each: each["name"]),
            ("computed in", lambda each: each["computed"]),
            ("texts", lambda each: f"{each['texts']} of {part['wanted']}"),
            ("K = 4 differs", lambda each: each["differ"]["K = 4"]),
            ("auto differs", lambda each: each["differ"]["auto"]),
            ("ties", lambda each: each["ties"]),
            ("not explained by rounding", lambda each: each["unexplained"]),
            ("rounding", number("rounding", ".1f")),
        ],
    )
    if all(each["computed"] == "float32" for each in part["variants"]):
        yield _ON_CPU
        yield ""
    if not part["all"]:
        yield "There was no time for other dtypes."
        yield ""
    flips = [
        {"name": each["name"], **flip}
        for each in part["variants"]
        for flip in each["flips"]
    ]
    if flips:
        yield from table(
            flips,
            [
                ("weights", lambda flip: flip["name"]),
                ("with", lambda flip: flip["way"]),
                ("token", lambda flip: flip["place"]),
                ("margin", number("margin", ".3g")),
                ("in roundings", number("roundings", ".2f")),
                (
                    "",
                    lambda flip: (
                        "a tie in this dtype's rounding"
                        if flip["tie"]
                        else "NOT EXPLAINED BY ROUNDING"
                    ),
                ),
                ("prompt", lambda flip: flip["prompt"]),
            ],
        )


def _curve(part: dict[str, Any]) -> Iterator[str]:
    yield (
        "Rounds of the bundled pair with K draft tokens, in plain rounds. v is the "
        "target's pass over K + 1 tokens, c a step of the draft."
    )
    yield ""
    yield from table(
        part["rows"],
        [
            ("K", lambda row: row["num_draft"]),
            ("ms", number("ms", ".2f")),
            ("half of all", lambda row: f"{row['low']:.2f} to {row['high']:.2f}"),
            ("cost", number("cost", ".2f")),
            ("v", number("v", ".2f")),
            ("c", number("c", ".3f")),
            (
                "pays from alpha",
                lambda row: (
                    "never"
                    if row["num_draft"] and row["break_even"] is None
                    else number("break_even", ".2f")(row)
                ),
            ),
        ],
    )
    for step in part["steps"]:
        rows = step["rows"]
        yield (
            f"There is a step from {rows} to {rows + 1} tokens in a pass: "
            f"{step['more']:.2f} plain passes more. K = {rows - 1} is the last before "
            "it."
        )
    if not part["steps"]:
        yield "The curve has no step."
    each = ", ".join(f"{alpha}: K = {k}" for alpha, k in part["suggests"].items())
    yield f"The fastest K by these costs, by the acceptance rate: {each}."
    if part["restless"]:
        yield "Even plain rounds differed much: the machine was busy."
    yield f"From {part['sweeps']} sweeps."
    yield ""


def _speeds(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from table(
        rows,
        [
            ("", lambda row: row["name"]),
            ("speed-up", interval),
            ("tokens/s", number("tokens_per_second", ".1f")),
            ("per pass", number("tokens_per_round", ".2f")),
            ("mean K", number("mean_draft", ".1f")),
            ("alpha", number("alpha", ".2f")),
            ("same text", lambda row: row.get("equal")),
        ],
    )


def _speed(part: dict[str, Any]) -> Iterator[str]:
    yield (
        f"The bundled pair, {part['prompts']} sentences, every line in turn, with 95 % "
        "intervals over sentences. auto knew nothing before."
    )
    yield ""
    yield from _speeds(part["rows"])
    theirs = part["theirs"]
    if theirs:
        yield f"Beside plain decoding, {theirs['prompts']} sentences:"
        yield ""
        yield from _speeds([theirs])
    else:
        yield f"{_theirs_in_words(part)}."
        yield ""


def _compiled(part: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Compiled passes beside those that are not, {part['prompts']} sentences, "
        "every line in turn; shapes had been traced before."
    )
    yield ""
    yield from table(
        part["rows"],
        [
            ("", lambda row: row["name"]),
            ("speed-up", interval),
            ("same text", lambda row: row["equal"]),
        ],
    )
    verdict = "faster" if part["faster"] else "not much faster"
    yield f"They are {verdict} here: " + (
        f"--compile auto is {'on' if part['faster'] else 'off'} on this machine from "
        "now on."
        if part["used"]
        else "on a CPU --compile auto is off, as the first passes take seconds."
    )
    yield ""


def _shapes(part: dict[str, Any]) -> Iterator[str]:
    yield (
        "SIMULATED: random weights in these shapes; a draft token is right with "
        f"probability {part['alpha']:g}."
    )
    yield ""
    for pair in part["pairs"]:
        yield f"**{pair['target']} with {pair['draft']}**, {pair['bytes'] / 1e9:.1f} GB"
        yield ""
        if pair.get("rows"):
            yield f"{pair['prompts']} prompts, {pair['tokens']} tokens each:"
            yield ""
            yield from _speeds(pair["rows"])
        else:
            yield f"Left out: {pair['left_out']}."
            yield ""


def _suite(part: dict[str, Any]) -> Iterator[str]:
    yield f"{_suite_in_words(part)}."
    if not part["installed"]:
        yield f"Missing: {', '.join(part['missing'])}."
    yield ""
    if part.get("failed"):
        yield from table(
            [{"id": name, "why": why} for name, why in part["failed"].items()],
            [("failed", lambda row: row["id"]), ("why", lambda row: row["why"])],
        )
    if part.get("said"):
        yield from _quoted(part["said"])
        yield ""


def _memory(report: dict[str, Any]) -> Iterator[str]:
    parts = _parts(report)
    yield from table(
        entries(parts),
        [
            ("", lambda each: f"{each['section']}: {each['name']}"),
            ("weights, MB", megabytes("weights")),
            ("MLX at most, MB", megabytes("peak")),
        ],
    )
    processes = [
        {"name": name, **part["footprint"]}
        for name, part in parts.items()
        if part.get("footprint")
    ]
    yield from table(
        processes,
        [
            ("process of", lambda each: each["name"]),
            ("resident at most, MB", megabytes("resident")),
        ],
    )


def _sections(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        {"name": name, **report["sections"][name]}
        for name in SECTIONS
        if name in report["sections"]
    ]
    yield from table(
        rows,
        [
            ("", lambda row: row["name"]),
            ("", lambda row: "" if row["status"] == DONE else row["status"]),
            ("seconds", number("seconds", ".0f")),
        ],
    )
    yield f"Written {report['written']}."
    yield ""


def _quoted(text: str) -> Iterator[str]:
    """As it is, whatever is in it."""
    for each in text.split("\n"):
        yield f"    {each}"


#: Section by section, what shows its result.
_SHOWN: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "machine": _machine,
    "exactness": _exactness,
    "curve": _curve,
    "speed": _speed,
    "compiled": _compiled,
    "shapes": _shapes,
    "suite": _suite,
}
