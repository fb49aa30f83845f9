"""What a completion states: thinking blocks, typesetting, numbers, statements, and what takes a statement back."""
