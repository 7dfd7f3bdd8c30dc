"""What a request's body may say, in OpenAI's names and this program's own.

What would change the answer and is not done here is refused by its name; what has no
bearing on the text is passed over.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from console.rules import OPTIONS, SEQUENCES, Texts, check_given
from pair import require_text
from speculation.requests import DELTA, check_options
from system.errors import InputError, PromptError, one_line
from text.messages import Messages, read_prompt

#: Prompts of a request, texts of each, stop strings, and characters of those.
_MOST_PROMPTS, _MOST_TEXTS, _MOST_STOPS, _LONGEST_STOP = 256, 128, 16, 1000
_LARGEST = 2**31 - 1

_Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
_Number = float | None
_Texts = Annotated[int, Meta(ge=1, le=_MOST_TEXTS)]
_Stop = Annotated[str, Meta(min_length=1, max_length=_LONGEST_STOP)]
_Word = Annotated[str, Meta(max_length=256)]
_Stops = Annotated[list[_Stop], Meta(max_length=_MOST_STOPS)]

#: What may be said, and is not acted on: it does not touch the text.
_IDLE = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
#: What is refused unless it says that nothing is wanted.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "lookup": (None,),
}
_INSTEAD = {
    "presence_penalty": "; repetition_penalty is there",
    "frequency_penalty": "; repetition_penalty is there",
    "logit_bias": "; suppress_tokens and bad_words are there",
    "lookup": ": it is a flag of serve.py",
}


class RefusedError(Exception):
    """A request is not answered.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: what programs know it by.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": one_line(str(self)),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


class _StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that both kinds of request have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: _Texts | None = None
    stop: _Stop | _Stops | None = None
    seed: int | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=_LARGEST)] | None = None
    temperature: _Number = None
    top_p: _Number = None
    # Main.py's flags.
    num_draft: _Count | None = None
    delta: _Number = None
    top_k: _Count | None = None
    min_p: _Number = None
    coupling: str | None = None
    repetition_penalty: _Number = None
    no_repeat_ngram_size: _Count | None = None
    encoder_no_repeat_ngram_size: _Count | None = None
    min_new_tokens: _Count | None = None
    bad_words: Annotated[list[_Word], Meta(max_length=256)] | None = None
    suppress_tokens: Annotated[list[_Count], Meta(max_length=10_000)] | None = None
    forced_bos_token_id: _Count | None = None
    num_beams: _Count | None = None
    length_penalty: _Number = None
    early_stopping: bool | str | None = None
    num_return_sequences: _Texts | None = None
    task_defaults: bool | None = None
    keep_special: bool | None = None
    show_drafted: bool | None = None


class _Completion(_Body, kw_only=True):
    prompt: str | Annotated[list[str], Meta(min_length=1, max_length=_MOST_PROMPTS)]
    best_of: int | None = None


class _Chat(_Body, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=_LARGEST)] | None = None


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        chat: whether it is a conversation.
        model: the name it gives; None for whatever is there.
        prompts: one or more.
        count: texts of each, and ``counted``, the name that asks for them.
        given: of :data:`rules.OPTIONS` those that it names.
        stops: strings that end a text.
        num_draft, delta, bad_words, task_defaults, keep_special: main.py's flags.
        stream, usage: whether it is sent bit by bit, and then how long it was.
        show_drafted: whether to say what the draft wrote.
    """

    chat: bool
    model: str | None
    prompts: "list[str | Messages]"
    count: int = 1
    given: dict[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    num_draft: int | None = None
    delta: float = DELTA
    bad_words: tuple[str, ...] = ()
    task_defaults: bool = False
    keep_special: bool = False
    stream: bool = False
    usage: bool = False
    show_drafted: bool = False
    counted: str = "n"

    @property
    def texts(self) -> int:
        """How many there are to be."""
        return self.count * len(self.prompts)

    @property
    def width(self) -> int:
        """How many texts' room each prompt takes: a search that of its beams."""
        return max(self.count, self.given.get("num_beams", 1))

    @property
    def room(self) -> int:
        """How many texts' room all of it takes."""
        return self.width * len(self.prompts)


