"""Effects of the papers, looked for in the practice world: ``python -m luthier.effects``. One file of ``known`` is one effect."""
