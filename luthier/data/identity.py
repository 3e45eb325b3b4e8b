"""What a file, a tokenizer or a set of records is, as short digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FULL = 64 << 20
"""Files up to this size are hashed whole; larger ones by size, time and a sample of blocks."""
BLOCK, BLOCKS = 64 << 10, 256


def digest(value: Any) -> str:
    """SHA-256 over the value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def digest_records(records: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over all records in their order."""
    h = hashlib.sha256()
    for record in records:
        h.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return h.hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of the file: whole up to FULL bytes, else over its size and evenly spread blocks, first and last among them."""
    size = path.stat().st_size
    h = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        if size <= FULL:
            while block := f.read(1 << 20):
                h.update(block)
        else:
            for i in range(BLOCKS):
                f.seek((size - BLOCK) * i // (BLOCKS - 1))
                h.update(f.read(BLOCK))
    return h.hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Path, size, time of change and content digest: any of them changing makes another cache key."""
    stat = path.stat()
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "content": content_hash(path),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that decides token ids: the whole tokenizer file content with added tokens, and the named ones."""
    named = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return digest([type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), named])


def code_version() -> str:
    """Digest of this room's own source and of the libraries that render and tokenise: newer code, newer cache."""
    import tokenizers
    import transformers

    here = sorted(Path(__file__).parent.glob("*.py"))
    return digest(
        [transformers.__version__, tokenizers.__version__, *[hashlib.sha256(p.read_bytes()).hexdigest() for p in here]]
    )
