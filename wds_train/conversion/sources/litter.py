"""Names of files and folders that systems and programs leave behind, and that are nobody's samples.

Every source passes these over and counts them in its notes, so that a `.DS_Store` or a recycle bin
is never taken for an image or a class.

Sources: Microsoft's and Apple's documentation of the named files, Synology's and QNAP's of their
shared folders, and the `.gitignore` templates for Windows, macOS, Linux and editors that are common
on GitHub.
"""

import re
from typing import NamedTuple

# Origins, as the notes of a conversion give them.
SYSTEM = "left by the operating system"
STORAGE = "left by a storage device or a cloud drive"
DOWNLOAD = "an unfinished download"
EDITOR = "left by an editor or a program"


class Litter(NamedTuple):
    """A pattern that a whole name must match, and the origin of such names.

    Attributes:
        pattern: A regular expression; case does not matter.
        origin: The origin, as a note gives it.
        folders: True if it holds for folders, too: a class may be called `vehicle.part`.
    """

    pattern: str
    origin: str
    folders: bool = True


KINDS = (
    # Hidden on Linux and macOS: .DS_Store, ._photo.jpg, .Trash-1000, .ipynb_checkpoints,
    # .dropbox.cache, .@__thumb.
    Litter(r"\..*", SYSTEM),
    # Windows Explorer and NTFS. A stream such as photo.jpg:Zone.Identifier becomes a file
    # in archives and on WSL.
    Litter(r"(eh)?thumbs(_vista)?\.db(:encryptable)?", SYSTEM),
    Litter(r"desktop\.ini|iconcache\.db|ntuser\.dat.*", SYSTEM),
    Litter(r".*[:\uf03a]zone\.identifier", SYSTEM),
    Litter(r".*:(com\.apple\..*|encryptable|afp_.*|mshield|smartscreen)", SYSTEM),
    Litter(r"\$recycle\.bin|(?-i:RECYCLER)|system volume information|(?-i:FOUND)\.\d{3}", SYSTEM),
    Litter(r".*\.lnk", SYSTEM, folders=False),
    # macOS: a folder's icon, and what its archives and network drives hold.
    Litter(r"icon[\r\uf00d]", SYSTEM),
    Litter(r"__macosx|network trash folder|temporary items", SYSTEM),
    # Linux: where fsck puts what it recovers.
    Litter(r"lost\+found", SYSTEM),
    # Synology DSM (@eaDir, #recycle, #snapshot, @tmp) and QNAP QTS (@Recycle, @Recently-Snapshot,
    # @__thumb).
    Litter(
        r"@(eadir|tmp|synoeastream|synoresource|sharebin|appstore|download|s2s|img_bkp_cache)",
        STORAGE,
    ),
    Litter(r".*@syno(eastream|resource)", STORAGE),
    Litter(r"#(recycle|snapshot|trash)", STORAGE),
    Litter(r"@(recycle|recently-snapshot|recently_snapshot|__thumb|qmapping)", STORAGE),
    # Google Drive's links to documents, and the state of Dropbox and OneDrive.
    Litter(r".*\.(gdoc|gsheet|gslides|gform|gdraw|gmap|gsite|gshortcut)", STORAGE),
    Litter(r".*\.dropbox(\.attr|\.cache)?|dropbox\.attr", STORAGE),
    # Chrome, Firefox and wget, Edge, Opera, Safari, aria2, BitTorrent clients.
    Litter(
        r".*\.(crdownload|part|partial|opdownload|download|aria2|!ut|!qb|bc!|filepart|tmp|temp)",
        DOWNLOAD,
        folders=False,
    ),
    # Backups and swap files of editors, locks of Office and LibreOffice, Python's caches.
    Litter(r".*~|#.*#|~\$.*|.*\.(swp|swo|swx|bak|orig|kate-swp|pyc|pyo)", EDITOR, folders=False),
    Litter(r"__pycache__|node_modules", EDITOR),
)
# Compiled once: every file of a source is looked up.
_PATTERNS = [(re.compile(kind.pattern, re.IGNORECASE | re.DOTALL), kind) for kind in KINDS]


def litter_origin(name: str, *, folder: bool = False) -> str | None:
    """Return the origin of files or folders of this name.

    Args:
        name: The last part of a path, or of a tar member's name.
        folder: True for the name of a folder.

    Returns:
        One of the origins above; None for a name that may be a person's own.
    """
    for pattern, kind in _PATTERNS:
        if folder and not kind.folders:
            continue
        if pattern.fullmatch(name):
            return kind.origin
    return None


def is_litter(path: str) -> bool:
    """Return True if the file or tar member at `path` was left by a system or a program."""
    return litter_origin(path.rpartition("/")[2]) is not None
