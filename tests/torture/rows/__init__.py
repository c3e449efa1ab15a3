"""One file, one promise (or a few that belong together): `run(place)` yields outcomes."""
