"""Named sets of benchmark tasks: a file's name is the suite's name, with hyphens where the file has underscores."""
