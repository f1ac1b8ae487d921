"""`python -m mimir_train`, as torchrun starts it."""

from mimir_train.cli.app import main

main()
