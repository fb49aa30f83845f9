"""Run folders read back.

In: folders, in whatever state a run left them.
Out: tables (terminal, Markdown, CSV, LaTeX), figures and one self-contained page, over seeds, with paired tests; a sweep's table.
Nothing here loads a model.
"""
