"""push: a delta and its report on the hub; what can be known beforehand is asked before training begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.delta.header import read_header
from luthier.errors import LuthierError

FILES = ("delta.json", "*.safetensors", "README.md", "report.json", "report.html")
"""What is uploaded from the folder itself, and with it the files that delta.json says travel along."""


def check_push(repository: str) -> None:
    """Whether a push to `repository` ('name' or 'owner/name') can work: the name is one, and this machine is logged in.

    Asks the hub who the token belongs to, so that a training run does not find out at its end. Errors: one line.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise LuthierError(f"push_to: '{repository}' is no repository name ({_first(e)}): write owner/name") from e
    if not get_token():
        raise LuthierError(f"push_to {repository}: not logged in to the hub: run 'hf auth login', or leave push_to out")
    with _told(f"push_to {repository}", "log in with 'hf auth login', go online, or leave push_to out"):
        HfApi().whoami()


def push(folder: Path, repository: str, *, private: bool = True) -> None:
    """Uploads the delta and its report, and nothing else that lies in the folder; a repository made here is private."""
    from huggingface_hub import HfApi

    along = list(read_header(folder).get("files", {}))
    with _told(f"push_to {repository}", f"the delta is whole in {folder}; upload it with 'hf upload'"):
        api = HfApi()
        made = api.create_repo(repository, exist_ok=True, private=private)
        api.upload_folder(
            folder_path=folder,
            repo_id=made.repo_id,
            allow_patterns=[*FILES, *along],
            ignore_patterns=["*/*.safetensors", "*/README.md", "*/report.*", "*/delta.json"],
        )


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Whatever the hub, the network or the disk says, in one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport: Any = HfHubHTTPError.__mro__[1]  # the HTTPError of the library that the hub's client speaks with
    try:
        yield
    except (transport, HFValidationError, OSError) as e:
        raise LuthierError(f"{what} failed ({_first(e)}): {remedy}") from e


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
