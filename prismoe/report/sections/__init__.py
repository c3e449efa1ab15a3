"""The sections of a report. One file is one section: `PLACE` is where it stands (small is first), and `section` makes
it of what a run folder holds, or gives None where there is nothing to tell yet.
"""
