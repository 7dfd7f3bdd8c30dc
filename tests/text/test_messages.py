"""Conversations as other clients send them."""

import pytest

from pair import Pair
from system.errors import PromptError
from text.messages import last_text, read_prompt


def user(content):
    return {"role": "user", "content": content}


def test_parts_are_joined():
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "dog"}]
    assert read_prompt([user(parts)]) == [user("A dog")]
    assert read_prompt("A dog") == "A dog"
    assert last_text(read_prompt([user("x"), user(parts)])) == "A dog"


def test_what_is_the_templates():
    """Roles, other fields, and an assistant who said nothing."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    tool = {"role": "tool", "content": "3", "name": "f"}
    other = {"role": "critic", "content": ""}
    given = ({"role": "system", "content": ""}, user("?"), call, tool, other)
    read = read_prompt(given)
    assert read == [*given[:2], call | {"content": ""}, tool, other]
    assert call["content"] is None


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "no messages"),
        (None, "no NoneType"),
        (b"x", "no bytes"),
        (["x"], "message 1 is a str"),
        ([user("x"), {"content": "x"}], "message 2 has no role"),
        ([{"role": 3, "content": "x"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1, the user's, has no content"),
        ([user(None)], "has no content"),
        ([user(3)], "neither a text nor a list of parts, but a int"),
        ([user([{"type": "image_url", "image_url": {}}])], "of type 'image_url'"),
        ([user(["x"])], "part of type 'str'"),
        ([user([{"text": "x"}])], "part of type 'None'"),
        ([user([{"type": "text"}])], "without a text"),
        ([user("x") | {"more": {1}}], "no JSON does"),
    ],
)
def test_what_is_no_conversation(prompt, message):
    with pytest.raises(PromptError, match=message):
        read_prompt(prompt)


def test_in_a_pair(make):
    """At once; what is to be answered must not be empty, what was said before may."""
    pair = Pair.load(str(make()[2]))
    with pytest.raises(PromptError, match="no messages"):
        pair.samples([], 1)
    with pytest.raises(PromptError, match="part of type 'image'"):
        pair.defaults([user([{"type": "image"}])])
    for last in (user(" "), user([])):
        (answer,) = pair.samples([user("x"), last], 1)
        with pytest.raises(PromptError, match="prompt is empty"):
            answer.finish()
    (answer,) = pair.samples([user("\udcff"), user("x")], 1)
    with pytest.raises(PromptError, match="the user's message is not valid UTF-8"):
        answer.finish()
