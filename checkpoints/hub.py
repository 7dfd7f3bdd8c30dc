"""Models on the Hugging Face hub: fetched into its cache, with what is needed alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.converted import CONFIG
from checkpoints.sources import ADAPTER, COMPANIONS, SAFETENSORS, TORCH
from system.errors import InputError
from system.files import is_file, read_json


def fetch(
    name: str,
    revision: str | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """The folder of a checkpoint: ``name`` itself, or the hub's model of that name.

    From the hub come the files that are needed and not in its cache yet.

    Args:
        check: raises an InputError for a config that is of no use, before any weights
            are fetched.

    Raises:
        InputError: neither a folder nor a model on the hub, no access, no network.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder: --revision is for models on the hub")
        return Path(name)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        with _refusals_explained(name, revision):
            files = _files(name, revision)
            if check and CONFIG in files:
                check(read_json(Path(hf_hub_download(name, CONFIG, revision=revision))))
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=needed(files))
            )
    except InputError:
        raise
    except Exception as error:  # whatever the network stack raises
        return _cached(name, revision, error)


def fetch_config(name: str) -> Path:
    """A model's config, from the hub or of an earlier download.

    Raises:
        InputError: there is no such model, or it has none; no access, no network.
    """
    from huggingface_hub import hf_hub_download

    try:
        with _refusals_explained(name):
            files = _files(name, None)  # asked first: it does not try for half a minute
            if CONFIG in files:
                return Path(hf_hub_download(name, CONFIG))
    except InputError:
        raise
    except Exception as error:  # whatever the network stack raises
        try:
            return Path(hf_hub_download(name, CONFIG, local_files_only=True))
        except Exception:
            said = "cannot be reached" if _answered(error) is None else "refuses it"
            raise InputError(
                f"no model '{name}': neither a folder nor in models/, and the hub "
                f"{said} ({_reason(error)})"
            ) from None
    if "adapter_config.json" in files:
        raise InputError(f"{name} {ADAPTER}")
    raise InputError(f"{name} has no {CONFIG}: it is no model that could be run here")


def _files(name: str, revision: str | None) -> list[str]:
    """What the hub has of a model."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # retries are no concern of a reader's
    siblings = HfApi().model_info(name, revision=revision).siblings
    return [file.rfilename for file in siblings or ()]


@contextmanager
def _refusals_explained(name: str, revision: str | None = None) -> Iterator[None]:
    """What the hub refuses, as an InputError; what the network does goes on."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its conditions on its page on the hub, then log "
            f"in (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision '{revision}' on the hub") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"'{name}' is neither a folder nor a model on the hub, or a private one "
            f"(hf auth login)"
        ) from None


def _cached(name: str, revision: str | None, error: Exception) -> Path:
    """What an earlier download left in the hub's cache, the hub being out of reach."""
    from huggingface_hub import snapshot_download

    for single, index in (SAFETENSORS, TORCH):
        patterns = [*COMPANIONS, single, index, single.replace(".", "-*.")]
        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=patterns,
                    local_files_only=True,
                )
            )
        except Exception:  # nothing there, or not all of it
            continue
        if is_file(folder / single) or is_file(folder / index):
            return folder
    advice = (
        "check the network and run this again (a download resumes where it stopped)"
    )
    if _answered(error) is not None:
        advice = "log in (hf auth login), or try later"
    raise InputError(
        f"cannot fetch {name} from the hub ({_reason(error)}): {advice}, or give a "
        f"folder"
    ) from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _answered(error: Exception) -> int | None:
    """The status that the hub refused with; None where it has not said anything."""
    return getattr(getattr(error, "response", None), "status_code", None)


def needed(files: list[str]) -> list[str]:
    """Which of a repository's files make up the checkpoint.

    Safetensors where there are any, else PyTorch's; no TensorFlow, Flax or ONNX twins.

    Raises:
        InputError: there are no weights among them.
    """
    companions = [file for file in COMPANIONS if file in files]
    for single, index in (SAFETENSORS, TORCH):
        if single in files:
            return [*companions, single]
        if index in files:
            stem, _, suffix = single.rpartition(".")
            shards = [
                file
                for file in files
                if file.startswith(f"{stem}-")
                and file.endswith(f".{suffix}")
                and "/" not in file
            ]
            return [*companions, index, *shards]
    raise InputError(
        "the model has weights neither in safetensors nor in PyTorch's form"
    )
