"""Typesetting: what surrounds or dresses a value without changing it (LaTeX, tags, quotes, emphasis, Unicode's many spaces and marks)."""

from __future__ import annotations

import html
import re
import unicodedata

_ALIKE = {
    **dict.fromkeys("‘’‚‛′´`ʼ＇", "'"),
    **dict.fromkeys("“”„‟«»″＂", '"'),
    **dict.fromkeys("‐‑‒–−﹣－", "-"),
    **dict.fromkeys("【「『〔《〈⟨", "("),
    **dict.fromkeys("】」』〕》〉⟩", ")"),
    **dict.fromkeys("⁄∕", "/"),
    "。": ".",
    "…": ".",
}
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_RAISED = re.compile(f"[{SUPERSCRIPTS}]+")
_RAISE = str.maketrans(SUPERSCRIPTS, "0123456789-+")
_GROUPED = re.compile(r"(?<=[0-9])[\u00a0\u2007\u2008\u2009\u202f](?=[0-9]{3}(?![0-9]))")

_DRESS = (
    r"text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mathbb|mathcal|bm|boldsymbol|bf|rm|it|mbox|hbox|"
    r"boxed|fbox|emph|underline|operatorname|displaystyle|textstyle|left|right|bigl|bigr|Bigl|Bigr|big|Big|large|Large|boldmath"
)
_LATEX = (
    (re.compile(r"(?<=[0-9])\\(?:[td]?frac)\s{0,3}(?=\{?[0-9])"), r" \\frac"),  # a mixed number
    (re.compile(r"\\[td]?frac\s{0,3}\{([^{}]{1,40})\}\s{0,3}\{([^{}]{1,40})\}"), r"\1/\2"),
    (re.compile(r"\\[td]?frac\s{0,3}([0-9])\s{0,3}([0-9])"), r"\1/\2"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,; ]|~)(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\^?\{?\\(?:circ|degree)\b\}?"), "°"),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\\(?:approx|sim|simeq)\b"), "≈"),
    (re.compile(rf"\\(?:{_DRESS})(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:q?quad\b|[,;: ])|(?<=[\w{}])~"), " "),
    (re.compile(r"\\([%$&#_])"), r"\1"),
    (re.compile(r"\\\\(?![A-Za-z])"), " "),
    (re.compile(r"\\[()\[\]!]|[{}]"), ""),
)
_POINTERS = re.compile("[\u2705\u2714\u2713\u2611\u2192\u27a1\ufe0f\u00a0]|\U0001f449")
_ANGLED = re.compile(r"<([A-Z]|[-+]?[0-9][0-9.,]{0,20})>")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,60}>|<\|[^<>|]{1,40}\|>")


class _View(dict[int, str]):
    """A character's plain, lower-case form where that is one character; invisible ones are spaces. Positions stay what they were."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = _ALIKE.get(char) or unicodedata.normalize("NFKC", char).lower()
        if char != "\n" and (plain.isspace() or unicodedata.category(char) == "Cf"):
            plain = " "
        self[code] = plain if len(plain) == 1 else char
        return self[code]


_VIEW = _View()
_LIKE = str.maketrans(_ALIKE)


def view(text: str) -> str:
    """`text` in lower case with quotes, dashes, spaces and wide forms made alike, of the same length."""
    return text.translate(_VIEW)


def folded(text: str) -> str:
    """NFKC with quotes, dashes and brackets made alike; superscripts become `^2`, ½ becomes ` 1/2`, invisible characters nothing."""
    if text.isascii():
        return text
    text = _GROUPED.sub(",", _RAISED.sub(lambda m: "^" + m[0].translate(_RAISE), text))
    pieces = []
    for char in text:
        if char.isascii() or unicodedata.category(char) == "Cf":
            pieces.append(char if char.isascii() else "")
        else:
            wide = unicodedata.normalize("NFKC", char)
            pieces.append(f" {wide.replace(chr(0x2044), '/')}" if unicodedata.category(char) == "No" and chr(0x2044) in wide else char)
    return unicodedata.normalize("NFKC", "".join(pieces).translate(_LIKE)).translate(_LIKE)


def undressed(text: str) -> str:
    """One line without LaTeX's dress, tags and entities; emphasis, quotes, brackets and `$` stay, for they may be part of the value."""
    text = folded(text)
    if "&" in text:
        text = html.unescape(text)
    if "</" not in text:
        text = _ANGLED.sub(r"(\1)", text)
    text = _TAG.sub("", text)
    if "\\" in text or "{" in text or "}" in text or "~" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    return _POINTERS.sub(" ", text)


def braced(text: str, begin: int, limit: int = 1000) -> int | None:
    """Where the brace closes that is open before `begin`; None if it does not within `limit` characters."""
    depth = 1
    for i in range(begin, min(len(text), begin + limit)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if not depth:
                return i
    return None


DEPTH = 8
"""Wrappers within wrappers at most: time stays linear."""
_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), *((mark, mark) for mark in ("**", "__", "$$", "`", "*", "_", "$", '"', "'")))
_COMMAND = re.compile(rf"\\(?:{_DRESS})\s{{0,3}}\{{")
_OPEN_TAG = re.compile(r"<([A-Za-z][A-Za-z0-9_]{0,20})>")


def unwrapped(text: str) -> str:
    """Text without the wrappers that go around the whole of it: emphasis, quotes, `$…$`, `\\text{…}`, a tag."""
    text = text.strip()
    for _ in range(DEPTH):
        inner = _inner(text).strip()
        if not inner or inner == text:
            break
        text = inner
    return text


def _inner(text: str) -> str:
    if (command := _COMMAND.match(text)) and braced(text, command.end(), len(text)) == len(text) - 1:
        return text[command.end() : -1]
    if (tag := _OPEN_TAG.match(text)) and text.endswith(f"</{tag[1]}>"):
        return text[tag.end() : -len(tag[1]) - 3]
    for left, right in _PAIRS:
        inner = text[len(left) : len(text) - len(right)]
        # only a pair around the whole: "2 * 3" and '"a" and "b"' keep their marks
        if inner and text == left + inner + right and left not in inner and right not in inner:
            return inner
    return text


def normalise(text: str) -> str:
    """Case, Unicode's forms of one character, runs of white space and closing punctuation do not distinguish two strings."""
    plain = " ".join(folded(unicodedata.normalize("NFC", text)).casefold().split())
    return plain.rstrip(".!?,;: ") or plain
