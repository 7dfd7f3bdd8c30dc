"""Generate text with T5, several tokens per pass of the large model.

    python main.py --model t5-11b --draft-model t5-small --prompt TEXT

A small draft model proposes tokens and the large target model checks them all at once:
the text is what the target alone would write. Text goes to stdout, all else to stderr.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from system.errors import (
    InputError,
    Parser,
    PromptError,
    blame_prompt,
    one_line,
    run,
    say,
)

# What takes time to import is imported inside functions, so that Ctrl-C is clean from
# the first moment on.
if TYPE_CHECKING:
    from decoder import Stats
    from pair import Generation, Pair
    from speculation.sampling import Sampling
    from text.messages import Messages

EXAMPLE_TASK = "translate English to German: "
EXAMPLE = EXAMPLE_TASK + "The children are playing in the garden."
DEFAULT_DRAFT = "t5-small"
BUNDLED = tuple(
    Path(__file__).resolve().parent / "demo" / n for n in ("target", "draft")
)
NO_DRAFT = "none"
NAME = "main.py"

_DRAFTED, _RESET = "\x1b[32m", "\x1b[0m"  # green


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    from decoder import DELTA, MAX_TOKENS, NUM_DRAFT
    from pair import LOOKUP

    parser = Parser(prog=NAME, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="target: a converted T5's folder, or its name in models/; or a "
        "decoder-only model, a folder or a name on the hub "
        "(default: t5-11b with t5-small where both are converted, else the bundled "
        "pair)",
    )
    add(
        "--draft-model",
        metavar="NAME",
        help=f"draft, likewise; '{LOOKUP}' drafts, without a model, what followed the "
        f"same words before; '{NO_DRAFT}' for the target alone (default: t5-small, "
        f"where it is converted and has the target's tokenizer, else {LOOKUP})",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="what to answer; '-' for standard input, a prompt a line: one that cannot "
        "be answered is named, the others are, and the exit status is 2 (default: an "
        "example)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"write at most N tokens (default: {MAX_TOKENS})",
    )
    add(
        "--num-draft",
        type=int,
        metavar="N",
        default=NUM_DRAFT,
        help="draft tokens per round; 0 for the target alone (default: %(default)s)",
    )
    add(
        "--delta",
        type=float,
        metavar="D",
        default=DELTA,
        help="relaxed acceptance: 0 is exactly the target's text, 1 whatever the draft "
        "proposes (default: %(default)s)",
    )
    sampling = parser.add_argument_group("sampling")
    _add_sampling(sampling.add_argument)
    add("--regular-decode", action="store_true", help="decode with the target alone")
    add(
        "--interactive",
        action="store_true",
        help="ask for prompts, with line editing and history",
    )
    add(
        "--compare",
        action="store_true",
        help="then decode with the target alone too, and say how much longer it took",
    )
    add(
        "--task-defaults",
        action="store_true",
        help="apply what the model's files ask for: penalties, lengths, sampling, and "
        "T5's own for prompts like 'summarize: ...'; flags that are given hold",
    )
    add(
        "--unverified",
        action="store_true",
        help="take decoder-only models whose text nobody has compared with "
        "transformers', too",
    )
    add("--chat", action="store_true", help="apply the model's chat template")
    add(
        "--system",
        metavar="TEXT",
        help="with --chat: what the conversation begins with",
    )
    add(
        "--keep-turns",
        type=int,
        metavar="N",
        help="with --chat --interactive: drop the oldest turns of a conversation that "
        "has become too long, but not the last N",
    )
    add(
        "--keep-special",
        action="store_true",
        help="show special tokens like <extra_id_0> in the text",
    )
    add("--color", action="store_true", help="show the draft's tokens in green")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add(
        "--separator",
        metavar="TEXT",
        help=r"print TEXT after each answer; \n, \t and \0 are what they are in C "
        r"(default: \n)",
    )
    add("--verbose", action="store_true", help="say more about models and rounds")
    return parser.parse_args(arguments)


def _add_sampling(add: Callable[..., Any]) -> None:
    """The flags of how tokens are chosen, under the names of transformers."""
    from speculation.sampling import GREEDY

    def option(name: str, kind: type, metavar: str, text: str) -> None:
        default = getattr(GREEDY, name.replace("-", "_"))
        add(f"--{name}", type=kind, metavar=metavar, help=text.format(default))

    option(
        "temperature",
        float,
        "T",
        "0 takes the most probable token; 1 samples the model's own distribution, less "
        "is bolder (default: {:g})",
    )
    option("top-k", int, "K", "sample among the K most probable tokens (0: all)")
    option(
        "top-p",
        float,
        "P",
        "sample among the most probable tokens that together reach P (1: all)",
    )
    option(
        "min-p", float, "P", "leave out tokens below P times the best one's probability"
    )
    option("seed", int, "S", "the same seed gives the same text (default: {})")
    add(
        "--num-samples",
        type=int,
        metavar="N",
        default=1,
        help="answer each prompt N times, together, a line each",
    )
    option(
        "repetition-penalty",
        float,
        "X",
        "above 1: tokens that occurred become less probable (1: off)",
    )
    option("no-repeat-ngram-size", int, "N", "no N tokens occur twice (0: off)")
    option(
        "encoder-no-repeat-ngram-size", int, "N", "no N tokens of the prompt (0: off)"
    )
    add(
        "--bad-words",
        nargs="+",
        metavar="TEXT",
        help="words that are never written in the tokens that the tokenizer has for "
        "them",
    )
    option("min-new-tokens", int, "N", "no end before N tokens")
    add(
        "--suppress-tokens",
        type=int,
        nargs="+",
        metavar="ID",
        help="ids that are never chosen",
    )
    option("forced-bos-token-id", int, "ID", "the id of the first token")


def read_given(arguments: Namespace) -> dict[str, Any]:
    """The options of how tokens are chosen that flags were given for."""
    from dataclasses import fields

    from speculation.sampling import Sampling

    names = {"max_tokens", *(field.name for field in fields(Sampling))}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if "suppress_tokens" in given:
        given["suppress_tokens"] = tuple(given["suppress_tokens"])
    return given


def read_sampling(options: Mapping[str, Any], num_samples: int) -> "Sampling":
    """How tokens are chosen.

    Raises:
        InputError: an option is out of range, or they do not go together.
    """
    from speculation.sampling import Sampling

    if num_samples < 1:
        raise InputError(f"num-samples is {num_samples}: it has to be at least 1")
    sampling = Sampling(**{k: v for k, v in options.items() if k != "max_tokens"})
    if sampling.greedy and num_samples > 1:
        raise InputError(
            "at temperature 0 all samples are the same: give a --temperature above 0"
        )
    return sampling


class Rules:
    """How each prompt is answered: as the flags say, and with --task-defaults as the
    model's files ask for. What they ask for is said, once."""

    def __init__(self, arguments: Namespace, pair: "Pair"):
        self._pair = pair
        self._applied = arguments.task_defaults
        self._num_samples = arguments.num_samples
        self._given = read_given(arguments)
        self._said: set[str] = set()
        if arguments.bad_words:
            self._given["bad_words_ids"] = _word_ids(pair, arguments.bad_words)

    def of(self, prompt: "str | Messages") -> tuple["Sampling", int]:
        """How tokens are chosen, and the most that may be.

        Raises:
            PromptError: the prompt cannot be read.
            InputError: the rules are odd, or do not go together.
        """
        from checkpoints.defaults import DefaultsError
        from decoder import MAX_TOKENS

        options = {"max_tokens": MAX_TOKENS}
        try:
            asked = self._pair.defaults(prompt, self._given)
        except DefaultsError as error:
            if self._applied:
                raise
            self._say(f"{error}: what the model asks for is not known")
        else:
            for line in asked.lines(self._applied):
                self._say(line)
            if self._applied:
                options |= asked.options
                options["max_tokens"] = asked.max_tokens or MAX_TOKENS
        options |= self._given
        sampling = read_sampling(options, self._num_samples)
        # Of no prompt in particular: said before one is answered.
        sampling.chain(self._pair.target.vocabulary, self._pair.eos_tokens)
        return sampling, options["max_tokens"]

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(one_line(line))


