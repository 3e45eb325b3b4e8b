"""`python -m luthier`: the command line, for launchers that start a module on every process."""

from luthier.cli import main

main()
