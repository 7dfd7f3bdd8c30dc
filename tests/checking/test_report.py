"""check-report.md, made of canned results: what it says, and what is unexpected."""

import pytest
from canned import report, row, variant

from checking.findings import findings
from checking.report import markdown, summary
from checking.tables import line


def changed(section, **fields):
    value = report()
    value["sections"][section]["result"] |= fields
    return value


def ended(section, status, result=None, **fields):
    value = report()
    value["sections"][section] |= {"status": status, "result": result, **fields}
    return value


def in_variant(number, **fields):
    value = report()
    value["sections"]["exactness"]["result"]["variants"][number] |= fields
    return value


def in_pair(**fields):
    value = report()
    value["sections"]["shapes"]["result"]["pairs"][0] |= fields
    return value


def test_the_summary_of_a_machine_that_is_fine():
    assert summary(report()) == [
        "- machine: AMD EPYC, cpu, 16 GB; Linux-6.1, Python 3.11.7, MLX 0.32.4",
        "- exact: yes, texts equal to plain decoding's: 400 of 400 in float32, 400 of "
        "400 in bfloat16, 400 of 400 in float16, 400 of 400 in 8 bits, 400 of 400 in "
        "4 bits",
        "- fastest: K = 5, 2.00 (1.90 to 2.10) times plain decoding's speed, 100 "
        "tokens/s instead of 50 (40 sentences)",
        "- auto: 0.98 (0.95 to 1.01) times the speed of K = 5, 1.95 (1.85 to 2.05) of "
        "plain",
        "- transformers, cpu: 0.40 (0.30 to 0.50) times the speed of plain decoding "
        "here",
        "- simulated, alpha 0.75: t5-base 2.00 with K = 5, 1.95 with auto",
        "- tests: 2 passed, 0 failed, 1 skipped",
        "- unexpected: nothing; --quick, 187 s",
    ]


