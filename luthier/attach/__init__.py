"""The only code that puts forms on a model, freezes, folds, unfolds, detaches."""

from luthier.attach.apply import apply
from luthier.attach.attached import Attached, attached
from luthier.attach.fold import FoldReport

__all__ = ["Attached", "FoldReport", "apply", "attached"]