def read(raw: bytes, chat: bool) -> Asked:
    """What a body asks for.

    Raises:
        RefusedError: it is no such body, or asks for what there is not.
    """
    value = _decode(raw)
    for name, neutral in _REFUSED.items():
        if name in value and not _is_one_of(value.pop(name), neutral):
            instead = _INSTEAD.get(name, "")
            raise RefusedError(
                400, f"{name} is not supported here{instead}", param=name
            )
    for name in _IDLE:
        value.pop(name, None)
    try:
        body = msgspec.convert(value, _Chat if chat else _Completion)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _invalid(str(error), _Chat if chat else _Completion) from None
    try:
        return _asked(body, chat)
    except InputError as error:
        raise blamed(error, chat) from None


def blamed(error: InputError, chat: bool) -> RefusedError:
    """What a client is told of an error that it caused.

    Messages begin with the option that is wrong.
    """
    name = re.match(r"[\w-]+", str(error))
    name = name[0].replace("-", "_") if name else ""
    if "bad word" in str(error):
        name = "bad_words"
    known = name in (_Chat if chat else _Completion).__struct_fields__
    prompt = "messages" if chat else "prompt"
    param = prompt if isinstance(error, PromptError) else None
    return RefusedError(400, str(error), param=name if known else param)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        half = " (half of a surrogate pair, as it seems)" if b"\\ud" in raw else ""
        raise RefusedError(400, f"the body is no JSON{half}: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError(400, "the body has to be a JSON object")
    return value


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 is False to Python, but not to a person.
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in neutral
    )


def _invalid(message: str, kind: type[_Body]) -> RefusedError:
    """Of msgspec's words: what is wrong ... - at `$.place`."""
    what, _, place = message.partition(" - at `$")
    name = re.match(r"\.(\w+)", place)
    unknown = re.search(r"unknown field `(.*)`$|required field `(.*)`$", what, re.S)
    if unknown and not place:
        name = unknown[1] or unknown[2]
        if unknown[1]:
            known = ", ".join(kind.__struct_fields__)
            what = f"{name!r} is not known here; there is: {known}"
        else:
            what = f"{name} is missing"
        return RefusedError(400, what, param=name)
    param = name[1] if name else None
    at = place.strip("`.")
    return RefusedError(400, f"{at}: {what}" if at else what, param=param)


def _asked(body: "_Completion | _Chat", chat: bool) -> Asked:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for stop in stops:
        require_text(stop, "stop")
    given = {
        name: value
        for name in OPTIONS & set(body.__struct_fields__)
        if (value := getattr(body, name)) is not None
    }
    if chat:
        if body.max_completion_tokens is not None:
            given["max_tokens"] = body.max_completion_tokens
        prompts = [read_prompt(body.messages)]
    else:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if body.best_of not in (None, body.n or 1):
            raise InputError("best_of is not supported here: it has to be n")
    if given.get("temperature") == 0:  # of the most probable token they leave nothing
        given = {k: v for k, v in given.items() if k not in ("top_k", "top_p", "min_p")}
    delta = DELTA if body.delta is None else body.delta
    check_options(given.get("max_tokens", 1), body.num_draft or 0, delta)
    texts = _texts(body.n, body.num_return_sequences)
    check_given(given, texts, delta, bool(body.task_defaults))
    if body.stream_options and not body.stream:
        raise InputError("stream_options need stream")
    usage = body.stream_options and body.stream_options.include_usage
    return Asked(
        chat=chat,
        model=body.model,
        prompts=prompts,
        count=texts.count,
        given=given,
        stops=tuple(stops),
        num_draft=body.num_draft,
        delta=delta,
        bad_words=tuple(body.bad_words or ()),
        task_defaults=bool(body.task_defaults),
        keep_special=bool(body.keep_special),
        stream=bool(body.stream),
        usage=bool(usage),
        show_drafted=bool(body.show_drafted),
        counted=texts.name,
    )


def _texts(n: int | None, sequences: int | None) -> Texts:
    """How many texts of a prompt, and what asks for them."""
    if sequences is None:
        return Texts(n or 1, "n")
    if n not in (None, sequences):
        raise InputError(
            f"n is {n} and num_return_sequences {sequences}: they have to be the same"
        )
    return Texts(sequences, SEQUENCES if n is None else "n")
