"""`url-handler`: propmaster becomes the default for its URLs, and everything else stays.

What desktops make of the files is asked of their own programs, where this host has them.
"""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import LocalReadError, LocalWriteError, SettingsInvalidError
from agent_plugin.session.download_url import SCHEMES
from agent_plugin.url_handler import DESKTOP_ID, Desktop, install, status, uninstall
from tests.servers.command import CALL_SECONDS, Command

COMMAND = ["/opt/propmaster/bin/propmaster"]
THEIRS = (
    b"# mine\r\n[Added Associations]\ntext/html=vim.desktop;\n\n[Default Applications]\n"
    b"text/html=firefox.desktop;\nx-scheme-handler/deadline=deadline.desktop;\n\xff"
)
# Without the last line, which GLib's parser does not survive.
READABLE = THEIRS.removesuffix(b"\xff")
CLIENTS = (
    "[Desktop Entry]\nType=Application\nName=deadline\nExec=true handle-web-url %u\n"
    "Terminal=true\nMimeType=x-scheme-handler/deadline\n"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def desktop(home: Path) -> Desktop:
    return Desktop.of_user({"HOME": str(home)})


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (
            stat.S_IMODE(path.stat().st_mode),
            b"" if path.is_dir() else path.read_bytes(),
        )
        for path in root.rglob("*")
        if path.name != "mimeinfo.cache"
    }


def run(program: str, *arguments: str | Path, home: Path) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"this host has no {program}")
    done = subprocess.run(
        [program, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "XDG_DATA_DIRS": f"{home}/none"},
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )
    return f"{done.stdout}{done.stderr}".strip()


def with_their_files(desktop: Desktop, data: bytes = THEIRS) -> None:
    desktop.applications.mkdir(parents=True)
    (desktop.applications / "deadline.desktop").write_text(CLIENTS)
    (desktop.applications / "firefox.desktop").write_text(CLIENTS)
    desktop.defaults.parent.mkdir()
    desktop.defaults.write_bytes(data)
    desktop.defaults.chmod(0o640)


def test_it_comes_and_goes_and_leaves_every_other_byte(desktop: Desktop, home: Path) -> None:
    with_their_files(desktop)
    before = tree(home)

    installed = install(desktop, SCHEMES, COMMAND)

    assert installed.state == "installed"
    assert installed.defaults == dict.fromkeys(SCHEMES, DESKTOP_ID)
    assert installed.before == {"deadline": "deadline.desktop", "propmaster": ""}
    assert installed.command.startswith("/opt/propmaster/bin/propmaster handle-url")
    assert desktop.defaults.read_bytes() == THEIRS.replace(
        b"[Default Applications]\ntext/html=firefox.desktop;\nx-scheme-handler/deadline=",
        b"[Default Applications]\nx-scheme-handler/propmaster=propmaster-url.desktop;\n"
        b"text/html=firefox.desktop;\nx-scheme-handler/deadline=propmaster-url.desktop;",
    )
    assert stat.S_IMODE(desktop.defaults.stat().st_mode) == 0o640
    record = desktop.records / "url-handler.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    changed = tree(home)
    assert install(desktop, SCHEMES, COMMAND) == installed
    assert tree(home) == changed

    assert uninstall(desktop).state == "absent"
    assert tree(home) == before
    assert uninstall(desktop).state == "absent"
    assert tree(home) == before


def test_a_home_that_had_nothing_has_nothing_again(desktop: Desktop, home: Path) -> None:
    install(desktop, SCHEMES, COMMAND)
    assert status(desktop).state == "installed"

    uninstall(desktop)

    assert list(home.iterdir()) == []


def test_changes_that_were_made_since_stay(desktop: Desktop) -> None:
    with_their_files(desktop)
    install(desktop, SCHEMES, COMMAND)
    more = b"\nimage/png=gimp.desktop\n"
    data = desktop.defaults.read_bytes().replace(b"firefox", b"chromium")
    desktop.defaults.write_bytes(data + more)

    uninstall(desktop)

    assert desktop.defaults.read_bytes() == THEIRS.replace(b"firefox", b"chromium") + more


def test_one_scheme_and_then_the_other_and_a_new_program(desktop: Desktop) -> None:
    with_their_files(desktop)
    first = install(desktop, ["propmaster"], COMMAND)
    assert first.defaults == {"propmaster": DESKTOP_ID}
    assert status(desktop, SCHEMES).defaults["deadline"] == "deadline.desktop"

    both = install(desktop, ["deadline"], ["/usr/bin/python3", "-m", "agent_plugin"])

    assert both.defaults == dict.fromkeys(SCHEMES, DESKTOP_ID)
    assert both.command.startswith("/usr/bin/python3 -m agent_plugin handle-url")
    assert b"MimeType=x-scheme-handler/propmaster;x-scheme-handler/deadline;\n" in (
        desktop.entry.read_bytes()
    )
    uninstall(desktop)
    assert desktop.defaults.read_bytes() == THEIRS


