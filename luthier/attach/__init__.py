"""The only code that puts forms on a model, freezes, folds, unfolds, detaches."""

from luthier.attach.apply import apply
from luthier.attach.attached import Above, Attached, attached
from luthier.attach.fold import FoldReport

__all__ = ["Above", "Attached", "FoldReport", "apply", "attached"]
