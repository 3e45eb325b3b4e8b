"""The only code that puts forms on a model, freezes, folds, unfolds, detaches."""

from luthier.attach.attached import Attached, FoldReport, apply, attached

__all__ = ["Attached", "FoldReport", "apply", "attached"]
