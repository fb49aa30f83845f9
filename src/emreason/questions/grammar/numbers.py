"""Numbers as people write them: signs, currency, grouping, fractions, powers of ten, a unit; and when two are equal."""

from __future__ import annotations

import re
from fractions import Fraction

from emreason.questions.grammar.typeset import undressed

RELATIVE = Fraction(1, 10**9)
"""Two numbers that are not both whole are equal up to this: far above a float column's rounding (1e-15 a step, 0.30000000000000004),
far below what anybody writes down (0.333333 is not 1/3)."""
LONGEST = 400
"""Characters of a number at most."""

OPENING, CLOSING = " \t*_`\"'([$", " \t*_`\"')]$"
_CURRENCY = r"(?:(?:US|CA|AU|C|A)?\$|[£€¥₹₩₽¢]|(?:USD|EUR|GBP|JPY|CNY|INR|AUD|CAD|CHF|Rs\.?)\s)"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_PLAIN = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"
_BODY = re.compile(
    rf"(?P<mantissa>{_PLAIN})\s?[×x*]\s?10\s?\^\s?(?P<power>[-+]?[0-9]{{1,4}})"
    rf"|(?:(?P<units>{_WHOLE})\s{{1,2}})?(?P<numerator>{_WHOLE})\s?/\s?(?P<denominator>{_WHOLE})"
    rf"|(?P<plain>{_PLAIN}(?:e[-+]?[0-9]{{1,4}})?)",
    re.IGNORECASE,
)
_LEAD = re.compile(rf"\s{{0,2}}(?:{_CURRENCY}\s?)?(?P<sign>[-+−])?(?:{_CURRENCY}\s?)?", re.IGNORECASE)
_GOES_ON = re.compile(r"[0-9/^×+=<>~±:-]|\.[0-9]|,[0-9]")

_ATTACHED = re.compile(r"%|°\s?[CF]?\b|°|[$€£¥¢]|(?:[A-Za-z]{2,12}|[gmLlhVWNJ])(?![A-Za-z0-9])")
_WORD = re.compile(r"(?:\s{1,3}|/)(?P<word>%|°\s?[CF]?|[A-Za-zµΩ][A-Za-z.'-]{0,30}(?:\^[23])?)")
_SINGLE = frozenset("gmslhLVWNJCFAa")
_SAYS_MORE = (
    "and or to are were isn't aren't wasn't weren't cannot can't if but unless until between versus vs maybe probably perhaps "
    "possibly about approximately roughly wrong incorrect false either neither could might may would should we it this that nor"
)
_MULTIPLIES = (
    "plus minus times divided multiplied dozen hundred thousand million billion trillion squared cubed half quarter quarters halves thirds "
    "fourths fifths sixths sevenths eighths ninths tenths twelfths hundredths thousandths tens hundreds thousands lakh lakhs crore crores "
    "pi factorial mn bn remainder"
)
_CLOCK = (
    "am pm a.m p.m o'clock st nd rd th january february march april june july august september october november december jan feb mar apr "
    "jun jul aug sep sept oct nov dec ad bc bce ce"
)
_NO_UNIT = frozenset(f"{_SAYS_MORE} {_MULTIPLIES} {_CLOCK}".split())
_LETTERS = re.compile(r"(?<![0-9.])[A-Za-z]|(?<=[0-9.])(?![eE][-+]?[0-9])[A-Za-z]")
CONJUNCTIONS = frozenset(("because", "since", "as", "due", "given", "rather", "instead", "which", "where", "so", "for", "based", "not"))


def read_number(text: str) -> tuple[str, str] | None:
    """The number that an undressed line begins with, as a plain string, and the rest of the line after its unit.

    None where the line begins with no number, or with something longer that only begins like one: an equation, a range, a date, a time.
    """
    begin = len(text) - len(text.lstrip(OPENING))
    opened = text[:begin]
    currency = "$" in opened
    lead = _LEAD.match(text, begin)
    assert lead is not None  # it matches nothing, too
    body = _BODY.match(text, lead.end(), lead.end() + LONGEST)
    if body is None or any(opened.count(left) > text.count(right, body.end()) for left, right in ("()", "[]")):
        return None
    value = _canonical(body, "-" if lead["sign"] in ("-", "−") else "")
    end = body.end()
    if value is None or _GOES_ON.match(text, end):
        return None
    unit_end = _unit(text, end, currency or bool(lead[0].strip("+-− \t")))
    return None if unit_end is None else (value, text[unit_end:])


def _canonical(body: re.Match[str], sign: str) -> str | None:
    if body["power"] is not None:
        return f"{sign}{_bare(body['mantissa'])}e{int(body['power'])}"
    if body["denominator"] is None:
        return sign + _bare(body["plain"])
    numerator, denominator = _bare(body["numerator"]), _bare(body["denominator"])
    if len(numerator) > 40 or len(denominator) > 40 or not int(denominator):
        return None
    if body["units"] is None:
        return f"{sign}{numerator}/{denominator}"
    if int(numerator) >= int(denominator):  # "12 34/5" is no mixed number
        return None
    return f"{sign}{int(_bare(body['units'])[:40]) * int(denominator) + int(numerator)}/{denominator}"


def _unit(text: str, end: int, currency: bool) -> int | None:
    """Where the unit after a number ends; None if what follows is no unit but goes on with the number, a date, a sum."""
    attached = _ATTACHED.match(text, end)
    if attached:
        letters = attached[0].lower()
        if letters.isalpha() and (letters in _NO_UNIT or currency):  # "18th", "$5m"
            return None
        end = attached.end()
        if text[end : end + 2] in ("^2", "^3"):
            end += 2
    end = _closed(text, end)
    if end < len(text) and (text[end].isalnum() or text[end] in "^\\"):
        return None
    while word := _WORD.match(text, end):
        said = word["word"].rstrip(".")
        if said.lower() in (*CONJUNCTIONS, "is", "was"):  # "18 because …", "18 is right": whoever reads the rest will judge
            return end
        if said.lower() in _NO_UNIT or (len(said) == 1 and said.isalpha() and said not in _SINGLE):
            return None
        end = _closed(text, word.end() - len(word["word"]) + len(said))
    return end


def _closed(text: str, end: int) -> int:
    while end < len(text) and text[end] in "*_`\"')]$":
        end += 1
    return end


def parse_number(text: str) -> Fraction | None:
    """`"1,234"`, `"17.0"`, `"-$5"`, `"1/2"`, `"18 %"` as a number; None where `text` is anything else."""
    if len(text) > LONGEST:
        return None
    text = undressed(text.strip())
    read = read_number(text)
    return None if read is None or read[1].strip(" .") or _LETTERS.search(text) else Fraction(read[0])


def same_number(one: str, other: str) -> bool:
    """Equality of values: whole numbers exactly, others up to `RELATIVE`."""
    a, b = parse_number(one), parse_number(other)
    if a is None or b is None:
        return False
    if a == b or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= RELATIVE * max(abs(a), abs(b))


def _bare(number: str) -> str:
    return number.replace(",", "")