def _word_ids(pair: "Pair", words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the start of a text and after a space."""
    from pair import require_text

    found = []
    for word in words:
        if not word.strip():
            raise InputError("a bad word is empty")
        require_text(word, "a bad word")
        for text in (word, f" {word}"):
            tokens = tuple(pair.tokenizer.encode_word(text))
            if not tokens or (len(tokens) == 1 and tokens[0] in pair.eos_tokens):
                raise InputError(
                    f"the bad word '{word}' has no token that could be banned"
                )
            found.append(tokens)
    return tuple(dict.fromkeys(found))


def load_pair(arguments: Namespace) -> "Pair":
    """Load the models that the flags ask for, or those they leave open."""
    from pair import Pair, find

    plain = arguments.regular_decode or arguments.num_draft == 0
    model, draft = arguments.model, arguments.draft_model
    if model is None:
        model, default_draft = _default_models()
        draft = draft or default_draft
        if Path(model) == BUNDLED[0]:
            say("using the bundled pair: English to German, sentences of up to 8 words")
        else:
            say(f"using {model}" + (f" with {draft}" if not plain else ""))
    pair_of = partial(Pair.load, unverified=arguments.unverified)
    if plain or draft == NO_DRAFT:
        pair = pair_of(model)
    elif draft:
        pair = pair_of(model, draft)
    else:
        model = str(find(model, arguments.unverified))  # once: it may ask the hub
        pair = _load_with_default_draft(model, pair_of)
    if not pair.batches:
        say(
            "not verified: nobody has compared this model's text with transformers'; "
            "samples are decoded one after another"
        )
    return pair


def _default_models() -> tuple[str, str]:
    from checkpoints.converted import MODELS, WEIGHTS

    converted = MODELS / "t5-11b", MODELS / DEFAULT_DRAFT
    for target, draft in (converted, BUNDLED):
        if (target / WEIGHTS).is_file() and (draft / WEIGHTS).is_file():
            return str(target), str(draft)
    raise InputError(
        "no model is converted yet: convert two (python convert.py --model t5-11b, "
        "then --model t5-small), or name a converted one with --model"
    )


def _load_with_default_draft(model: str, pair_of: Callable[..., "Pair"]) -> "Pair":
    """The target with the converted t5-small, where that has the same tokenizer."""
    from checkpoints.converted import MODELS, WEIGHTS
    from pair import LOOKUP, DifferentTokenizersError

    draft = MODELS / DEFAULT_DRAFT
    why = "no draft model"
    if (draft / WEIGHTS).is_file() and Path(model).resolve() != draft.resolve():
        try:
            pair = pair_of(model, str(draft))
        except DifferentTokenizersError:
            why = f"{DEFAULT_DRAFT} is no draft for this tokenizer"
        else:
            say(f"drafting with {DEFAULT_DRAFT}")
            return pair
    pair = pair_of(model, LOOKUP)
    say(f"{why}: drafting by prompt lookup (see --draft-model)")
    return pair


def read_prompts(prompt: str | None) -> Iterator[tuple[int | None, str]]:
    """The prompts to answer, as they come in, each with the line that it is of standard
    input.

    Raises:
        InputError: that begins as UTF-16 does.
    """
    if prompt != "-":
        yield None, EXAMPLE if prompt is None else prompt
        return
    from console.interactive import check_start, open_input

    open_input()
    for number, line in enumerate(sys.stdin, 1):
        if number == 1:
            check_start(line)
        if line.strip():
            yield number, line.rstrip("\r\n")


def read_separator(text: str | None) -> str:
    """What goes after each answer.

    Raises:
        InputError: nothing, or what is no text.
    """
    if text is None:
        return "\n"
    if not text:
        raise InputError("the separator is empty; a NUL is written '\\0', in quotes")
    from pair import require_text

    require_text(text, "the separator")
    escapes = {"n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([nt0\\])", lambda found: escapes[found[1]], text)


def write_text(answer: "Generation", color: bool, separator: str) -> None:
    """Stream the text to stdout, the draft's tokens in green if ``color``.

    Interrupted, what is out stays, on a line of its own.
    """
    green = started = False
    try:
        for piece in answer:
            if color and piece.drafted != green:
                green = piece.drafted
                print(_DRAFTED if green else _RESET, end="")
            print(piece.text, end="", flush=True)
            started = True
    except BaseException:
        if started:
            print(_RESET if green else "", flush=True)
        raise
    print(_RESET if green else "", end=separator, flush=True)


def write_json(answer: "Generation", sample: int | None) -> None:
    """One object on stdout, with the keys that the README lists."""
    answer.finish()
    value = {
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.as_dict(),
    }
    if sample is not None:
        value["sample"] = sample
    text = json.dumps(value, ensure_ascii=False)
    # Some readers take these for the end of a line.
    for separator in "\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):x}")
    print(text, flush=True)


def report(stats: "Stats", verbose: bool) -> None:
    """The figures of a prompt's answers, in a block that a person reads."""
    say("")
    rounds = f"{stats.new_tokens} tokens in {stats.rounds} target passes"
    say(f"{rounds} ({stats.tokens_per_round:.2f} per pass)")
    if stats.alpha is not None:
        judged = f"{stats.accepted} of {stats.tested} judged"
        say(
            f"draft: {judged} stood (alpha {stats.alpha:.2f}), {stats.drafted} proposed"
        )
    say(
        f"time: {stats.encode_seconds:.3f} s encoding, {stats.decode_seconds:.3f} s "
        f"decoding ({stats.tokens_per_second:.1f} tokens/s)"
    )
    say(f"memory: {stats.peak_memory_bytes / 1e6:.0f} MB at most")
    if verbose:
        say(f"rounds by draft tokens committed: {stats.accept_histogram}")


def compare(
    answer: Callable[[int], list["Generation"]],
    num_draft: int,
    forget: Callable[[], None],
) -> None:
    """Say by how much drafting is faster here, encoding included.

    Decodes with and without in turn: once each, oftener while that takes no second.
    Sampled texts differ in length, so it is the time per token that is compared.

    Args:
        answer: begins the answers to the prompt, with that many draft tokens.
        num_draft: how many to compare with none.
        forget: drops what is cached of the answer before.
    """
    from statistics import median
    from time import perf_counter

    import mlx.core as mx

    began = perf_counter()
    seconds: dict[int, list[float]] = {num_draft: [], 0: []}
    texts, tokens = {}, {}
    while not texts or (perf_counter() - began < 1 and len(seconds[0]) < 15):
        for drafts, its in seconds.items():
            mx.synchronize()  # a GPU may still be at what the run before queued
            forget()
            start = perf_counter()
            done = [one.finish() for one in answer(drafts)]
            its.append(perf_counter() - start)
            texts[drafts] = [one.text for one in done]
            tokens[drafts] = sum(len(one.tokens) for one in done)
    fast, plain = median(seconds[num_draft]), median(seconds[0])
    if texts[num_draft] == texts[0]:
        what, unit = "the same text", "s"
    else:
        fast, plain = fast / tokens[num_draft] * 1e3, plain / tokens[0] * 1e3
        what, unit = "another text", "ms a token"
    say(
        f"compared: {plain / fast:.2f} times as fast as the target alone "
        f"({fast:.3f} {unit} against {plain:.3f} {unit}), {what}"
    )


def _describe_machine() -> None:
    import mlx.core as mx

    from system import fast_blas

    blas = f", BLAS {fast_blas.library}" if fast_blas.library else ""
    say(f"MLX {mx.__version__} on {mx.default_device()}{blas}")


class Writer:
    """Answers on stdout, as the flags ask for them."""

    def __init__(self, arguments: Namespace):
        self._json = arguments.json
        self._separator = read_separator(arguments.separator)
        terminal = sys.stdout.isatty()
        self._color = arguments.color and terminal and "NO_COLOR" not in os.environ
        # Whether a reader has to tell where an answer ends, and has only lines for it.
        self._lines = (
            not arguments.json
            and arguments.separator is None
            and (
                arguments.num_samples > 1
                or arguments.prompt == "-"
                or (arguments.interactive and not terminal)
            )
        )

    def __call__(self, answers: list["Generation"]) -> None:
        """
        Raises:
            PromptError: they cannot be made.
        """
        for sample, one in enumerate(answers):
            with blame_prompt():
                if self._json:
                    write_json(one, sample if len(answers) > 1 else None)
                else:
                    write_text(one, self._color, self._separator)
            if self._lines and one.text and one.text.splitlines() != [one.text]:
                self._lines = False  # once is enough
                say(
                    "an answer has line breaks of its own: --json or --separator TEXT "
                    "show where the next one begins"
                )


def check_flags(arguments: Namespace) -> None:
    """
    Raises:
        InputError: they do not go together.
    """
    if arguments.interactive and (arguments.prompt is not None or arguments.compare):
        raise InputError("--interactive goes with neither --prompt nor --compare")
    if arguments.compare and (
        arguments.regular_decode
        or arguments.num_draft == 0
        or arguments.draft_model == NO_DRAFT
    ):
        raise InputError("--compare needs a draft to compare with the target alone")
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system needs --chat")
    if arguments.keep_turns is not None:
        if not (arguments.chat and arguments.interactive):
            raise InputError("--keep-turns needs --chat --interactive")
        if arguments.keep_turns < 0:
            raise InputError(
                f"keep-turns is {arguments.keep_turns}: it has to be at least 0"
            )
    if arguments.json and arguments.separator is not None:
        raise InputError("--separator is for texts: --json has an object a line")


def read_system(pair: "Pair", chat: bool, text: str | None) -> "Messages":
    """The messages that every conversation begins with.

    Raises:
        InputError: there is no chat template, or it has no place for the system's.
    """
    from pair import require_text

    if chat:
        pair.tokenizer.require_chat()
    if text is None:
        return []
    require_text(text, "the system's message")
    system = [{"role": "system", "content": text}]
    try:
        pair.tokenizer.encode_chat([*system, {"role": "user", "content": "?"}])
    except PromptError as error:
        raise InputError(f"--system does not go with this model: {error}") from None
    return system


def main() -> int:
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    arguments = parse_arguments()
    from decoder import MAX_TOKENS, Stats, check_options

    check_flags(arguments)
    write = Writer(arguments)
    most = MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    check_options(most, arguments.num_draft, arguments.delta)
    # What the files ask for is known later, and may make these go together.
    if not arguments.task_defaults:
        read_sampling(read_given(arguments), arguments.num_samples)

    from system import fast_blas

    if fast_blas.hint:
        say(fast_blas.hint)
    if arguments.verbose:
        _describe_machine()
    pair = load_pair(arguments)
    rules = Rules(arguments, pair)
    system = read_system(pair, arguments.chat, arguments.system)

    def answer(
        stream: int,
        prompt: str,
        num_draft: int = arguments.num_draft,
        before: "Sequence[dict[str, Any]]" = system,
    ) -> list["Generation"]:
        chat = [*before, {"role": "user", "content": prompt}]
        question = chat if arguments.chat else prompt
        sampling, most = rules.of(question)
        return pair.samples(
            question,
            arguments.num_samples,
            max_tokens=most,
            num_draft=num_draft,
            delta=arguments.delta,
            sampling=sampling,
            stream=stream,
            keep_special=arguments.keep_special,
        )

    def figures(answers: list["Generation"]) -> None:
        report(Stats.of_batch([one.stats for one in answers]), arguments.verbose)

    if arguments.interactive:
        from console.interactive import converse

        bundled = pair.folder.resolve() == BUNDLED[0]
        number = count()  # asked again, a prompt has another answer
        converse(
            lambda prompt, before: answer(next(number), prompt, before=before),
            write,
            figures,
            prefix=EXAMPLE_TASK if bundled else "",
            chat=arguments.chat,
            system=system,
            keep_turns=arguments.keep_turns,
        )
        return 0
    status = 0
    for number, (line, prompt) in enumerate(read_prompts(arguments.prompt)):
        if arguments.prompt in (None, "-") and sys.stderr.isatty():
            # Bytes that were not UTF-8 are shown escaped; the answer names them.
            say("> " + prompt.encode("utf-8", "backslashreplace").decode())
        try:
            answers = answer(number, prompt)
            write(answers)
        except PromptError as error:
            if line is None:
                raise
            say(f"{NAME}: line {line}: {one_line(str(error))}")
            status = 2
            continue
        if not arguments.json or arguments.verbose:
            figures(answers)
        if arguments.compare:
            compare(partial(answer, number, prompt), arguments.num_draft, pair.forget)
    return status


if __name__ == "__main__":
    sys.exit(run(main, NAME))
