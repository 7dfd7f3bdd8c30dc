"""The flags of main.py."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any

from console.choosing import NO_DRAFT, add_loading
from pair import DATA, LOOKUP, MOST_ROWS, TENSOR
from speculation.beams import NEVER, Beams
from speculation.requests import DELTA, MAX_TOKENS
from speculation.sampling import COUPLINGS, GREEDY, RESIDUAL, SHARED
from system.errors import InputError, Parser

NAME = "main.py"
MOST_BATCH = 4096
DESCRIPTION = "Generate text with T5, several tokens per pass of the large model."


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags, read.

    Raises:
        InputError: they are odd.
    """
    parser = Parser(prog=NAME, description=DESCRIPTION)
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
        "--input",
        metavar="FILE",
        help="answer a file, several prompts at once: one a line, or JSON lines with "
        "'prompt'; '-' for standard input",
    )
    add(
        "--output",
        metavar="FILE",
        help="with --input: where the answers go, a line each, in order (default: '-', "
        "standard output)",
    )
    add(
        "--batch-size",
        type=read_batch_size,
        metavar="N|auto",
        help="with --input: the most prompts at once (default: auto, as many as the "
        f"memory has room for, up to {MOST_ROWS})",
    )
    add(
        "--resume",
        action="store_true",
        help="with --input and --output: go on after the last line that was answered",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"write at most N tokens (default: {MAX_TOKENS})",
    )
    add(
        "--num-draft",
        type=_num_draft,
        metavar="N|auto",
        help="draft tokens per round; 0 for the target alone (default: auto, as many "
        "as pay, and none where none do)",
    )
    add(
        "--lookup",
        action="store_true",
        help="where the last words occurred before, in the prompt or the text, take "
        "what followed them, and ask the draft model elsewhere",
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
    beams = parser.add_argument_group("beam search")
    _add_beams(beams.add_argument)
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
        help="apply what the model's files ask for: penalties, lengths, sampling, "
        "beams, and T5's own for prompts like 'summarize: ...'; flags that are given "
        "hold",
    )
    add_loading(add)
    add(
        "--parallel",
        choices=(TENSOR, DATA),
        help=f"what several processes do that a launcher began together: {TENSOR}, "
        f"each holds a part of the target; {DATA}, with --input, each holds the models "
        f"and answers some of the lines (default: {TENSOR})",
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
        "leaves no room for --max-tokens, but not the last N",
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
    option(
        "seed",
        int,
        "S",
        "the same seed gives the same text, with any draft and --num-draft; with a "
        f"--delta above 0, or --coupling {RESIDUAL}, at the same ones alone",
    )
    add(
        "--coupling",
        choices=COUPLINGS,
        help=f"{SHARED}: draft and target choose with the same random numbers, and the "
        f"text is what the target samples alone; {RESIDUAL}: each draws for itself, "
        f"and a little more of the draft stands (default: {SHARED} with --seed and a "
        f"--delta of 0, else {RESIDUAL})",
    )
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


def _add_beams(add: Callable[..., Any]) -> None:
    """The flags of a beam search, under the names of transformers; None where they are
    not given."""
    usual = Beams(1)
    add(
        "--num-beams",
        type=int,
        metavar="N",
        help="of the N most probable texts so far keep on with all, and take the best "
        f"that ends (default: {usual.num_beams}, no search)",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="compare them by their log-probability over the power X of their length: "
        f"above 0 longer ones gain (default: {usual.length_penalty:g})",
    )
    add(
        "--early-stopping",
        type=_early_stopping,
        nargs="?",
        const=True,
        metavar=f"true|false|{NEVER}",
        help="true ends as soon as N have ended, false where no better one is likely, "
        f"{NEVER} where none can come any more (default: false; alone: true)",
    )
    add(
        "--num-return-sequences",
        type=int,
        metavar="M",
        help="answer each prompt with the M best, a line each (default: 1)",
    )


def _early_stopping(text: str) -> bool | str:
    """``true`` and ``false`` as what they are."""
    if text not in ("true", "false", NEVER):
        raise ArgumentTypeError(f"'{text}' is neither true, false nor {NEVER}")
    return text if text == NEVER else text == "true"


def _num_draft(text: str) -> int | None:
    """``5`` as a number; None for ``auto``."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is neither auto nor a number") from None


def read_batch_size(text: str) -> int | None:
    """``8`` as a number; None for ``auto``."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= MOST_BATCH):
        raise ArgumentTypeError(
            f"'{text}' is neither auto nor a number from 1 to {MOST_BATCH}"
        )
    return int(text)


def check_flags(arguments: Namespace) -> None:
    """
    Raises:
        InputError: they do not go together.
    """
    if arguments.interactive and (arguments.prompt is not None or arguments.compare):
        raise InputError("--interactive goes with neither --prompt nor --compare")
    if arguments.input is None:
        for name in ("output", "batch_size", "resume"):
            if getattr(arguments, name):
                raise InputError(f"--{name.replace('_', '-')} needs --input")
        if arguments.parallel == DATA:
            raise InputError(f"--parallel {DATA} needs --input, lines to share")
    else:
        for name in ("prompt", "interactive", "compare", "color", "separator"):
            if getattr(arguments, name):
                raise InputError(f"--input does not go with --{name}")
        for name in ("input", "output"):
            if getattr(arguments, name) == "":
                raise InputError(f"--{name} is empty: name a file")
        if arguments.num_samples != 1:
            raise InputError("--input has an answer a line: no --num-samples")
        if arguments.num_return_sequences not in (None, 1):
            raise InputError("--input has an answer a line: no --num-return-sequences")
        if arguments.resume and arguments.output in (None, "-"):
            raise InputError("--resume needs --output, a file")
    alone = (
        arguments.regular_decode
        or arguments.num_draft == 0
        or arguments.draft_model == NO_DRAFT
    )
    if arguments.compare and alone:
        raise InputError("--compare needs a draft to compare with the target alone")
    if arguments.lookup and alone:
        raise InputError("--lookup drafts: it does not go with the target alone")
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
