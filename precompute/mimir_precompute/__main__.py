"""`python -m mimir_precompute`."""

from mimir_precompute.cli import main

main()
