"""`python -m prismoe` is `prismoe`."""

from prismoe.cli import main

raise SystemExit(main())
