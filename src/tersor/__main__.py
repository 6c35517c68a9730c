"""``python -m tersor`` is the command line."""

from tersor.cli import main

main()
