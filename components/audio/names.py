"""Which names below a data folder are read: none that a link leads out of it, none that a path cannot be made of."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable

from components.audio.rows import plain
from infra import storage

LEADS_OUT = "it is a link that leads out of the data folder; copy there what it leads to"
NOT_UTF8 = "the name is not UTF-8; rename the file"
NO_PATH = "no path can be made of the name (it is absolute or holds ..); rename the file"


class Fence:
    """Looks for links that lead out of the data folder `root`. The file `named` was asked for and may be anywhere."""

    def __init__(self, root: str, named: str = "") -> None:
        self.root, self.named = root, named
        self._folders: dict[str, bool] = {}  # many files share few folders, and to follow links takes many looks

    def outside(self, path: str) -> bool:
        """Whether the file at `path`, relative to the root, lies elsewhere."""
        folder = posixpath.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = storage.leads_out(self.root, folder)
        url = storage.join(self.root, path)
        if url == self.named:
            return False
        return self._folders[folder] or (storage.leads_out(self.root, path, last=True))


def name_faults(root: str, names: Iterable[str]) -> dict[str, str]:
    """Why some of the names of `storage.find(root, inside=True)` cannot be read."""
    fence = Fence(root)
    found: dict[str, str] = {}
    for name in names:
        if plain(name) != name:
            found[name] = NOT_UTF8
        elif name.startswith("/") or "://" in name or ".." in name.split("/"):  # a key of a store may be anything
            found[name] = NO_PATH
        elif name.endswith("/") or fence.outside(name):
            found[name] = LEADS_OUT
    return found


def hidden(name: str) -> bool:
    """Whether a file is of the system, not of the data: below a name that begins with a dot, or `__MACOSX`."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def spellings(path: str) -> list[str]:
    """A path as written, then with its letters composed, decomposed, and with backslashes as slashes."""
    forward = posixpath.normpath(path.replace("\\", "/"))
    windows = [] if forward.startswith(("/", "..")) else [forward]  # a file here may have such a name and be gone
    return list(dict.fromkeys([path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")), *windows]))


def unopened(root: str, error: OSError) -> str:
    """Why one file below `root` cannot be opened; raises `error` where the store itself cannot be reached."""
    if not storage.is_local(root) and not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        raise error
    return f"the file cannot be opened ({error.strerror or type(error).__name__}); check it"
