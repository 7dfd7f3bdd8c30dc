"""Conversations as clients send them, made into what chat templates take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from system.errors import PromptError

Messages: TypeAlias = list[dict[str, Any]]


def read_prompt(prompt: Any) -> "str | Messages":
    """A text as it is, or a conversation whose contents are texts.

    A content may be a list of parts of type "text", which are joined. An assistant may
    have said nothing (None, as where it called a tool). Whatever else a message holds
    is the template's, and so are the names of roles.

    Raises:
        PromptError: it is neither, or a message lacks what it needs.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptError(
            f"a prompt is a text or a list of messages, and no {type(prompt).__name__}"
        )
    if not prompt:
        raise PromptError("the conversation has no messages")
    messages = [_message(each, n) for n, each in enumerate(prompt, 1)]
    try:
        json.dumps(messages)  # as they go to whatever reads the template
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"a message holds what no JSON does: {error}") from None
    return messages


def last_text(prompt: "str | Messages") -> str:
    """What is to be answered."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _message(message: Any, number: int) -> dict[str, Any]:
    which = f"message {number}"
    if not isinstance(message, Mapping):
        raise PromptError(
            f"{which} is a {type(message).__name__}: a message has a role and a content"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{which} has no role (system, user, assistant or tool)")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if content is None:
        raise PromptError(f"{which}, the {role}'s, has no content")
    return {**message, "content": _text(content, which)}


def _text(content: Any, which: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(
            f"{which} has a content that is neither a text nor a list of parts, but a "
            f"{type(content).__name__}"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part, Mapping):
            raise PromptError(
                f"{which} has a part of type '{kind}': only text can be answered here"
            )
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{which} has a part of type 'text' without a text")
        texts.append(part["text"])
    return "".join(texts)
