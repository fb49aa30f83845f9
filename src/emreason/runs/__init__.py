"""One run's config, folder and process.

In: the config and the command line.
Out: the parts that the config names, checked; the folder's lock, journal, checkpoints and summary, which survive a kill at any moment.
Also how a command ends: errors in one sentence, signals, ranks whose launcher died.
"""
