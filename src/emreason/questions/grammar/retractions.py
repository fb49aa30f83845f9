"""Whether a completion stands by an answer it has stated: what comes after the value, on its line and below."""

from __future__ import annotations

import re

from emreason.questions.grammar.statements import SOMEBODY, WINDOW, Statement
from emreason.questions.grammar.typeset import view

_WRONG = (
    r"(?:not (?:quite |really |actually )?(?:right|correct|true|it|possible|sure|the (?:right|correct|answer|best|one))|wrong|incorrect|"
    r"false|mistaken|a mistake|an error|impossible|invalid|untrue|a trap|a distractor|nonsense)\b(?!\s(?:for|to|that|of)\b)"
)
_BE = (
    r"(?:'s|\s(?:is|was|seems|looks|must be|has to be|would be))"
    r"(?:\s(?:definitely|clearly|obviously|probably|also|actually|totally|just|simply|surely|likely))?\s"
)
_IT = r"(?:which|that|this|it|(?:the|my|that|this) (?:answer|choice|option|result)|the above(?: answer)?)"
_NOT_RIGHT = (
    rf"{_IT}(?:{_BE}{_WRONG}|\s(?:isn't|wasn't) (?:right|correct|true|it|the)|"
    r"\s(?:can't|cannot|can not|couldn't) be(?:\s(?:right|correct|true|it|so|possible|the (?:right|correct|answer))\b|\s*[.!,]|$))"
)
_ANOTHER = r"(?:it is |it's |make it |i mean,? )?\(?(?:[a-z]|[0-9][0-9.,]{0,20})\)?\s*(?:[.!;]|$)"
_TAKES_BACK = (
    r"wait\b(?=\s*(?:$|[,.!:;\u2014-]|\n)|\s(?:no|that|this|it|let|i|actually|maybe|but|the|a (?:minute|second|moment))\b)|hold on\b|"
    r"scratch that|strike that|never ?mind|on second thoughts?|oops|correction\b|i stand corrected|i mean,? \(?[a-z0-9]\)?\b(?! \w)|"
    r"make that\b|"
    r"i (?:take (?:that|it) back|was (?:wrong|mistaken)|am wrong|made (?:a|an) (?:\w{1,12} )?(?:mistake|error)|doubt (?:it|that|this)|"
    r"mis(?:read|counted|calculated|understood|took|spoke|stated)|retract|withdraw|changed? my mind|"
    r"(?:need|have) to (?:reconsider|re-?check|re-?think|redo|revise|recalculate|recount|correct)|"
    r"(?:don't|do not|no longer) (?:think|believe) (?:so|(?:that|this|it)(?:'s| is) (?:right|correct|true)))|"
    r"let me (?:reconsider|re-?think|redo|re-?evaluate|recalculate|recount|recompute|correct|fix|start over|try again|think again)|"
    r"actually\b,?\s(?:no\b|not\b|wait|that(?:'s| is) (?:not|wrong)|it(?:'s| is| should| must)|i (?:was|made|think)|"
    r"this is (?:not|wrong)|the (?:correct|right)|\(?[a-z]\)?(?:\s(?:is|seems)|[.!]|$))|"
    r"(?:i'm|i am|we are|we're) (?:not|un)\s?(?:so |very |entirely |completely |really |quite |too )?(?:sure|certain|confident)"
    r"(?=\s*(?:[.!,\n)]|$)|\s(?:about|if|whether|that|of) (?:this|that|it|the answer|my))|"
    r"(?:i'm|i am|this is|that's|it's|that is)? ?(?:just |only )?(?:a (?:wild )?guess\b|guessing|kidding)"
)
_SOFT = r"(?:(?:but|hmm+|oh|ah|sorry|no|nope|well|however|and|ok|okay|yet|still|though|although)\b[,.! ]{1,3})"
_DENIES = re.compile(
    rf"[\s*_\"'(>-]{{0,8}}(?:{_SOFT}{{0,3}}(?:{_TAKES_BACK}|{_NOT_RIGHT}|no(?:pe)?\s*[.!](?!\w)|{_WRONG}(?=\s*(?:[.!,;)\n]|$)))|"
    rf"{_SOFT}{{1,3}}{_ANOTHER})"
)
_WITHDRAWS = re.compile(rf"[.!?;\n][ \t*_\"'(>-]{{0,6}}(?:{_SOFT}{{0,3}}(?:{_TAKES_BACK})|{_SOFT}{{1,3}}(?:{_NOT_RIGHT}|{_ANOTHER}))")
_HEDGES = re.compile(
    rf"{_SOFT}{{0,3}}(?:"
    r"(?:not |un)(?:so |very |entirely |really |quite )?(?:sure|certain)|probably|maybe|perhaps|possibly|presumably|apparently|"
    r"(?:most )?likely(?=\W*$|[.,!)])|i (?:guess|suppose|doubt|wonder|hope so)|(?:my|my best) guess|approx|about\b|roughly|"
    r"(?:it |this |that )?(?:could|might|may) (?:also |well )?be|(?:or|and(?! not)|both|either)\b|&|"
    r"no\b(?=\s*(?:$|[,.!;:-])|\s(?:wait|that|it|not|actually|i)\b)|nope|nah|"
    r"(?:is|was|isn't|wasn't|cannot|can't|can not|doesn't|won't|could|would|might)\b|"
    r"(?:some(?:one|body)?|many|most|people|others|he|she|they|students?|everyone|(?:my|the|a) \w{1,12}) "
    r"(?:says?|said|thinks?|thought|claim\w{0,3}|believe\w?|argue\w?|wrote|told)\b|"
    r"(?:only )?if\b|unless\b|assuming|supposing|provided|(?:says|said|claims?|claimed|thinks|thought)\b|"
    rf"according to {SOMEBODY}\b|(?:right|correct|no|yes|ok|okay|is it|isn't it|is that right|really|am i right)\s?\?|"
    r"but \(?[b-z]\)? (?:is|also|could|might|seems|would))"
)
_AFTER = re.compile(r"[ \t*_`\"')\]$]*(?P<mark>[.,;:!(])?[.!]*[*_`\"')\]$]*")
_AFFIRMED = re.compile(
    r"\s{0,3}(?:is|was) (?:indeed |definitely |clearly |certainly )?(?:the |our |my )?(?:only |most |final )?"
    r"(?:correct|right|best|true|accurate|appropriate|answer)(?: (?:answer|option|choice|one|result))?(?![\w'])"
)
_REASON = re.compile(r"[\s\u2014-]{0,4}(?:because|since|as|due to|given|rather than|instead of|which|so|not|and not|based on)\b")
_FORBIDDEN = frozenset("?+=/<>&|^%~±×≈-\u2014\\#❌✗✘")
_NAME = r"\(?(?P<named>[a-z]|[0-9][0-9.,]{0,20}[0-9]|[0-9])\)?(?![\w'])"
_NAMED_WRONG = re.compile(
    rf"(?<![\w.]){_NAME}(?:{_BE}(?:wrong|incorrect|false|not (?:right|correct|the (?:right|correct|answer)))"
    r"|\s(?:can't|cannot|can not) be (?:right|correct|the)|\sisn't (?:right|correct|the))"
)
_NOT_NAMED = re.compile(rf"\b(?:it|this|that) (?:can't be|cannot be|can not be|couldn't be|isn't|is not) {_NAME}(?! [a-z])")
_VERB = re.compile(r"(?:is|was|are|were|isn't|wasn't|seems|looks|can|cannot|can't|could|couldn't|would|might|may|does|doesn't)\b")
_DISOWNED = re.compile(
    rf"\?|n't\b|\b(?:cannot|not|might|may|could|wrong|first|too|doubt\w{{0,3}}|unlikely|or|maybe|probably|perhaps|{_WRONG})"
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
    if _VERB.match(sentence):
        return not _DISOWNED.search(sentence)
    return "?" not in sentence and not _HEDGES.match(said) and not _DENIES.match(said)


def withdrawn(text: str, statement: Statement, answer: str, begin: int) -> bool:
    """Whether the text from `begin` on takes a statement back: "Wait, that's wrong.", "I made a mistake", "but B is wrong"."""
    rest = view(text[begin:])
    if _DENIES.match(rest[statement.resume - begin :].lstrip()) or _WITHDRAWS.search(rest):
        return True
    said = answer.lower()
    return any(m["named"].rstrip(".,") == said for denial in (_NAMED_WRONG, _NOT_NAMED) for m in denial.finditer(rest))
