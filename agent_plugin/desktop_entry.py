"""The desktop entry by which a desktop starts propmaster with a URL. Pure.

Source: https://specifications.freedesktop.org/desktop-entry-spec/latest/
"""

import os
import re
from collections.abc import Sequence
from typing import Final

from agent_plugin.content.errors import SettingsInvalidError

# By which an entry of ours is known, whatever program it names.
_MARK: Final = "X-Propmaster-Handler=true\n"
# https://specifications.freedesktop.org/desktop-entry-spec/latest/exec-variables.html
_QUOTED: Final = re.compile(r'(["`$\\])')
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+:@,-]+")


def kind_of(scheme: str) -> str:
    """Return the type that URLs of a scheme have for desktops."""
    return f"x-scheme-handler/{scheme}"


def is_ours(entry: bytes) -> bool:
    """Whether an entry was made here."""
    return _MARK.encode() in entry


def command_of(entry: bytes) -> str:
    """Return what an entry starts; empty if it starts nothing."""
    found = re.search(rb"^Exec=(.*)$", entry, re.MULTILINE)
    return os.fsdecode(found[1]) if found else ""


def entry_of(command: Sequence[str], schemes: Sequence[str]) -> bytes:
    """Return the entry that starts a command for URLs of some schemes.

    Raises:
        SettingsInvalidError: The command can not stand in one.
    """
    # The one is forbidden there; with the other GLib looks for the program as it is spelled here.
    if {"=", "%"} & set(command[0]):
        raise _unfit(command[0])
    program = " ".join(map(_exec_word, command))
    types = "".join(f"{kind_of(scheme)};" for scheme in schemes)
    text = (
        "[Desktop Entry]\n"
        "Type=Application\n"
        "Name=propmaster: download outputs\n"
        "Comment=Brings the outputs of a render job to this computer\n"
        f"Exec={program} handle-url --prompt-when-complete -- %u\n"
        "Terminal=true\n"
        "NoDisplay=true\n"
        f"MimeType={types}\n"
        f"{_MARK}"
    )
    return os.fsencode(text)


def _exec_word(word: str) -> str:
    """Return a word as it stands in an Exec line: quoted, then escaped like any value."""
    if not word.isprintable():
        raise _unfit(word)
    if _PLAIN.fullmatch(word):
        return word
    quoted = _QUOTED.sub(r"\\\1", word).replace("%", "%%")
    return '"' + quoted.replace("\\", "\\\\") + '"'


def _unfit(word: str) -> SettingsInvalidError:
    return SettingsInvalidError(
        f"{word!r} can not stand in a desktop entry",
        hint="install propmaster below a path of letters, digits, `.`, `-` and `_`",
    )
