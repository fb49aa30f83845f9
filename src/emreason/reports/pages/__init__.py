"""What is read in a browser: a report's page, a model's card.

In: runs as `reading` reads them, the comparison, the figures drawn.
Out: `report.html`, of one file; the README.md of a run's `model/`.
"""
