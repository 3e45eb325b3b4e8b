"""Reading single tensors of safetensors files: the bridge's, under the name that this room uses."""

from __future__ import annotations

from luthier.bridge.tensors import DTYPES, NAMES, Files, Place, buffer_of, read_places

__all__ = ["DTYPES", "NAMES", "Files", "Place", "buffer_of", "read_places"]
