"""`python -m mimir_precompute`."""

from mimir_precompute.cli.app import main

main()
