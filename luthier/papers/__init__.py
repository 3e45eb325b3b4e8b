"""The papers this toolkit covers: what each row of the table is, and whether its claim is true."""

from luthier.papers.claims import check
from luthier.papers.table import STATUSES, Paper, as_json, paper, papers

__all__ = ["STATUSES", "Paper", "as_json", "check", "paper", "papers"]
