"""Names that may not lead out of where they belong: parts of a path, and names that become one folder or file.

Whatever comes from a manifest, a tar, an index, a registry or the command line passes here before it becomes a path
or a key. Object stores take `..` in a key as a name like any other and servers in front of them do not, so it is
refused everywhere.
"""

from __future__ import annotations

import os
from urllib.parse import unquote

LONGEST = 255  # bytes of a name, on nearly every file system
WEB = ("http://", "https://")


def pieces(part: str, base: str = "") -> list[str]:
    """The names in a relative path. ValueError if it is absolute, a URL, or holds `..` or a zero byte.

    Below a `base` on the web `%2e%2e` is `..` too, for clients and servers resolve it.
    """
    found = part.split("/")
    read = unquote(part).replace("\\", "/").split("/") if base.startswith(WEB) else found
    if (len(found) > 1 and not found[0]) or ".." in found or ".." in read or "\0" in part or "://" in part:
        raise ValueError(f"{part!r} leads out of its folder: name something below it, without .. and no leading /")
    return [piece for piece in found if piece not in ("", ".")]


def absolute(url: str) -> str:
    """The URL, or a local path that means the same in every process, wherever that was started."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def single(name: str, what: str) -> str:
    """The name itself, if it can be one file or folder and nothing else; ValueError that says `what` it was to name."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(_bytes(name)) > LONGEST:
        raise ValueError(
            f"{name[:80]!r} cannot be the name of {what}: it has to be one name of at most {LONGEST} bytes, without / "
            "and not .."
        )
    return name


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
