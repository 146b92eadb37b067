"""``python -m sidetune``."""

from sidetune.cli import main

main()