def test_the_whole_of_it():
    text = markdown(report())
    assert text.startswith(
        "# Check report: T5 with speculative decoding in MLX\n\n- machine: AMD EPYC"
    )
    assert "## Unexpected, and what to do\n\nnothing\n" in text
    for part in (
        "| git revision | 0123456789ab |",
        "| mx.device_info: architecture | x86_64 |",
        "| float32 | float32 | 200 of 200 | 0 | 0 | 0 | 0 | 8.5 |",
        "On a CPU all weights become float32",
        "| 3 | 13.00 | 12.00 to 14.00 | 1.30 | 1.15 | 0.050 | 0.30 |",
        "The curve has no step.",
        "by the acceptance rate: 0.6: K = 2, 0.75: K = 4, 0.9: K = 8.",
        "| num-draft 5 | 2.00 (1.90 to 2.10) | 100.0 | 2.00 |  | 0.80 | 40 |",
        "Beside plain decoding, 20 sentences:",
        "SIMULATED: random weights",
        "| exactness: bfloat16 | 59 | 62 |",
        "| shapes: t5-base with t5-small | 1,130 | 1,200 |",
        "| process of | resident at most, MB |",
        "| suite | 220 |",
        "Open an issue with both files, `check-report.md` and `check-report.json`.",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "value, what, todo",
    [
        (
            in_variant(0, differ={"K = 4": 2, "auto": 1}, ties=2, unexplained=1),
            "not exact in float32: 3 texts of 200 prompts differ from plain "
            "decoding's, 1 of them by more than rounding explains",
            "please report it, with both files",
        ),
        (
            in_variant(1, differ={"K = 4": 2, "auto": 0}, ties=1, unexplained=1),
            "bfloat16: of the texts 1 differ from plain decoding's where rounding does",
            "please report it",
        ),
        (
            in_variant(0, texts=199),
            "exactness ran out of time: float32 had 199 of 200 sentences",
            "close other programs",
        ),
        (
            in_variant(2, rounding=51.0),
            "float16: logits of a pass over several tokens are 51 roundings from",
            "please report it",
        ),
        (
            changed("suite", failed={"test_a.py::test_c": "assert 1 == 2"}),
            "of the tests 1 failed: test_a.py::test_c",
            "the reasons are below",
        ),
        (
            changed("suite", said="ImportError: no"),
            "the test suite did not run",
            "please report it",
        ),
        (
            ended("curve", "crashed", signal="SIGABRT", stderr=["one", "libc++abi"]),
            "curve crashed (SIGABRT); its last line was: libc++abi",
            "please report it",
        ),
        (
            ended("shapes", "crashed", {}, signal="SIGKILL", stderr=[]),
            "shapes crashed (SIGKILL, as the system does where memory is short); its "
            "last line was: nothing; what it had found out by then is below",
            "please report it",
        ),
        (
            ended("speed", "hung", stderr=["Loading"]),
            "speed did not end in its time, and was ended; its last line was: Loading",
            "nothing else at work",
        ),
        (
            ended("speed", "failed", exit=2, stderr=["check.py: no memory"]),
            "speed failed (exit 2); its last line was: check.py: no memory",
            "please report it",
        ),
        (
            ended("suite", "interrupted"),
            "suite was interrupted",
            "the same command goes on from it",
        ),
        (
            ended("suite", "left out"),
            "suite was left out: there was no time",
            "run the same command again",
        ),
        (
            changed("machine", rosetta=True),
            "this Python is an Intel one, translated by Rosetta",
            "a Python for arm64",
        ),
        (
            changed("machine", macos="15.1", mlx="0.32.0"),
            "MLX is 0.32.0: before 0.32.1",
            "pip install --upgrade mlx",
        ),
        (
            changed("machine", load=1.5),
            "the machine was busy with other things: 1.5 processes were at work on 2",
            "close other programs",
        ),
        (
            changed("curve", restless=True),
            "the machine was busy with other things: even plain rounds differed much",
            "close other programs",
        ),
        (changed("machine", power="battery"), "it ran on battery", "plug it in"),
        (changed("machine", low_power=True), "low power mode is on", "turn low power"),
        (
            changed("speed", rows=[row(0, 1.0), row(5, 0.9)]),
            "the bundled pair: no number of draft tokens is faster than plain decoding "
            "(K = 5: 0.90 times its speed)",
            "--regular-decode",
        ),
        (
            changed("speed", auto_over_best=[0.9, 0.86, 0.94]),
            "the bundled pair: auto has 0.90 (0.86 to 0.94) times the speed of K = 5",
            "until then --num-draft 5 is faster",
        ),
        (
            changed("speed", auto_over_plain=[0.95, 0.93, 0.97]),
            "the bundled pair: auto has 0.95 (0.93 to 0.97) times the speed of plain",
            "until then use --regular-decode",
        ),
        (
            changed(
                "compiled",
                rows=[{"name": "num-draft 4", "speedup": 1.1, "equal": 38}],
            ),
            "compiled passes, num-draft 4: 2 of 40 texts are others in float32",
            "--compile off",
        ),
        (
            in_pair(auto_over_best=[0.9, 0.86, 0.94]),
            "t5-base with t5-small: auto has 0.90",
            "--num-draft 5",
        ),
        (
            in_pair(rows=None, left_out="it needs 9 GB"),
            "t5-base with t5-small was left out: it needs 9 GB",
            "a larger or a faster machine",
        ),
        (
            changed("curve", steps=[{"rows": 5, "more": 0.61}]),
            "a pass over 6 tokens costs 0.61 plain passes more than one over 5",
            "K = 4 is the last before it",
        ),
        (
            changed("curve", steps=[{"rows": 1, "more": 0.61}]),
            "a pass over 2 tokens costs 0.61 plain passes more than one over 1",
            "any draft pays for that step",
        ),
        (
            in_variant(3, peak=300_000_001),
            "8 bits: MLX had 300 MB at most, where 300 MB were expected",
            "please report it",
        ),
    ],
)
def test_what_is_unexpected(value, what, todo):
    """Each is found, alone, and the report says it."""
    (found,) = findings(value)
    assert found.what.startswith(what)
    assert todo in found.todo
    assert f"- {found.what}. What to do: {found.todo}." in markdown(value)
    assert "- unexpected: 1; --quick, 187 s" in summary(value)


@pytest.mark.parametrize(
    "value",
    [
        changed("machine", macos="15.1", mlx="0.32.1"),
        changed("machine", macos="15.1", mlx="0.33.0"),
        changed("machine", mlx="0.32.0"),  # on Linux
        changed("machine", power="mains", low_power=False, load=0.8),
        changed("speed", auto_over_best=[0.9, 0.86, 0.95]),  # within the interval
        changed("speed", auto_over_best=[0.9, None, None]),  # from too few sentences
        changed("speed", auto_over_plain=[0.95, 0.9, 0.98]),
        in_variant(1, differ={"K = 4": 2, "auto": 0}, ties=2),
        in_variant(1, rounding=None),
        in_variant(1, texts=50),
        in_variant(1, peak=300_000_000),
    ],
)
def test_what_is_not(value):
    assert findings(value) == []


