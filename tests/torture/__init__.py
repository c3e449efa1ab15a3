"""`make torture`: kills, lost writes, damaged and hostile files, faults in numbers; one table of what held.

`python -m tests.torture` runs every row of `rows/` (one file, one row or a few that belong together).
"""
