"""Prompts to measure with, and what to compare the answers with."""

import json
from itertools import islice
from pathlib import Path

from system.errors import InputError


def read_prompts(path: Path, limit: int | None) -> dict[str, list[str]]:
    """The prompts of a file, each once, with what it has of references.

    A line is a prompt, or a prompt, a tab and a reference, or a JSON object with
    "prompt" and maybe "reference", one or a list of them.

    Raises:
        InputError: the file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, _, given = line.partition("\t")
        if line.startswith("{"):
            try:
                value = json.loads(line)
                prompt, given = value["prompt"], value.get("reference")
            except (ValueError, KeyError, TypeError):
                prompt = None
        if not isinstance(prompt, str):
            raise InputError(f'{path}, line {number}: no JSON object with "prompt"')
        if not prompt.strip():
            raise InputError(f"{path}, line {number}: an empty prompt")
        references = given if isinstance(given, list) else [given] if given else []
        if not all(isinstance(each, str) for each in references):
            raise InputError(f"{path}, line {number}: a reference that is no text")
        prompts.setdefault(prompt, []).extend(references)
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return dict(islice(prompts.items(), limit))