def test_ties_are_told_and_what_is_none_shouts():
    flip = {"way": "auto", "prompt": "a | b", "place": 3, "tokens": [5, 6]}
    flips = [
        {**flip, "margin": 0.01, "roundings": 1.25, "tie": True},
        {**flip, "margin": None, "roundings": None, "tie": False},
    ]
    value = in_variant(
        1, computed="bfloat16", differ={"K = 4": 0, "auto": 2}, ties=1, unexplained=1
    )
    value["sections"]["exactness"]["result"]["variants"][1]["flips"] = flips
    text = markdown(value)
    assert (
        "| bfloat16 | auto | 3 | 0.01 | 1.25 | a tie in this dtype's rounding | "
        "a \\| b |" in text
    )
    assert "| bfloat16 | auto | 3 |  |  | NOT EXPLAINED BY ROUNDING | a \\| b |" in text
    assert "398 of 400 in bfloat16 (1 not explained by rounding)" in text
    assert "exact: NO" in text
    assert "On a CPU" not in text


def test_ties_alone_are_exact():
    value = in_variant(1, differ={"K = 4": 0, "auto": 2}, ties=2)
    assert "exact: yes" in summary(value)[1]
    assert "398 of 400 in bfloat16 (the others are ties in its" in summary(value)[1]
    first = in_variant(0, differ={"K = 4": 0, "auto": 1}, ties=1)
    assert "exact: NO" in summary(first)[1]  # no tie is one in float32


def test_without_torch():
    value = changed("speed", torch=False, theirs=None)
    assert "- transformers: torch is not installed" in summary(value)
    assert "\ntransformers: torch is not installed.\n" in markdown(value)


@pytest.mark.parametrize("why", [None, "RuntimeError: no such device"])
def test_without_transformers_figures(why):
    value = changed("speed", theirs=None, failed=why)
    assert f"- transformers: {why or 'there was no time'}" in summary(value)
    assert f"\ntransformers: {why or 'there was no time'}.\n" in markdown(value)


def test_without_the_tests_requirements():
    value = report()
    suite = {"installed": False, "missing": ["pytest", "torch"]}
    value["sections"]["suite"]["result"] = suite
    assert "- tests: not installed: make test" in summary(value)
    assert "Missing: pytest, torch." in markdown(value)


def test_tests_that_were_not_reached():
    value = changed("suite", complete=False, tests=10)
    words = "1 skipped, 7 were not reached in time: the same command goes on with them"
    assert words in "".join(summary(value))
    none = changed("suite", complete=False, tests=None)
    assert "tests: none was reached in time" in "".join(summary(none))


def test_failed_tests_are_named_with_their_reasons():
    value = changed("suite", failed={"t.py::test[a|b]": "assert 1\n == 2"})
    assert "| t.py::test[a\\|b] | assert 1 == 2 |" in markdown(value)


def test_a_section_that_crashed_has_its_last_lines():
    text = markdown(ended("speed", "crashed", signal="SIGSEGV", stderr=["a", "b | c"]))
    assert (
        "## Speed\n\nNothing: crashed.\n\nIts last lines:\n\n    a\n    b | c\n" in text
    )
    assert "| speed | crashed | 20 |" in text


def test_what_a_section_had_found_out_is_shown():
    half = {"wanted": 200, "all": False, "variants": [variant("float32")]}
    text = markdown(ended("exactness", "hung", half, stderr=[]))
    assert "There was no time for other dtypes." in text
    assert (
        "exact: yes, texts equal to plain decoding's: 400 of 400 in float32\n" in text
    )


@pytest.mark.parametrize("name", list(report()["sections"]))
def test_any_section_may_be_missing(name):
    value = report()
    del value["sections"][name]
    assert f"## {name.capitalize()}" not in markdown(value)
    value = ended(name, "failed", exit=1, stderr=["oh"])
    assert f"## {name.capitalize()}\n\nNothing: failed." in markdown(value)


def test_a_cell_ends_no_line():
    assert line(["a\n|b", None, 3]) == "| a \\|b |  | 3 |"


@pytest.mark.parametrize(
    "faster, used, said",
    [
        (True, True, "faster here: --compile auto is on on this machine from now on"),
        (False, True, "not much faster here: --compile auto is off on this machine"),
        (True, False, "faster here: on a CPU --compile auto is off"),
    ],
)
def test_whether_compiled_passes_are_faster(faster, used, said):
    assert f"They are {said}" in markdown(changed("compiled", faster=faster, used=used))
