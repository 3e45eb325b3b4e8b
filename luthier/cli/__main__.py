"""python -m luthier.cli"""

from luthier.cli import main

main()
