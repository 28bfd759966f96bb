"""Looking at runs of ``gradfast train`` after, or while, they run: list them, compare them, draw them together.

    folder     one run folder, read without trusting it; and which folders below a root are runs
    listing    the table with a row per run
    compare    the table with a column per run
    overlay    the picture with a line per run
    cli, plot  the commands ``gradfast runs`` and ``gradfast plot``

Nothing here writes into a run, and nothing reads a checkpoint.
"""