def test_installations_at_once_lose_nothing_of_each_other(desktop: Desktop) -> None:
    """Seen to fail when they are not kept apart by a lock."""
    with_their_files(desktop)

    for _ in range(20):
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(install, desktop, [scheme], COMMAND) for scheme in SCHEMES]
            assert [each.result().state for each in both] == ["installed", "installed"]
        assert status(desktop, SCHEMES).state == "installed"
        assert uninstall(desktop).state == "absent"
        assert desktop.defaults.read_bytes() == THEIRS


def test_a_stopped_installation_is_not_waited_for_for_ever(
    desktop: Desktop, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_plugin.url_handler._LOCK_SECONDS", 0.1)
    stopped = os.open(home, os.O_RDONLY)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    try:
        with pytest.raises(LocalWriteError, match="another process has kept"):
            install(desktop, SCHEMES, COMMAND)
        with pytest.raises(LocalWriteError, match="another process has kept"):
            uninstall(desktop)
        assert list(home.iterdir()) == []
    finally:
        os.close(stopped)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"mimeapps":"', '"mimeapps":"!'),
        lambda text: text.replace('"written":"', '"written":"A'),
        lambda text: text.replace('"deadline"', '"deadline;evil"'),
        lambda text: text[:-9],
        lambda _: "[" * 100_000,
        lambda _: "\xff",
        lambda _: "",
    ],
)
def test_a_damaged_record_is_told_and_propmaster_can_go_all_the_same(
    desktop: Desktop, damage: Any
) -> None:
    """By what stands in the list; seen to crash when the base64 in it is damaged."""
    with_their_files(desktop)
    install(desktop, SCHEMES, COMMAND)
    record = desktop.records / "url-handler.json"
    damaged = damage(record.read_text()).encode("latin-1")
    record.write_bytes(damaged)

    with pytest.raises(LocalReadError, match=r"url-handler.json can not be read") as refused:
        install(desktop, SCHEMES, COMMAND)
    assert "url-handler uninstall" in refused.value.hint
    told = status(desktop)
    assert (told.state, told.before) == ("installed", {})
    assert "url-handler.json can not be read" in told.damage
    gone = uninstall(desktop)

    assert gone.state == "absent"
    assert f"{record}.damaged" in gone.damage
    assert str(desktop.defaults) in gone.damage
    assert gone.defaults == {"deadline": "deadline.desktop", "propmaster": ""}
    # The form of the line is what is lost.
    assert desktop.defaults.read_bytes() == THEIRS
    assert Path(f"{record}.damaged").read_bytes() == damaged
    assert install(desktop, SCHEMES, COMMAND).before["deadline"] == "deadline.desktop"
    assert uninstall(desktop).damage == ""


def test_a_record_leads_to_no_directory_but_those_that_are_ours(
    desktop: Desktop, home: Path
) -> None:
    """Seen to fail when each directory of the record is removed."""
    install(desktop, SCHEMES, COMMAND)
    (home / "empty").mkdir()
    record = desktop.records / "url-handler.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "made": [*document["made"], str(home / "empty")]}))

    uninstall(desktop)

    assert list(home.iterdir()) == [home / "empty"]


