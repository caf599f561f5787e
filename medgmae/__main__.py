"""``python -m medgmae`` is the command line."""

from medgmae.cli import main

main(prog_name="medgmae")
