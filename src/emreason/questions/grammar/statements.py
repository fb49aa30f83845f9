"""Where a completion states an answer, and whether it stands by it.

    completion  =  [thinking block]  { prose | statement }
    statement   =  line      `Answer: …` at the start of a line or after the end of a sentence, to the end of the line
                |  prose     "the answer is …", "the correct option is …", to the end of the line
                |  tag       <answer>…</answer>
                |  box       \\boxed{…}
                |  heading   `#### …`, GSM8K's answer line
                |  claim     "the answer must be …": states none by itself, contradicts another one above it
    …           =  wrappers value wrappers [unit] [mark more]

A statement within a supposition, a report or a quotation is none; one that is denied takes back the same answer. The last one decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from emreason.questions.grammar.thinking import speech_start
from emreason.questions.grammar.typeset import braced, view

LOOK_BACK = 24
"""Statements examined at most, from the last one: time stays linear in whatever text."""
WINDOW = 240
"""Characters before a cue that can make a supposition or a report of it."""


Form = Literal["line", "prose", "denial", "tag", "box", "heading", "claim"]


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
    r"(?:\s{1,3}(?:to|for) (?:this|the|that|your) (?:question|problem))?[*_\"'`]{0,4}\s{1,4}"
    r"(?P<verb>isn't|is not|is|was not|wasn't|cannot be|can't be|can not be|"
    r"(?P<claimed>(?:must|should|has to|ought to) be))(?![^\W_])"
    r"(?:\s{1,3}(?:indeed|therefore|thus|hence|clearly|simply|definitely|certainly|actually|obviously|then)\b,?)?[*_\"'`]{0,3}[ \t]{0,4}:?"
)
_SENTENCE_END = re.compile(r"[.!?。！？]['\")*_`\]]{0,4}[ \t]{0,8}['\"*_`(]{0,4}$")
_TITLED = re.compile(  # "Explanation: Answer: B", "So the answer is: Answer: B"
    r"^\W*(?:(?:so|thus|therefore|hence|the|my|final|correct|best)[\s,]{1,3})*"
    r"(?:answer|explanation|conclusion|reasoning|rationale|solution|response)(?: is)?[*_]{0,3}:\W*$"
)

_TURN = re.compile(r"\b(?:(?<!if )so|thus|therefore|hence|consequently|but|because)\b")
_ASIDE = re.compile(r",\s?(?:however|though|therefore|then|of course|personally|frankly|in fact|indeed|honestly)\s?,")
SOMEBODY = r"(?:some|many|him|her|them|my|a|one|the (?:teacher|book|key|hint|student))"
_SUPPOSED = re.compile(
    r"\b(?:(?<!even )(?<!as )if|whether|unless|suppos\w{1,4}|assum\w{1,5}|imagin\w{1,4}|pretend\w{0,4}|hypothetical\w{0,2}|let's say|"
    rf"let us say|say that|in case|provided that|for example|for instance|according to {SOMEBODY})\b"
)
_REPORTED = re.compile(
    r"\b(?:say(?:s|ing)|said|thinks|thought|claim(?:s|ed|ing)|believe[sd]|argue[sd]|suggest(?:s|ed)|guess\w{0,3}|stat(?:es|ed)|reports?|reported|"
    r"wr(?:ites|ote)|tell(?:s|ing)|told|insist(?:s|ed)?|answered|hears?|heard|rumou?r|(?:(?<!i )(?<!we )(?<!would )(?<!can )(?<!must ))"
    r"(?:say|think|claim|believe|argue|suggest|tell|state|write))\b"
)
_EVIDENCE = re.compile(r"\b(?:this|that|which|it|these|evidence|calculation)\s(?:strongly |clearly )?(?:suggests|tells us)\b")
_DOUBTED = re.compile(
    r"n't\b|\b(?:not|never|nor|neither|nobody|nothing|no one|none|hardly|cannot|"
    r"(?<!no )(?<!without )(?<!without a )doubt\w{0,3}|deny|denies|false|wrong|incorrect|untrue|mistake\w?|unlikely|unclear|"
    r"unsure|uncertain|maybe|perhaps|possibly|probably|presumably|likely|might|could|may (?:seem|look|appear|be)|"
    r"apparently|supposedly|allegedly|seemingly|wonder|"
    r"no (?:reason|way|evidence|proof|idea))\b"
)
_UNSURE = re.compile(r"\bnot (?:\w{1,12} ){0,2}(?:sure|certain|confident)\b|\b(?:unsure|uncertain|guessing|wild guess)\b")
_BEFORE = re.compile(r"(?:\b(?:when|once|until|till|before|unless|where|given that|(?<!is )(?<!'s )why|how)|[\"'])\s{0,3}$")
_BOX_DENIED = re.compile(
    r"(?:\b(?:not|never|nor|neither|wrong|incorrect)|n't|\\neq?)(?:\s(?:be|equal|to|is|the|that|a|simply)){0,3}[\s$({*:\\\[\"']{0,6}$"
)
_TAG_OPENS = re.compile(r"<([a-z_]{0,16})$")
_TWO_BOXES = re.compile(r"boxed\s?\{.*(?:\b(?:and|or)|[,&/}])[\s$\\(]{0,5}$")
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


def may_state(text: str) -> bool:
    """Whether a statement could begin or, a box, end in `text`."""
    return "}" in text or _CUE.search(view(text)) is not None


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
        if (
            after is not None
            and not after.groupdict().get("claimed")
            and not any(c.isalnum() for c in plain[after.end() : cue.start()].replace("option", ""))
        ):
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
    begins = bare or (whole and _TITLED.match(before)) or _SENTENCE_END.search(before[-20:])
    if colon and (begins or (line.endswith('"') and plain.startswith('"', cue.end()))):
        if bare and _reported_above(plain, at):
            return None
        end = _line_end(plain, colon.end())
        return Statement("line", at + len(before) - len(before.lstrip(" ")) if bare else start, colon.end(), end, end)
    verb = _IS.match(plain, cue.end())
    if verb is None or not (lead["whose"] or (bare and (lead["which"] or cue[0] == "answer"))):
        return None
    if bare and at and text[start : start + 1].islower() and plain[at - 2 : at - 1] not in ".!?:;":
        before = plain[max(0, at - WINDOW) : at - 1].replace("\n", " ") + " "  # a sentence that goes on from the line above
    frame = _frame(before)
    if frame == "supposed" or (frame and verb["claimed"]):
        return None
    end = _line_end(plain, verb.end())
    asked = re.match(r"[^.!?\n]{0,200}\?", plain[verb.end() : min(end, verb.end() + 202)])
    form: Form = "claim" if verb["claimed"] else "prose" if verb["verb"] == "is" and frame is None else "denial"
    return Statement(form, start, verb.end(), verb.end() if asked else end, end)


def _reported_above(plain: str, at: int) -> bool:
    above = plain[max(0, at - WINDOW) : at].rstrip()
    return above.endswith(":") and bool(_REPORTED.search(above[above.rfind("\n") + 1 :]))


def _frame(before: str) -> Literal["supposed", "denied"] | None:
    """Whether what comes before "the answer is" in its sentence supposes, reports or quotes it, or doubts and denies it."""
    if not any(c.isalnum() for c in before):
        return None
    sentence = _ASIDE.sub(" ", re.split(r"[.!?;]", before)[-1])
    if _UNSURE.search(sentence):
        return "denied"
    supposed = _TURN.split(sentence.rstrip(": ").rsplit(":", 1)[-1] if sentence.rstrip().endswith(":") else sentence.rsplit(":", 1)[-1])[-1]
    sentence = _TURN.split(sentence)[-1]
    clause = sentence.rstrip(": ").rsplit(",", 1)[-1]
    if re.match(r"\s*that\b", clause):
        clause = sentence
    clause = _EVIDENCE.sub(" ", clause)
    if _SUPPOSED.search(supposed) or _BEFORE.search(sentence):
        return "supposed"
    own = clause if ":" not in sentence else sentence.rsplit(":", 1)[-1]  # "Wrong: the answer is B"
    return "denied" if _DOUBTED.search(own) else "supposed" if _REPORTED.search(clause) else None
