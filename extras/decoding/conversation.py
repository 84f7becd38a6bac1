"""A conversation on the terminal: the whole of it stands in front of each answer.

In:  a chat model, lines that a person types. Out: the model's answers.
Knows nothing of how an answer is made.
"""

import sys
from collections.abc import Callable

from core.errors import UserError


def converse(generator, answer: Callable[[list[dict]], str]) -> None:
    """Turn by turn on the terminal, until an empty line or the end of the input.

    Args:
        answer: messages -> the reply, which it has printed.
    """
    if not generator.chat_format:
        raise UserError("--chat needs a chat model", "python sft.py makes one")
    messages: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        try:
            reply = answer(messages)
        except UserError as e:
            print(f"{e}; the conversation starts anew", file=sys.stderr)
            messages = []
            continue
        # An empty answer would not be a valid turn.
        messages.append({"role": "assistant", "content": reply}) if reply else messages.pop()
