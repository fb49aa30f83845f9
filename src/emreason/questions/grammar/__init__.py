"""What a completion states: thinking blocks, typesetting, numbers, statements, and what takes a statement back.

In: the text of a completion.
Out: where it states an answer, the value that it states, and whether it stands by it. No question is known here.
"""
