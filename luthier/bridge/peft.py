"""PEFT adapter folders, in and out."""

from luthier.bridge.peft_in import from_peft
from luthier.bridge.peft_out import to_peft

__all__ = ["from_peft", "to_peft"]
