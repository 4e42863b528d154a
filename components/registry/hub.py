"""Upload an exported folder to the Hugging Face hub, or to what answers at $HF_ENDPOINT: private unless told."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from infra.secrets import redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries of a call, each times a random 0.5 to 1.5
LIMIT = 1800.0  # seconds after which no further try begins
SILENCE = 120.0  # seconds in which the hub says something
OURS = (".gitattributes", "README.md")  # what a repository may hold before the first upload


class Uploaded(NamedTuple):
    """Where it is, which commit, and whether everybody can see it."""

    url: str
    commit: str
    public: bool


def check_repository(name: str) -> None:
    """ValueError unless a name can be `owner/name` on the hub."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) or ".." in name or "--" in name:
        raise ValueError(f"{name!r} cannot be a repository of the hub: name it OWNER/NAME, as in ada/my-model")


def upload(
    folder: Path,
    repository: str,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
) -> Uploaded:
    """The folder as one commit. ValueError for a repository that holds something else, or is seen by more people than
    was asked for; PermissionError without a token that may write; OSError if the hub cannot be reached.
    """
    check_repository(repository)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError("HF_HUB_OFFLINE is set: unset it to upload to the hub, or export to a folder")
    api = _api()
    until = time.monotonic() + LIMIT

    def call(action: Callable[[], T]) -> T:
        return _attempt(action, repository, until)

    call(lambda: api.create_repo(repository, private=not public, exist_ok=True))
    info = call(lambda: api.repo_info(repository))
    if not info.private and not public:
        raise ValueError(f"{repository} is public already: say --public if everybody may have the model")
    if public and info.private:
        raise ValueError(f"{repository} is private already: make it public on the hub, or leave --public out")
    if revision:
        call(lambda: api.create_branch(repository, branch=revision, exist_ok=True))
    there = set(call(lambda: api.list_repo_files(repository, revision=revision))) - set(OURS)
    mine = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if there and not overwrite:
        some = ", ".join(sorted(there)[:3])
        raise ValueError(f"{repository} holds files already ({some}): replace them with --overwrite")
    commit = call(
        lambda: api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message or "Exported with Earloom",
            revision=revision,
            delete_patterns=sorted(there - mine) or None,
        )
    )
    return Uploaded(f"{api.endpoint}/{repository}", str(commit.oid), public)


def _api() -> HfApi:
    """A client that does not wait for ever; the token comes from $HF_TOKEN or from `hf auth login`."""
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import default_client_factory  # the public names give one without a time limit

    def patient() -> Any:
        client = default_client_factory()
        client.timeout = SILENCE
        return client

    set_client_factory(patient)
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="earloom")


def _attempt(action: Callable[[], T], repository: str, until: float) -> T:
    """The call, again after a while if the reason may pass; its errors tell no token."""
    import httpx2  # what huggingface_hub talks HTTP with; its errors of the network come through
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for wait in (*WAITS, None):
        try:
            return action()
        except LocalTokenNotFoundError:
            raise PermissionError(
                f"no token to write {repository} with: set $HF_TOKEN, or run `hf auth login`"
            ) from None
        except HfHubHTTPError as error:
            status = _status(error)
            if status in (401, 403):
                raise PermissionError(
                    f"the hub refuses {repository} ({status}): set $HF_TOKEN to a token that may write there, or run "
                    "`hf auth login`"
                ) from None
            if status is not None and status < 500 and status not in (408, 429):
                raise ValueError(f"the hub refuses {repository} ({status}): {_said(error)}") from None
            reason: Exception = error
        except (OSError, httpx2.HTTPError) as error:
            reason = error
        pause = None if wait is None else wait * (0.5 + random.random())
        if pause is None or time.monotonic() + pause > until:
            raise OSError(
                f"the hub cannot be reached for {repository} ({_said(reason)}): check $HF_ENDPOINT and the network"
            )
        time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _said(error: Exception) -> str:
    return redacted(" ".join(str(error).split()))[:300] or type(error).__name__
