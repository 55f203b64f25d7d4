"""Models on the Hugging Face hub, through its own client; loaded only where a name or an upload asks for it."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scldm_cd4._errors import CheckpointError

PATTERNS = ("*.json", "*.yaml", "*.safetensors", "README.md")
"""Files that are fetched; a repository may hold others, among them such that run when they are loaded."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(source: str | Path, *, revision: str | None = None, **options: Any) -> Path:
    """Return the local path of a model: the one given, or where a model of the hub was put.

    Parameters
    ----------
    source
        A path, or the name ``org/name`` of a repository.
    revision, options
        As `huggingface_hub.snapshot_download` takes them; for a name on the hub alone.

    Raises
    ------
    CheckpointError
        There is no such folder, and no such repository or no way to it.
    """
    path = Path(source).expanduser()
    if path.exists() or not isinstance(source, str) or not is_name(source):
        if revision is not None:
            raise CheckpointError(f"revision= is for a model on the hub, and {source} is a path")
        if not path.exists():
            raise CheckpointError(f"there is no folder or file {source}, and it is no name of a model on the hub")
        return path
    client = _client(source)
    with _explained(source, revision):
        found = client.snapshot_download(
            source, revision=revision, allow_patterns=list(PATTERNS), ignore_patterns=["*/*"], **options
        )
    _verify(Path(found))
    return Path(found)


def _verify(folder: Path) -> None:
    """Compare large files with the sha256 by which the hub names them; the client looks at their sizes alone."""
    for path in folder.iterdir():
        blob = path.resolve()
        if path.is_symlink() and _SHA256.fullmatch(blob.name):
            with blob.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                    raise CheckpointError(
                        f"{path.name} is damaged: its checksum is not the one that the hub gives; delete {blob} and "
                        "try again"
                    )


def is_name(source: str) -> bool:
    """Whether a string could be ``org/name`` of a repository, and is no path."""
    return source.count("/") == 1 and _NAME.fullmatch(source) is not None and ".." not in source


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    token: str | bool | None,
    commit_message: str | None,
) -> str:
    """Upload a saved model.

    Returns
    -------
    The address of the commit.

    Raises
    ------
    CheckpointError
        The hub cannot be reached or refuses.
    """
    if not is_name(repo_id):
        raise CheckpointError(f"{repo_id!r} is no name of a repository; it is 'org/name'")
    client = _client(repo_id)
    warnings.warn(
        "gene names, condition labels (the donors among them), numbers of training cells, which of them were held out "
        f"(in their order, without names) and the training history are uploaded to {repo_id} with the weights "
        f"({'private' if private else 'PUBLIC'} if the repository is new)",
        UserWarning,
        stacklevel=3,
    )
    with _explained(repo_id, revision):
        client.create_repo(repo_id, private=private, exist_ok=True, token=token)
        if revision is not None:
            client.create_branch(repo_id, branch=revision, exist_ok=True, token=token)
        done = client.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            token=token,
            commit_message=commit_message or "Add a scldm_cd4 model",
        )
    return str(done.commit_url)


def _client(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"there is no local folder {name}, and models on the hub need huggingface_hub: pip install 'scldm_cd4[hub]'"
        ) from error
    return huggingface_hub.HfApi(library_name="scldm_cd4")


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    at = "" if revision is None else f" at revision {revision!r}"
    failed: tuple[type[Exception], ...] = (errors.HFValidationError, *errors.HfHubHTTPError.__bases__)  # HTTP client
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} asks to accept its terms first: open its page on the hub, then log in"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no local folder {name} and no model {name} on the hub that you may see; for a private one, log "
            "in (hf auth login) or pass token="
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise CheckpointError(
            f"{name}{at} is not in the local cache, and the hub could not be asked{offline}: connect once, or give a "
            "local folder"
        ) from error
    except failed as error:
        raise CheckpointError(f"the hub refuses {name}{at}, or cannot be reached: {error}") from error
