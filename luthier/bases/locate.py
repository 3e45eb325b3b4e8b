"""From the name of a base to a folder with its files, checked before anything is read into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.bases.built import practice_folder
from luthier.errors import LuthierError, nearest
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NEEDED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
CONNECT_SECONDS = 5.0


def locate(spec: BaseSpec, weights: bool = True) -> Path:
    """The folder of a base: a practice base, a local folder, the hub's local cache, or a download, in this order.

    A copy in the local cache is used as it is, without asking the hub; state a commit as revision to be exact.
    Raises LuthierError in one line where the base cannot be had.
    """
    built_in, folder = spec.name.split("/")[0] == "practice", Path(spec.name).expanduser()
    if spec.revision and (built_in or folder.is_dir()):
        raise LuthierError(
            f"base {spec.name} is a folder and has no revision '{spec.revision}': leave base.revision out, or give a hub name"
        )
    if built_in:
        return practice_folder(spec.name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise LuthierError(f"base {spec.name}: is a file; name the folder that holds it")
    if spec.name.startswith((".", "/", "~")) or spec.name.count("/") > 1 or "\\" in spec.name:
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        remedy = nearest(folder.name, near, "folder") if near else "correct base.name, or give a hub name"
        raise LuthierError(f"base {spec.name}: no such folder; {remedy}")
    return _from_hub(spec, weights)


def _from_hub(spec: BaseSpec, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    transport: Any = hub.HfHubHTTPError.__bases__  # the HTTP library under huggingface_hub differs between its versions
    where = f"base {spec.name}" + (f" at revision {spec.revision}" if spec.revision else "")
    wanted = [*NEEDED, *(["*.py"] if spec.trust_remote_code else [])]
    wanted = wanted if weights else [p for p in wanted if p != "*.safetensors"]
    try:
        cached = Path(snapshot_download(spec.name, revision=spec.revision, local_files_only=True))
        if _whole(cached, weights):
            return cached
    except hub.LocalEntryNotFoundError:
        pass
    except hub.HFValidationError as error:
        raise LuthierError(f"{where}: no folder of this name, and no hub name either; correct base.name") from error
    try:
        info = HfApi().model_info(spec.name, revision=spec.revision, timeout=CONNECT_SECONDS)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if weights and not any(n.endswith(".safetensors") for n in names):
            _refuse_pickle(where, names)
        return Path(
            snapshot_download(
                spec.name, revision=info.sha, allow_patterns=wanted, etag_timeout=CONNECT_SECONDS, max_workers=4
            )
        )
    except hub.GatedRepoError as error:
        raise LuthierError(f"{where}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except hub.RepositoryNotFoundError as error:
        raise LuthierError(
            f"{where}: no such folder, and no such model on the hub (or private: set HF_TOKEN)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise LuthierError(f"{where}: the model is there but not this revision; correct base.revision") from error
    except (*transport, OSError, hub.EntryNotFoundError) as error:
        raise LuthierError(
            f"{where}: no such folder, not in the local cache, and the hub cannot be reached ({type(error).__name__}); "
            "go online once, or name a folder"
        ) from error


def _whole(folder: Path, weights: bool) -> bool:
    """Whether a cached snapshot has the configuration and, where wanted, every weight file."""
    if not (folder / "config.json").is_file():
        return False
    return not weights or bool(list(folder.glob("*.safetensors"))) and not missing_shards(folder)


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the folder's index names and that are not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    named = read_json(index).get("weight_map", {})
    return sorted({name for name in named.values() if not (folder / name).is_file()})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a base; LuthierError names the file where it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        held = {"delta": "a delta", "adapter": "a PEFT adapter", "assembly": "an assembly"}.get(
            str(kind_of(file.parent))
        )
        said = f"it holds {held}, and a checkpoint is wanted here" if held else f"no {file.name}"
        raise LuthierError(f"{file.parent}: {said}; name the folder of a Hugging Face model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LuthierError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise LuthierError(f"{file}: holds no JSON object; fetch it again")
    return value


def check_weights(folder: Path) -> list[Path]:
    """The weight files of a folder, each opened to see that it is whole. Pickled weights are refused."""
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("*.safetensors"))
    if not found:
        _refuse_pickle(str(folder), [p.name for p in folder.iterdir()])
    if missing := missing_shards(folder):
        raise LuthierError(f"{folder}: {missing[0]} is missing, though the index names it; fetch the base again")
    for file in found:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LuthierError(f"{file}: truncated or altered ({error}); fetch it again") from error
    return found


def _refuse_pickle(where: str, names: list[str]) -> None:
    pickled = [n for n in names if n.endswith(PICKLED) and "training_args" not in n and "optimizer" not in n]
    if pickled:
        raise LuthierError(
            f"{where}: weights only as pickle ({pickled[0]}), which can run code and is refused; convert them once with "
            "model.save_pretrained(folder) in a place you trust, and name that folder"
        )
    raise LuthierError(f"{where}: no *.safetensors file; name the folder or hub model that holds the weights")
