"""Thinking blocks: what a model thinks before it speaks is rationale, never an answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

_NAME = r"(?:\w{1,20}:)?(?:think|thinking|thought|thoughts|reason|reasoning|reflection|scratchpad|analysis|inner_monologue)"
MARK = re.compile(
    rf"<(?P<close>/)?{_NAME}>|<\|(?P<close_bar>/|end_of_|end_|END_)?(?:begin_of_|start_of_|begin_|start_|START_)?{_NAME}(?P<end_bar>_end)?\|>"
    r"|\[(?P<close_bracket>/)?THINK\]|◁(?P<close_kimi>/)?think▷",
    re.IGNORECASE,
)
"""The tags of models and prompts; a tokenizer's own (`[THINK]`, `<|begin_of_thought|>`) are of the same shapes."""
_CLOSING = {"<|begin_": "<|end_", "<|start_": "<|end_"}


def _closes(mark: re.Match[str]) -> bool:
    return any(mark.groupdict().values())


def speech_start(text: str) -> int | None:
    """Where the model begins to speak: after its last thinking block; None while a block is open.

    A lone closing mark ends a block that the prompt has opened.
    """
    start, opened = 0, False
    for mark in MARK.finditer(text):
        opened = not _closes(mark)
        start = mark.end()
    return None if opened else start


def open_mark(text: str) -> str | None:
    """The mark of the block that is open at the end of `text`, or None."""
    last = None
    for last in MARK.finditer(text):  # noqa: B007
        pass
    return None if last is None or _closes(last) else last[0]


def closing_mark(mark: str) -> str:
    """`</think>` for `<think>`, `<|end_of_thought|>` for `<|begin_of_thought|>`, `[/THINK]` for `[THINK]`."""
    for begin, end in _CLOSING.items():
        if mark.lower().startswith(begin):
            return (end.upper() if mark[2:].isupper() else end) + mark[len(begin) :]
    edge = 2 if mark.startswith("<|") else 1
    return f"{mark[:edge]}/{mark[edge:]}"


def without_marks(text: str) -> str:
    """The text with its thinking marks taken out, what was thought left in."""
    return MARK.sub(" ", text)


@functools.lru_cache(maxsize=8)
def silent_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are no text: the tokenizer's special tokens, but not those that open or close a thinking block."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return frozenset(i for i in special if not MARK.fullmatch(str(tokenizer.convert_ids_to_tokens(i))))


def opened_by(prompt_ids: Sequence[int], tokenizer: Any) -> str:
    """The thinking mark that the prompt ends with, as the chat templates of some thinking models do; else the empty string."""
    end = str(tokenizer.decode(list(prompt_ids[-16:]))).rstrip()
    mark = open_mark(end)
    return mark if mark is not None and end.endswith(mark) else ""


def closing_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids that close the thinking block which is open at the end of `text`; none where none is."""
    mark = open_mark(text)
    return () if mark is None else tuple(tokenizer.encode(f"\n{closing_mark(mark)}\n", add_special_tokens=False))


def said(token_ids: Sequence[int], prompt_ids: Sequence[int], tokenizer: Any) -> str:
    """A completion's text: its tokens without the special ones, after the thinking mark that its prompt may have opened."""
    silent = silent_ids(tokenizer)
    mark = opened_by(prompt_ids, tokenizer)
    text = str(tokenizer.decode([i for i in token_ids if i not in silent]))
    return f"{mark}\n{text}" if mark else text
