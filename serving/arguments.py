"""The flags of serve.py."""

import os
from argparse import Namespace
from ipaddress import ip_address

from console.arguments import read_batch_size
from console.choosing import NO_DRAFT, add_loading
from pair import LOOKUP, MOST_ROWS
from system.errors import InputError, Parser

NAME = "serve.py"
DESCRIPTION = "Answer requests in OpenAI's shape, several at a time."
#: Where the key is, if no flag names it: flags are shown to all users of a machine.
KEY = "SERVE_API_KEY"

_WAITING = 256
_MOST_TOKENS, _MOST_PROMPT = 2048, 4096
_GRACE = 30.0
#: No number has to be larger.
_MOST = 1_000_000


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags, read.

    Raises:
        InputError: they are odd, or do not go together.
    """
    parser = Parser(prog=NAME, description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="target, as main.py has it (default: t5-11b with t5-small where both are "
        "converted, else the bundled pair)",
    )
    add(
        "--draft-model",
        metavar="NAME",
        help=f"draft, likewise; '{LOOKUP}', or '{NO_DRAFT}' for the target alone",
    )
    add(
        "--lookup",
        action="store_true",
        help="look words up in the prompt and the text before the draft model is asked",
    )
    add_loading(add)
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default: %(default)s, for this machine alone)",
    )
    add(
        "--port",
        type=int,
        default=8080,
        metavar="N",
        help="likewise; 0 for any that is free (default: %(default)s)",
    )
    add(
        "--max-batch",
        type=read_batch_size,
        metavar="N|auto",
        help="the most texts that are decoded at once (default: auto, as many as the "
        f"memory has room for, up to {MOST_ROWS})",
    )
    add(
        "--max-queue",
        type=int,
        default=_WAITING,
        metavar="N",
        help="texts that may wait; who comes then is told to come again (default: "
        "%(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=_MOST_TOKENS,
        metavar="N",
        help="the most tokens that a request may ask for (default: %(default)s)",
    )
    add(
        "--max-prompt",
        type=int,
        default=_MOST_PROMPT,
        metavar="N",
        help="the most tokens that a prompt may have (default: %(default)s)",
    )
    add(
        "--api-key",
        metavar="KEY",
        help=f"what clients have to know (default: ${KEY}, if it is set)",
    )
    add(
        "--no-api-key",
        action="store_true",
        help="let anybody in who can reach a --host that is not this machine alone",
    )
    add(
        "--grace",
        type=float,
        default=_GRACE,
        metavar="SECONDS",
        help="after Ctrl-C or SIGTERM, how long running requests may take to finish "
        "(default: %(default)g)",
    )
    add("--verbose", action="store_true", help="say what is asked for, line by line")
    read = parser.parse_args(arguments)
    if read.api_key is None and not read.no_api_key:
        read.api_key = os.environ.get(KEY) or None
    _check(read)
    return read


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check(arguments: Namespace) -> None:
    least = {"port": 0, "max_queue": 0, "max_tokens": 1, "max_prompt": 1, "grace": 0}
    for name, number in least.items():
        value = getattr(arguments, name)
        if not number <= value <= _MOST:  # NaN is neither
            raise InputError(
                f"--{name.replace('_', '-')} is {value}: it has to be a number, at "
                f"least {number} and at most {_MOST:,}"
            )
    if arguments.port > 65535:
        raise InputError(f"--port is {arguments.port}: the largest is 65535")
    if not arguments.host:
        raise InputError("--host is empty: name an address")
    key = arguments.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.split()):
        raise InputError("the key has to be printable ASCII characters, at least one")
    if key and key != key.strip():
        raise InputError("the key begins or ends with a space")
    if key and arguments.no_api_key:
        raise InputError("--api-key does not go with --no-api-key")
    if arguments.lookup and arguments.draft_model == NO_DRAFT:
        raise InputError("--lookup drafts: it does not go with the target alone")
    if not (key or arguments.no_api_key or is_loopback(arguments.host)):
        raise InputError(
            f"--host {arguments.host} can be reached from elsewhere: give an "
            "--api-key, or --no-api-key if anybody may use it"
        )
