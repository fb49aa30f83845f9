"""Whether two answers in words or formulas are one, however they are set."""

from __future__ import annotations

import re

from emreason.questions.grammar.numbers import same_number
from emreason.questions.grammar.typeset import DEPTH, normalise, unwrapped


def same_string(answer: str, gold: str) -> bool:
    said, right = bare(answer), bare(gold)
    formula = not re.search(r"[^\W\d_]{2}", re.sub(r"\\[a-z]+", "", right))  # words may not be set otherwise
    both = said + right  # plain, 3.1 and 3.10 may be versions, and (1,234) a pair
    number = bool(re.search(r"[\\/%°{]", both)) and not re.search(r"[(\[]", both) and same_number(said, right)
    return (said == right or number or (formula and _formula(said) == _formula(right))) and not asks(answer, gold)


def _formula(text: str) -> str:
    r"""A formula without what only sets it: `\dfrac`, `\left`, thin spaces, blanks beside marks, commas in a number, `(a)` for `a`."""
    text = re.sub(r"\\!\s?", "", text)
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+", text):
        return text.replace(",", "")
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s?([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s?([0-9a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\^(?:\{\\circ\}|\\circ)|°", "°", text)
    text = re.sub(r"\\[,;: ]", " ", re.sub(r"\\(?:left|right)(?![a-z])", "", text))
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text


def asks(answer: str, gold: str) -> bool:
    """Whether an answer only asks: "Paris?"."""
    return _unmarked(answer).endswith("?") and not _unmarked(gold).endswith("?")


def _unmarked(text: str) -> str:
    return unwrapped(text).rstrip("*_`\"')]$ ")


def bare(text: str) -> str:
    """A string without wrappers, case and closing marks, whichever of them is outside."""
    for _ in range(DEPTH):
        text, before = normalise(unwrapped(text)), text
        if text == before:
            break
    return text
