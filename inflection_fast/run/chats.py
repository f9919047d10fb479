"""Conversations: checked, compared as plain text, and rendered by the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inflection_fast.run.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inflection_fast.run.files import Rows

__all__ = ["Render", "plain_text", "rendered", "template_of"]

Message = dict[str, Any]
Render = Callable[[list[Message]], str]


def template_of(tokenizer: PreTrainedTokenizerBase, model: str) -> Render:
    """The function that renders a conversation as the model was tuned on it. UserError if there is no template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"model {model}: its tokenizer has no chat template, which data.messages needs: give a model that was tuned"
            " on chats, or plain text as data.text"
        )
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


def plain_text(rows: Rows, column: str) -> list[str | None]:
    """Each conversation as lines "role: content", to find equal ones; None for one without content."""
    found: list[str | None] = []
    for row, messages in enumerate(rows.columns[column]):
        if messages is not None:
            error = _error_in(messages)
            if error:
                raise UserError(f"{rows.source}, {rows.where([row])}: column {column!r}: {error}")
        lines = [f"{message['role']}: {message.get('content') or ''}" for message in messages or ()]
        found.append("\n".join(lines) if any(message.get("content") for message in messages or ()) else None)
    return found


def rendered(rows: Rows, conversations: list[list[Message]], render: Render) -> list[str]:
    """The conversations of `rows` as text. UserError with the row of one that the template refuses."""
    from jinja2 import TemplateError

    found = []
    for row, messages in enumerate(conversations):
        try:
            found.append(render([{key: value for key, value in one.items() if value is not None} for one in messages]))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"{rows.source}, {rows.where([row])}: the model's chat template refuses it: {error}"
            ) from error
    return found


def _error_in(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"expected a list of messages, got {type(messages).__name__}"
    for message in messages:
        if not isinstance(message, dict):
            return f"expected messages with role and content, got {type(message).__name__}"
        if "from" in message and "value" in message:
            return "a message has from and value: name them role and content, and the roles user and assistant"
        if not isinstance(message.get("role"), str):
            return "a message has no role"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"the content of a message is {type(content).__name__}, not text"
    return None
