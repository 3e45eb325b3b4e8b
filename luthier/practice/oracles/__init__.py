"""What only a small world can tell: exact posteriors, worlds in which a record was never seen, gold rewards, labelled
faults, known conflicts, known numbers of bits. Pure Python: needs no torch."""