def test_an_interrupted_installation_is_gone_after_uninstall(
    desktop: Desktop, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever had been written when it was stopped."""
    with_their_files(desktop)
    before = tree(home)
    replace = Path.replace
    for stop_at in range(1, 4):
        calls = iter(range(1, 100))

        def stopping(path: Path, target: Path, at: int = stop_at, calls: Any = calls) -> Path:
            if next(calls) == at:
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping)
            with pytest.raises(KeyboardInterrupt):
                install(desktop, SCHEMES, COMMAND)
        for path in [each for each in home.rglob(".*") if each.is_file()]:
            path.unlink()
        uninstall(desktop)
        assert tree(home) == before, stop_at


def test_a_list_behind_a_link_is_changed_where_it_is(desktop: Desktop, home: Path) -> None:
    dotfiles = home / "dotfiles"
    dotfiles.mkdir()
    (dotfiles / "mimeapps.list").write_bytes(THEIRS)
    desktop.defaults.parent.mkdir()
    desktop.defaults.symlink_to(dotfiles / "mimeapps.list")

    install(desktop, SCHEMES, COMMAND)

    assert desktop.defaults.is_symlink()
    assert b"propmaster-url.desktop" in (dotfiles / "mimeapps.list").read_bytes()
    uninstall(desktop)
    assert desktop.defaults.is_symlink()
    assert (dotfiles / "mimeapps.list").read_bytes() == THEIRS


def test_another_programs_entry_is_not_touched(desktop: Desktop) -> None:
    desktop.applications.mkdir(parents=True)
    desktop.entry.write_text(CLIENTS)

    with pytest.raises(LocalReadError, match="another program's"):
        install(desktop, SCHEMES, COMMAND)
    uninstall(desktop)

    assert desktop.entry.read_text() == CLIENTS
    assert not desktop.defaults.exists()


@pytest.mark.parametrize(
    "word", ["/opt/a=b/propmaster", "/opt/100%/propmaster", "/opt/a\nExec=evil"]
)
def test_a_program_that_no_entry_can_name_is_refused(desktop: Desktop, word: str) -> None:
    with pytest.raises(SettingsInvalidError, match="can not stand in a desktop entry"):
        install(desktop, SCHEMES, [word])


def test_a_list_that_a_desktop_prefers_is_told(home: Path) -> None:
    desktop = Desktop.of_user({"HOME": str(home), "XDG_CURRENT_DESKTOP": "ubuntu:GNOME"})
    install(desktop, SCHEMES, COMMAND)
    overriding = home / ".config/gnome-mimeapps.list"
    overriding.write_bytes(THEIRS)

    found = status(desktop)

    assert (found.state, found.overridden_by) == ("incomplete", str(overriding))


def test_a_host_can_have_it_for_all_users(tmp_path: Path) -> None:
    desktop = Desktop.of_system(tmp_path)

    installed = install(desktop, SCHEMES, COMMAND)

    assert installed.desktop_file == f"{tmp_path}/usr/local/share/applications/{DESKTOP_ID}"
    assert (tmp_path / "etc/xdg/mimeapps.list").read_text() == (
        "[Default Applications]\nx-scheme-handler/propmaster=propmaster-url.desktop;\n"
        "x-scheme-handler/deadline=propmaster-url.desktop;\n"
    )
    uninstall(desktop)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- as the desktop sees it


def test_the_desktops_own_tool_finds_propmaster_and_then_who_was_there(
    desktop: Desktop, home: Path
) -> None:
    with_their_files(desktop, READABLE)
    asked = ("query", "default", "x-scheme-handler/deadline")
    assert run("xdg-mime", *asked, home=home) == "deadline.desktop"

    # It passes over an entry whose program is not there.
    install(desktop, SCHEMES, [sys.executable, "-m", "agent_plugin"])

    assert run("xdg-mime", *asked, home=home) == DESKTOP_ID
    assert run("xdg-mime", *asked[:2], "x-scheme-handler/propmaster", home=home) == DESKTOP_ID
    assert run("xdg-mime", *asked[:2], "text/html", home=home) == "firefox.desktop"
    uninstall(desktop)
    assert run("xdg-mime", *asked, home=home) == "deadline.desktop"


def test_gnome_finds_propmaster_and_then_who_was_there(desktop: Desktop, home: Path) -> None:
    with_their_files(desktop, READABLE)
    program = home / "bin dir/propmaster"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    install(desktop, SCHEMES, [str(program)])

    assert DESKTOP_ID in run("gio", "mime", "x-scheme-handler/deadline", home=home).splitlines()[0]
    uninstall(desktop)
    assert "deadline.desktop" in run("gio", "mime", "x-scheme-handler/deadline", home=home)


@pytest.mark.parametrize("program", ["/opt/propmaster", '/opt/a b/"q"/$HOME`x`\\y/propmaster'])
def test_the_entry_is_a_valid_one(desktop: Desktop, home: Path, program: str) -> None:
    install(desktop, SCHEMES, [program])

    assert run("desktop-file-validate", desktop.entry, home=home) == ""


def test_what_gnome_starts_is_the_program_with_the_url_as_one_word(
    desktop: Desktop, home: Path
) -> None:
    """Launched by GLib's own code, in whose eyes nothing in the URL is a shell's."""
    seen = home / "seen"
    program = home / 'a b "q" $HOME `x` \\y' / "propmaster"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{seen}.new"; mv "{seen}.new" "{seen}"\n')
    program.chmod(0o755)
    install(desktop, SCHEMES, [str(program)])
    # No terminal is to be had here.
    desktop.entry.write_bytes(desktop.entry.read_bytes().replace(b"Terminal=true\n", b""))
    url = "deadline://download-output?farm-id=$(touch%20x)&queue-id=;reboot&job-id=`id`"

    assert run("gio", "launch", desktop.entry, url, home=home) == ""

    for _ in range(500):
        if seen.exists():
            break
        subprocess.run(["sleep", "0.01"], check=True)
    assert seen.read_text().splitlines() == ["handle-url", "--prompt-when-complete", "--", url]


def test_the_command_installs_tells_and_uninstalls(home: Path) -> None:
    command = Command(home.parent / "host")
    (home / ".config").mkdir()
    (home / ".config/mimeapps.list").write_bytes(THEIRS)

    absent = command("url-handler", "status")
    installed = command("url-handler", "install", "--json")
    told = command("url-handler", "status")
    gone = command("url-handler", "uninstall", "--json")

    assert (absent.code, absent.text.splitlines()[0]) == (0, "state: absent")
    assert installed.json["state"] == "installed"
    assert "handle-url --prompt-when-complete -- %u" in installed.json["command"]
    assert "default for deadline: propmaster-url.desktop, before deadline.desktop" in told.text
    assert gone.json["state"] == "absent"
    assert (home / ".config/mimeapps.list").read_bytes() == THEIRS
    assert json.loads(gone.stdout)["defaults"]["deadline"] == "deadline.desktop"
