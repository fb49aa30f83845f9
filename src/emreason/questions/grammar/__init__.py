"""The grammar of answers: how people and models state one.

In: the text of a completion.
Out: its statements in order, what each says, and whether it is denied or taken back; numbers by value, strings without their typesetting.
A thinking block states nothing. Everything is linear in the length of the text.
"""
