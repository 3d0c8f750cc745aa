"""``python -m farthing`` is the command line."""

from .cli import main

main()
