"""Where a completion states an answer, and whether it stands by it.

    completion  =  [thinking block]  { prose | statement }
    statement   =  line      `Answer: …` at the start of a line or after the end of a sentence, to the end of the line
                |  prose     "the answer is …", "the correct option is …", to the end of the line
                |  tag       <answer>…</answer>
                |  box       \\boxed{…}
                |  heading   `#### …`, GSM8K's answer line
    …           =  wrappers value wrappers [unit] [mark more]

A statement within a supposition, a report or a quotation is none; one that is denied takes back the same answer. The last one decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from emreason.thinking import speech_start
from emreason.typeset import braced, view

LOOK_BACK = 24
"""Statements examined at most, from the last one: time stays linear in whatever text."""
WINDOW = 240
"""Characters before a cue that can make a supposition or a report of it."""


Form = Literal["line", "prose", "denial", "tag", "box", "heading"]


@dataclass(frozen=True)
class Statement:
    """`text[begin:end]` is said to be the answer; `start` is where the cue begins, `resume` where the text goes on after it.

    `boxed`: the value is what a box holds; the line may go on after it.
    """

    form: Form
    start: int
    begin: int
    end: int
    resume: int
    boxed: bool = False


_CUE = re.compile(r"(?<![^\W_])(?:answer|option|choice)(?![^\W_])|\\(?:boxed|fbox)\s?\{|(?:(?<=\n)|^)####(?=[ \t])")
_LEAD = re.compile(
    r"(?:\b(?:so|thus|hence|therefore|and|finally)\b,?\s{1,3})?(?:\b(?P<whose>the|my|our)[\s*_\"'`]{1,4})?"
    r"(?P<which>(?:\b(?:final|correct|right|best|only|true|actual)[\s*_]{1,4})*)[*_\"'`({\[]{0,6}$"
)
_COLON = re.compile(r"[*_\"'`)\]]{0,4}[ \t]{0,8}(?:is[ \t]{0,4})?[*_]{0,3}:")
_IS = re.compile(
    r"[*_\"'`]{0,4}\s{1,4}(?P<verb>isn't|is not|is|was not|wasn't|cannot be|can't be|can not be)(?![^\W_])"
    r"(?:\s{1,3}(?:indeed|therefore|thus|hence|clearly|simply|definitely|certainly|actually|obviously|then)\b,?)?[*_\"'`]{0,3}[ \t]{0,4}:?"
)
_SENTENCE_END = re.compile(r"[.!?]['\")*_`\]]{0,4}[ \t]{1,8}['\"*_`(]{0,4}$")

_TURN = re.compile(r"\b(?:(?<!if )so|thus|therefore|hence|consequently|but|because)\b")
_ASIDE = re.compile(r",\s?(?:however|though|therefore|then|of course|personally|frankly|in fact|indeed|honestly)\s?,")
_SUPPOSED = re.compile(
    r"\b(?:(?<!even )(?<!as )if|whether|unless|suppos\w{1,4}|assum\w{1,5}|imagin\w{1,4}|pretend\w{0,4}|hypothetical\w{0,2}|let's say|let us say|"
    r"say that|in case|provided that|for example|for instance|according to (?:some|many|him|her|them|my|a|one|the (?:teacher|book|key|hint|student)))\b"
)
_REPORTED = re.compile(
    r"\b(?:say(?:s|ing)|said|thinks|thought|claim(?:s|ed|ing)|believe[sd]|argue[sd]|suggest(?:s|ed)|guess\w{0,3}|stat(?:es|ed)|reports?|reported|"
    r"wr(?:ites|ote)|tell(?:s|ing)|told|insist(?:s|ed)?|answered|hears?|heard|rumou?r|(?:(?<!i )(?<!we )(?<!would )(?<!can )(?<!must ))"
    r"(?:say|think|claim|believe|argue|suggest|tell|state|write))\b"
)
_EVIDENCE = re.compile(r"\b(?:this|that|which|it|these|evidence|calculation)\s(?:strongly |clearly )?(?:suggests|tells us)\b")
_DOUBTED = re.compile(
    r"n't\b|\b(?:not|never|nor|neither|nobody|hardly|cannot|doubt\w{0,3}|deny|denies|false|wrong|incorrect|untrue|mistake\w?|unlikely|unclear|"
    r"unsure|uncertain|maybe|perhaps|possibly|probably|presumably|likely|might|could|apparently|supposedly|allegedly|seemingly|wonder|"
    r"no (?:reason|way|evidence|proof|idea))\b"
)
_BEFORE = re.compile(r"(?:\b(?:when|once|until|till|before|unless|where|given that|(?<!is )(?<!'s )why|how)|[\"'])\s{0,3}$")
_BOX_DENIED = re.compile(
    r"(?:\b(?:not|never|nor|neither|wrong|incorrect)|n't|\\neq?)(?:\s(?:be|equal|to|is|the|that|a|simply)){0,3}[\s$({*:\\\[\"']{0,6}$"
)
_TAG_OPENS = re.compile(r"<([a-z_]{0,16})$")
_TWO_BOXES = re.compile(r"boxed\s?\{.*(?:\b(?:and|or)|,|&|/)[\s$\\(]{0,5}$")
_BOX_SUPPOSED = re.compile(
    r"(?:\b(?:maybe|perhaps|possibly|probably|if|whether|suppose|assume|unless|guess|either)\b|\\approx|≈)"
    r"(?:\s(?:be|equal|to|is|the|that|a|it|it's)){0,3}[\s$({*:\\\[\"']{0,6}$"
)


def statements(text: str) -> Iterator[Statement]:
    """The statements of `text` outside its thinking block, from the last to the first; suppositions and reports are passed over."""
    begin = speech_start(text)
    if begin is None:
        return
    plain = " " * begin + view(text[begin:])
    cues = list(_CUE.finditer(plain, begin))
    for cue in cues[: -LOOK_BACK - 1 : -1]:
        found = _box(text, plain, cue) if cue[0][0] == "\\" else _heading(plain, cue) if cue[0] == "####" else _worded(text, plain, cue)
        if found is not None:
            yield found


def _line_end(plain: str, at: int) -> int:
    end = plain.find("\n", at)
    return len(plain) if end < 0 else end


def _heading(plain: str, cue: re.Match[str]) -> Statement:
    end = _line_end(plain, cue.end())
    return Statement("heading", cue.start(), cue.end(), end, end)


def _box(text: str, plain: str, cue: re.Match[str]) -> Statement | None:
    at = max(plain.rfind("\n", 0, cue.start()) + 1, cue.start() - WINDOW)
    line = plain[at : cue.start()]
    if _BOX_SUPPOSED.search(line[-60:]):
        return None
    close = braced(text, cue.end())
    end = cue.end() if close is None or _TWO_BOXES.search(line) else close
    box = Statement("box", cue.start(), cue.end(), end, end + 1, boxed=True)
    worded = None
    for worded in _CUE.finditer(plain, at, cue.start()):  # noqa: B007
        pass
    if worded is not None and worded[0].isalpha():
        after = _COLON.match(plain, worded.end()) or _IS.match(plain, worded.end())
        if after is not None and not any(c.isalnum() for c in plain[after.end() : cue.start()].replace("option", "")):
            whose = _worded(text, plain, worded)  # the box dresses the value of this cue
            return None if whose is None else replace(box, form=whose.form, start=whose.start)
    return replace(box, form="denial") if _BOX_DENIED.search(line[-60:]) else box


def _worded(text: str, plain: str, cue: re.Match[str]) -> Statement | None:
    at = plain.rfind("\n", 0, cue.start()) + 1
    whole = at >= cue.start() - WINDOW
    line = plain[max(at, cue.start() - WINDOW) : cue.start()]
    if plain.startswith(">", cue.end()) and (tag := _TAG_OPENS.search(line[-20:])):
        close = plain.find(f"</{tag[1]}{cue[0]}>", cue.end())
        begin = cue.end() + 1
        return Statement("tag", cue.start() - len(tag[0]), begin, max(begin, close), max(begin, close))
    lead = _LEAD.search(line[-60:])
    assert lead is not None  # it matches nothing, too
    if cue[0] != "answer" and not lead["which"]:  # "option", "choice": the correct one only
        return None
    start = cue.start() - len(lead[0])
    before = line[: len(line) - len(lead[0])]
    bare = whole and not any(c.isalnum() for c in before)
    colon = _COLON.match(plain, cue.end())
    if colon and (bare or _SENTENCE_END.search(before[-20:]) or (line.endswith('"') and plain.startswith('"', cue.end()))):
        if bare and _reported_above(plain, at):
            return None
        end = _line_end(plain, colon.end())
        return Statement("line", at if bare else start, colon.end(), end, end)
    verb = _IS.match(plain, cue.end())
    if verb is None or not (lead["whose"] or (bare and (lead["which"] or cue[0] == "answer"))):
        return None
    if bare and at and text[start : start + 1].islower() and plain[at - 2 : at - 1] not in ".!?:;":
        before = plain[max(0, at - WINDOW) : at - 1].replace("\n", " ") + " "  # a sentence that goes on from the line above
    frame = _frame(before)
    if frame == "supposed":
        return None
    end = _line_end(plain, verb.end())
    asked = re.match(r"[^.!?\n]{0,200}\?", plain[verb.end() : min(end, verb.end() + 202)])
    form: Form = "prose" if verb["verb"] == "is" and frame is None else "denial"
    return Statement(form, start, verb.end(), verb.end() if asked else end, end)


def _reported_above(plain: str, at: int) -> bool:
    above = plain[max(0, at - WINDOW) : at].rstrip()
    return above.endswith(":") and bool(_REPORTED.search(above[above.rfind("\n") + 1 :]))


def _frame(before: str) -> Literal["supposed", "denied"] | None:
    """Whether what comes before "the answer is" in its sentence supposes, reports or quotes it, or doubts and denies it."""
    if not any(c.isalnum() for c in before):
        return None
    sentence = _ASIDE.sub(" ", re.split(r"[.!?;]", before)[-1])
    supposed = _TURN.split(sentence.rstrip(": ").rsplit(":", 1)[-1] if sentence.rstrip().endswith(":") else sentence.rsplit(":", 1)[-1])[-1]
    sentence = _TURN.split(sentence)[-1]
    clause = sentence.rstrip(": ").rsplit(",", 1)[-1]
    if re.match(r"\s*that\b", clause):
        clause = sentence
    clause = _EVIDENCE.sub(" ", clause)
    if _SUPPOSED.search(supposed) or _BEFORE.search(sentence):
        return "supposed"
    return "denied" if _DOUBTED.search(clause) else "supposed" if _REPORTED.search(clause) else None


# --- what comes after a value ----------------------------------------------------------------------------------------------

_WRONG = (
    r"(?:not (?:quite |really |actually )?(?:right|correct|true|it|possible|sure|the (?:right|correct|answer|best|one))|wrong|incorrect|false|"
    r"mistaken|a mistake|an error|impossible|invalid|untrue|a trap|a distractor|nonsense)\b"
)
_BE = (
    r"(?:'s|\s(?:is|was|seems|looks|must be|has to be|would be))(?:\s(?:definitely|clearly|obviously|probably|also|actually|totally|just|"
    r"simply|surely|likely))?\s"
)
_IT = r"(?:which|that|this|it|(?:the|my|that|this) (?:answer|choice|option|result)|the above(?: answer)?)"
_NOT_RIGHT = rf"{_IT}(?:{_BE}{_WRONG}|\s(?:isn't|wasn't) (?:right|correct|true|it|the)|\s(?:can't|cannot|can not|couldn't) be\b)"
_TAKES_BACK = (
    r"wait\b(?=\s*(?:$|[,.!:;\u2014-]|\n)|\s(?:no|that|this|it|let|i|actually|maybe|but|the|a (?:minute|second|moment))\b)|hold on\b|"
    r"scratch that|strike that|never ?mind|on second thoughts?|oops|correction\b|i stand corrected|"
    r"i (?:take (?:that|it) back|was (?:wrong|mistaken)|am wrong|made (?:a|an) (?:\w{1,12} )?(?:mistake|error)|"
    r"mis(?:read|counted|calculated|understood|took|spoke|stated)|retract|withdraw|changed? my mind|(?:need|have) to (?:re\w{1,12}|correct)|"
    r"(?:don't|do not|no longer) (?:think|believe) (?:so|(?:that|this|it)(?:'s| is) (?:right|correct|true))|doubt (?:it|that|this))|"
    r"let me (?:reconsider|rethink|re-think|redo|re-?evaluate|recalculate|recount|recompute|correct|fix|start over|try again|think again)|"
    r"actually\b,?\s(?:no\b|not\b|wait|that(?:'s| is) (?:not|wrong)|it(?:'s| is| should| must)|i (?:was|made|think)|this is (?:not|wrong)|"
    r"the (?:correct|right)|\(?[a-z]\)?(?:\s(?:is|seems)|[.!]|$))|i mean\b|make that\b|"
    r"(?:i'm|i am|we are|we're) (?:not|un)\s?(?:so |very |entirely |completely |really |quite |too )?(?:sure|certain|confident)"
    r"(?=\s*(?:[.!,\n)]|$)|\s(?:about|if|whether|that|of) (?:this|that|it|the answer|my))|"
    r"(?:i'm|i am|this is|that's|it's|that is)? ?(?:just |only )?(?:a (?:wild )?guess\b|guessing|kidding)"
)
_SOFT = r"(?:(?:but|hmm+|oh|ah|sorry|no|nope|well|however|and|ok|okay|yet|still|though|although)\b[,.! ]{1,3})"
_DENIES = re.compile(rf"[\s*_\"'(>-]{{0,8}}{_SOFT}{{0,3}}(?:{_TAKES_BACK}|{_NOT_RIGHT}|no(?:pe)?\s*[.!](?!\w)|{_WRONG})")
_WITHDRAWS = re.compile(rf"[.!?;\n][ \t*_\"'(>-]{{0,6}}(?:{_SOFT}{{0,3}}(?:{_TAKES_BACK})|{_SOFT}{{1,3}}(?:{_NOT_RIGHT}))")
_HEDGES = re.compile(
    rf"{_SOFT}{{0,3}}(?:(?:not |un)(?:so |very |entirely |really |quite )?(?:sure|certain)|probably|maybe|perhaps|possibly|presumably|apparently|"
    r"(?:most )?likely(?=\W*$|[.,!)])|i (?:guess|suppose|doubt|wonder|hope so)|(?:my|my best) guess|(?:it |this |that )?(?:could|might|may) (?:also |well )?be|"
    r"(?:or|and(?! not)|both|either)\b|&|no\b(?=\s*(?:$|[,.!;:-])|\s(?:wait|that|it|not|actually|i)\b)|nope|nah|"
    r"(?:is|was|isn't|wasn't|cannot|can't|can not|doesn't|won't|could|would|might)\b|"
    r"(?:only )?if\b|unless\b|assuming|supposing|provided|approx|about\b|roughly|"
    r"(?:says|said|claims?|claimed|thinks|thought|according to (?:some|many|him|her|them|my|a|one|the (?:teacher|book|key|hint|student)))\b|"
    r"(?:right|correct|no|yes|ok|okay|is it|isn't it|is that right|really|am i right)\s?\?|"
    r"but \(?[b-z]\)? (?:is|also|could|might|seems|would))"
)
_AFTER = re.compile(r"[ \t*_`\"')\]$]*(?P<mark>[.,;:!(])?[.!]*[*_`\"')\]$]*")
_AFFIRMED = re.compile(
    r"\s{0,3}(?:is|was) (?:indeed |definitely |clearly |certainly )?(?:the |our |my )?(?:only |most |final )?"
    r"(?:correct|right|best|true|accurate|appropriate|answer)(?: (?:answer|option|choice|one|result))?(?![\w'])"
)
_REASON = re.compile(r"[\s\u2014-]{0,4}(?:because|since|as|due to|given|rather than|instead of|which|for|not|and not|based on)\b")
_FORBIDDEN = frozenset("?+=/<>&|^%~±×≈-\u2014\\#")
_NAMED_WRONG = re.compile(
    rf"(?<![\w.])\(?(?P<named>[a-z]|[0-9][0-9.,]{{0,20}}[0-9]|[0-9])\)?(?:{_BE}(?:wrong|incorrect|false|not (?:right|correct|the (?:right|correct|answer)))"
    r"|\s(?:can't|cannot|can not) be (?:right|correct|the)|\sisn't (?:right|correct|the))"
)


def stands(rest: str, separated: bool = False) -> bool:
    """Whether what follows a value on its line leaves the statement standing.

    Args:
        rest: what follows the value and its unit, undressed.
        separated: a bracket around the value sets it off from words that follow without a mark.
    """
    if not any(c.isalnum() for c in rest):
        return not _FORBIDDEN & set(rest)
    after = _AFTER.match(rest)
    assert after is not None  # it matches nothing, too
    mark, said = after["mark"], view(rest[after.end() : after.end() + WINDOW])
    if mark is None:
        if affirmed := _AFFIRMED.match(said):
            return stands(said[affirmed.end() :])
        if not separated and not _REASON.match(said):
            return False
    if mark not in (None, "(") and said[:1] and not said[0].isspace():  # "3:30", "B.C."
        return False
    head = said.lstrip(" \t*_`\"'(-\u2014")
    if _HEDGES.match(head) or _DENIES.match(head):
        return False
    asked = re.match(r"[^.!;\n]{0,200}\?", said)
    return not (asked and mark in (None, ",", ":", "("))


def box_stands(rest: str) -> bool:
    """The same after a box, whose own end is plain: words may follow it at once."""
    said = view(rest).lstrip(" \t*_`\"')]$.,;:!")
    if not said or rest.lstrip(" $*)")[:1] in (".", "!"):
        return stands(rest) if said else "?" not in rest
    if said[0] == "?" or re.match(r"(?:or|and) [\s$\\(]{0,4}\\boxed|or\b", said):
        return False
    sentence = re.split(r"[.!;\n]", said, maxsplit=1)[0]
    if re.match(r"(?:is|was|are|were|isn't|wasn't|seems|looks|can|cannot|can't|could|couldn't|would|might|may|does|doesn't)\b", sentence):
        return not re.search(
            r"\?|n't\b|\b(?:cannot|not|might|may|could|wrong|first|too|doubt\w*|unlikely|or|maybe|probably|perhaps|" + _WRONG + ")",
            sentence,
        )
    return "?" not in sentence and not _HEDGES.match(said) and not _DENIES.match(said)


def withdrawn(text: str, statement: Statement, answer: str) -> bool:
    """Whether the text after a statement takes it back: "Wait, that's wrong.", "I made a mistake", "but B is wrong"."""
    rest = view(text[statement.begin :])
    return (
        bool(_DENIES.match(rest[statement.resume - statement.begin :].lstrip()))
        or bool(_WITHDRAWS.search(rest))
        or any(m["named"].rstrip(".,") == answer.lower() for m in _NAMED_WRONG.finditer(rest))
    )
