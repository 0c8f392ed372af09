"""What counts as a prompt, in one place: services and commands refuse the rest before anything is started."""

from __future__ import annotations

import re

MAX_PROMPT_CHARACTERS = 2_000


def check_prompt(prompt: str) -> str:
    """The prompt with runs of white space made one space.

    Raises:
        ValueError: it is empty or longer than MAX_PROMPT_CHARACTERS.
    """
    cleaned = re.sub(r"\s+", " ", prompt).strip()
    if not cleaned:
        raise ValueError("prompt: is empty")
    if len(cleaned) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"prompt: {len(cleaned)} characters, at most {MAX_PROMPT_CHARACTERS} are read")
    return cleaned
