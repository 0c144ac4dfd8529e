"""Settings come from one strict file and two variables, and have a default for everything."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.settings import (
    CacheSettings,
    Settings,
    WorkerSettings,
    load,
    load_explained,
)
from agent_plugin.sizes import Rate, Size

GIB = 1024**3
HOME = {"HOME": "/home/someone"}


def load_text(text: str, tmp_path: Path, environment: dict[str, str] | None = None) -> Settings:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, environment=environment or HOME, user_id=1000)


def load_default(
    environment: dict[str, str], tmp_path: Path, user_id: int | None = 1000
) -> Settings:
    return load(environment=environment, default_file=tmp_path / "absent", user_id=user_id)


def refused(text: str, tmp_path: Path) -> SettingsInvalidError:
    with pytest.raises(SettingsInvalidError) as caught:
        load_text(text, tmp_path)
    return caught.value


def test_without_a_file_everything_has_its_default(tmp_path: Path) -> None:
    settings = load_default(HOME, tmp_path)

    assert settings.store.concurrency == 16
    assert settings.store.existence_max_age == 86400
    assert settings.store.least_bytes_per_second == 16 * 1024
    assert settings.cache.shared_between_stores is False
    assert settings.outputs.upload_failed is False
    assert settings.mounts.verify == "stream"
    assert settings.mounts.passthrough == "auto"


def test_root_has_the_systems_directories(tmp_path: Path) -> None:
    paths = load_default({}, tmp_path, user_id=0).paths

    assert paths.cache_dir == Path("/var/cache/propmaster")
    assert paths.state_dir == Path("/var/lib/propmaster")


def test_a_user_has_directories_below_home_or_where_xdg_says(tmp_path: Path) -> None:
    paths = load_default(HOME, tmp_path).paths
    assert paths.cache_dir == Path("/home/someone/.cache/propmaster")
    assert paths.state_dir == Path("/home/someone/.local/state/propmaster")

    environment = HOME | {"XDG_CACHE_HOME": "/fast/cache", "XDG_STATE_HOME": "relative"}
    paths = load_default(environment, tmp_path).paths
    assert paths.cache_dir == Path("/fast/cache/propmaster")
    assert paths.state_dir == Path("/home/someone/.local/state/propmaster")


def test_a_user_without_home_must_set_the_directories(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalidError, match="no HOME") as caught:
        load_default({}, tmp_path)
    assert "PROPMASTER_CACHE_DIR" in caught.value.hint


def test_variables_override_the_files_directories(tmp_path: Path) -> None:
    text = '[paths]\ncache_dir = "/file/cache"\nstate_dir = "/file/state"\n'

    paths = load_text(text, tmp_path, HOME | {"PROPMASTER_STATE_DIR": "/variable"}).paths

    assert paths.cache_dir == Path("/file/cache")
    assert paths.state_dir == Path("/variable")


def test_a_variable_that_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalidError, match=r"PROPMASTER_CACHE_DIR: 'a/b' is no directory"):
        load_default(HOME | {"PROPMASTER_CACHE_DIR": "a/b"}, tmp_path)


def test_every_setting_can_be_set(tmp_path: Path) -> None:
    settings = load_text(
        """
        [paths]
        cache_dir = "/a"
        state_dir = "/b"
        [cache]
        max_bytes = "200 GiB"
        min_free = "10 %"
        shared_between_stores = true
        [store]
        concurrency = 8
        attempts = 3
        deadline_seconds = 60
        connect_timeout = 1.5
        read_timeout = 2
        least_bytes_per_second = 1
        existence_max_age = 0
        download_limit = "50 MiB"
        upload_limit = 16384
        [outputs]
        upload_failed = true

        [mounts]
        verify = "strict"
        passthrough = "off"
        """,
        tmp_path,
    )

    assert settings.paths.cache_dir == Path("/a")
    assert settings.cache == CacheSettings(Size(200 * GIB), Size(percent=10.0), True)
    assert settings.store.concurrency == 8
    assert settings.store.deadline_seconds == 60.0
    assert settings.store.least_bytes_per_second == 1
    assert settings.store.existence_max_age == 0
    assert settings.store.download_limit == Rate(50 * 1024**2)
    assert settings.store.upload_limit == Rate(16384)
    assert settings.outputs.upload_failed is True
    assert settings.mounts.verify == "strict"
    assert settings.mounts.passthrough == "off"


def test_the_file_is_the_named_one_else_the_variables_else_the_systems(tmp_path: Path) -> None:
    files = {}
    for number, name in enumerate(("named", "variable", "system"), start=1):
        files[name] = tmp_path / name
        files[name].write_text(f"store.concurrency = {number}")
    variable = HOME | {"PROPMASTER_CONFIG": str(files["variable"])}

    def concurrency(config: Path | None, environment: dict[str, str]) -> int:
        settings = load(config, environment=environment, default_file=files["system"], user_id=1000)
        return settings.store.concurrency

    assert concurrency(files["named"], variable) == 1
    assert concurrency(None, variable) == 2
    assert concurrency(None, HOME) == 3


def test_a_named_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    with pytest.raises(SettingsInvalidError, match=r"absent\.toml: there is no such file"):
        load(absent, environment=HOME, user_id=1000)
    with pytest.raises(SettingsInvalidError, match=r"absent\.toml: there is no such file"):
        load_default(HOME | {"PROPMASTER_CONFIG": str(absent)}, tmp_path)


def test_a_file_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalidError, match="can not be read: Is a directory"):
        load(tmp_path, environment=HOME, user_id=1000)
    (tmp_path / "latin").write_bytes(b"# \xe9")
    with pytest.raises(SettingsInvalidError, match="latin is not UTF-8"):
        load(tmp_path / "latin", environment=HOME, user_id=1000)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[store", "config.toml is not TOML: ", ""),
        (
            "\n[store]\nconcurrent = 3",
            "config.toml, line 3: store.concurrent: unknown key",
            "did you mean concurrency? known: concurrency, attempts,",
        ),
        (
            "[caches]\nmax_bytes = 3",
            "config.toml, line 1: caches: unknown key",
            "did you mean cache? known: paths, inputs, cache, store, outputs",
        ),
        (
            "[cache]\n[store]\nattempts = 1\nconcurrency = 500",
            "config.toml, line 4: store.concurrency: expected `int` <= 256",
            "allowed: a whole number from 1 to 256",
        ),
        (
            "store.attempts = '3'",
            "config.toml, line 1: store.attempts: expected `int`, got `str`",
            "",
        ),
        (
            "store = { attempts = '3' }",
            "config.toml, line 1: store.attempts: expected `int`, got `str`",
            "",
        ),
        (
            "[cache]\n# the most\nmax_bytes = '5 apples'",
            "config.toml, line 3: cache.max_bytes: '5 apples' is no size; allowed: bytes as",
            "",
        ),
        ("[cache]\nmin_free = '101 %'", "config.toml, line 2: cache.min_free: '101 %' is no", ""),
        ("[cache]\nmax_bytes = -1", "config.toml, line 2: cache.max_bytes: -1 is no size", ""),
        ("[cache]\nmax_bytes = true", "config.toml, line 2: cache.max_bytes: true is no size", ""),
        (
            "[paths]\ncache_dir = 'cache'",
            "config.toml, line 2: paths.cache_dir: 'cache' is no directory; allowed: an absolute",
            "",
        ),
        (
            "store.upload_limit = '5 %'",
            "config.toml, line 1: store.upload_limit: '5 %' is no limit; allowed: bytes a second",
            "",
        ),
        ("store.download_limit = 1", "config.toml, line 1: store.download_limit: 1 is no", ""),
        # Seen to be told without its line, and to crash the command when the path was used.
        ("\nstor.concurrency = 8", "config.toml, line 2: stor: unknown key", ""),
        (
            '[paths]\nstate_dir = "/a\\u0000b"',
            "config.toml, line 2: paths.state_dir: '/a\\x00b' is no directory",
            "",
        ),
        (
            "worker.session_roots = '/sessions'",
            "config.toml, line 1: worker.session_roots: expected `array`, got `str`",
            'allowed: a list: ["…", "…"]',
        ),
        ("worker.agent_user = 5", "config.toml, line 1: worker.agent_user", 'allowed: text: "…"'),
        ("paths = 3", "config.toml, line 1: paths: expected `object`, got `int`", ""),
        (
            "store.least_bytes_per_second = 0",
            "config.toml, line 1: store.least_bytes_per_second: ",
            "",
        ),
        ("store.read_timeout = nan", "config.toml, line 1: store.read_timeout: ", ""),
        ("store.read_timeout = inf", "config.toml, line 1: store.read_timeout: ", ""),
    ],
)
def test_what_is_not_allowed_is_named_with_file_line_and_key(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    error = refused(text, tmp_path)

    assert error.message.startswith(f"{tmp_path}/{message}")
    assert error.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, Size(0)),
        (12345, Size(12345)),
        ("12345", Size(12345)),
        ("1 KiB", Size(1024)),
        ("1.5GB", Size(1_500_000_000)),
        (" 2 tib ", Size(2 * 1024**4)),
        ("7 B", Size(7)),
        ("5 %", Size(percent=5.0)),
        ("2.5%", Size(percent=2.5)),
    ],
)
def test_sizes_are_bytes_or_text_with_a_unit(text: object, size: Size) -> None:
    assert Size.parse(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e9", "٣", 1.5, True, None, 2**63, []])
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no size"):
        Size.parse(text)


def test_a_part_of_the_disk_is_of_the_file_system_that_the_directory_will_be_on(
    tmp_path: Path,
) -> None:
    filesystem = os.statvfs(tmp_path)
    total = filesystem.f_blocks * filesystem.f_frsize

    assert Size(percent=50.0).on(tmp_path / "not" / "there" / "yet") == total // 2
    assert Size(7).on(tmp_path) == 7


def test_the_cache_takes_a_quarter_of_the_disk_and_leaves_a_twentieth_unless_told(
    tmp_path: Path,
) -> None:
    filesystem = os.statvfs(tmp_path)
    total = filesystem.f_blocks * filesystem.f_frsize

    assert CacheSettings().max_bytes_on(tmp_path) == total // 4
    assert CacheSettings(max_bytes=Size(5)).max_bytes_on(tmp_path) == 5
    assert CacheSettings().min_free_bytes_on(tmp_path) == max(total * 5 // 100, GIB)
    assert CacheSettings(min_free=Size(0)).min_free_bytes_on(tmp_path) == 0


def test_a_small_disk_keeps_a_gibibyte_free() -> None:
    # procfs has no blocks at all.
    assert CacheSettings().min_free_bytes_on(Path("/proc")) == GIB


def test_loading_defaults_loads_neither_the_toml_parser_nor_a_client() -> None:
    program = (
        "import sys; from agent_plugin.settings import load; load();"
        "print(sorted({'tomllib', 'boto3', 'botocore', 'difflib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.strip() == "[]"


QUEUE = "queue-" + "9" * 32
OTHER_QUEUE = "queue-" + "8" * 32


def test_a_queues_table_holds_for_what_it_sets_and_the_general_one_for_the_rest(
    tmp_path: Path,
) -> None:
    settings = load_text(
        f"""
        [store]
        concurrency = 8
        attempts = 3
        [mounts]
        verify = "strict"
        [queues."{QUEUE}"]
        inputs.file_system = "VIRTUAL"
        store.concurrency = 32
        [queues."{QUEUE}".paths]
        cache_dir = "/fast"
        [queues."{QUEUE}".cache]
        max_bytes = "1 TiB"
        """,
        tmp_path,
    )
    queue = settings.for_queue(QUEUE)

    assert queue.inputs.wished == "VIRTUAL"
    assert (queue.store.concurrency, queue.store.attempts) == (32, 3)
    assert queue.mounts.verify == "strict"
    assert queue.paths.cache_dir == Path("/fast")
    assert queue.cache.max_bytes == Size(1024**4)
    assert queue.paths.state_dir == settings.paths.state_dir
    assert settings.is_own(QUEUE, "store.concurrency")
    assert not settings.is_own(QUEUE, "store.attempts")
    assert settings.for_queue(OTHER_QUEUE) == settings.for_queue("") == settings
    assert settings.inputs.wished is None
    assert settings.store.concurrency == 8


def test_a_variable_comes_before_a_queues_directory_as_well(tmp_path: Path) -> None:
    text = f'[queues."{QUEUE}".paths]\ncache_dir = "/queue/cache"\n'

    settings = load_text(text, tmp_path, HOME | {"PROPMASTER_CACHE_DIR": "/variable"})

    assert settings.for_queue(QUEUE).paths.cache_dir == Path("/variable")


def test_a_directory_has_one_size_whoever_uses_it(tmp_path: Path) -> None:
    of_queue = f'[queues."{QUEUE}"]\npaths.cache_dir = "/x"\ncache.max_bytes = 3\n'
    of_other = f'[queues."{OTHER_QUEUE}"]\npaths.cache_dir = "/x"\n'

    between = refused(f"{of_queue}{of_other}", tmp_path)
    general = refused(f'paths.cache_dir = "/x"\n{of_queue}', tmp_path)

    assert between.message == (
        f'{tmp_path}/config.toml, line 5: queues."{OTHER_QUEUE}".paths.cache_dir: that directory'
        f' has other sizes by [queues."{QUEUE}"]'
    )
    assert between.hint.startswith("set cache.max_bytes and cache.min_free alike, or another")
    assert general.message.endswith("that directory has other sizes by [cache]")
    load_text(f"{of_queue}{of_other}cache.max_bytes = 3\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            '\n[queues."nope"]\n',
            'line 2: queues."nope": no id of a queue',
            "allowed: `queue-` and 32 hexadecimal digits in lower case: queue-0",
        ),
        ("queues = 3", "line 1: queues: a table is expected", 'allowed: [queues."queue-…"]'),
        (
            f'[queues]\n"{QUEUE}" = 3',
            f'line 2: queues."{QUEUE}": a table is expected',
            "known: paths, inputs, cache",
        ),
        (
            f'[queues."{QUEUE}"]\n[queues."{QUEUE}".store]\n# so many\nconcurrency = 0\n',
            f'line 4: queues."{QUEUE}".store.concurrency: expected `int` >= 1',
            "allowed: a whole number from 1 to 256",
        ),
        (
            f'[queues."{QUEUE}"]\ninputs.file_system = "virtual"\n',
            f"line 2: queues.\"{QUEUE}\".inputs.file_system: 'virtual' is not allowed",
            "allowed: AUTO, COPIED, JOB, VIRTUAL",
        ),
        (
            f'[queues."{QUEUE}"]\nfile_system = "VIRTUAL"\n',
            f'line 2: queues."{QUEUE}".file_system: unknown key',
            "did you mean inputs.file_system? known: paths, inputs, cache, store, outputs, mounts",
        ),
        (
            f'[queues."{QUEUE}".paths]\nstate_dir = "/x"\n',
            f'line 2: queues."{QUEUE}".paths.state_dir: unknown key',
            "did you mean cache_dir? known: cache_dir",
        ),
        (
            f'[queues."{QUEUE}".worker]\nagent_user = "x"\n',
            f'line 1: queues."{QUEUE}".worker: unknown key',
            "known: paths, inputs,",
        ),
        (
            f'[queues."{QUEUE}"]\nmounts = {{ verify = 3 }}',
            f'line 2: queues."{QUEUE}".mounts.verify: expected `str`, got `int`',
            "allowed: stream, strict",
        ),
        (
            f'[queues."{QUEUE}".cache]\nmax_bytes = 3\n',
            f'line 2: queues."{QUEUE}".cache.max_bytes: the sizes are those of a directory',
            "set paths.cache_dir in the queue's table too",
        ),
    ],
)
def test_what_is_wrong_in_a_queues_table_is_named_with_its_line(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    error = refused(text, tmp_path)

    assert error.message.startswith(f"{tmp_path}/config.toml, {message}")
    assert error.hint.startswith(hint)


def test_lines_are_found_whatever_stands_between_them(tmp_path: Path) -> None:
    text = """
        [outputs] # [store]
        upload_failed = false # = [
        [paths]
        'cache_dir' = '''
/[a]'''
        "state_dir" = '/b"' # "
        [worker]
        session_roots = [
          '/a', # ]
          "/b\\"]",
        ]
        ['mounts']
        "verify" = 'loose'
        """

    error = refused(text, tmp_path)

    assert error.message.startswith(f"{tmp_path}/config.toml, line 14: mounts.verify: 'loose'")


def test_what_stands_in_an_array_is_no_key(tmp_path: Path) -> None:
    text = "[worker]\nagent_user = 3\nsession_roots = [\n  'agent_user'\n]\n"

    error = refused(text, tmp_path)

    assert error.message.startswith(f"{tmp_path}/config.toml, line 2: worker.agent_user: ")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_could_write_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "config.toml"
    file.write_text("store.attempts = 3\n")
    file.chmod(mode)

    with pytest.raises(SettingsInvalidError, match=f"others \\(mode 0{mode:o}\\)") as caught:
        load(file, environment=HOME)

    assert f"chmod go-w {file}" in caught.value.hint
    file.chmod(0o644)
    assert load(file, environment=HOME).store.attempts == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("store.attempts = 3\n")
    os.chown(file, 12345, 12345)

    with pytest.raises(SettingsInvalidError, match="belongs to user 12345"):
        load(file, environment=HOME)


def test_no_file_at_all_can_be_named() -> None:
    assert load(Path("/dev/null"), environment=HOME).store.attempts == 12


def test_where_a_setting_comes_from_is_known(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'[store]\nattempts = 3\nconcurrency = 8\n[queues."{QUEUE}".store]\nattempts = 4\n'
    )

    loaded = load_explained(
        file, environment=HOME | {"PROPMASTER_STATE_DIR": "/state"}, user_id=1000
    )

    assert loaded.source("store.attempts") == f"{file}:2"
    assert loaded.source("store.attempts", QUEUE) == f"{file}:5"
    assert loaded.source("store.concurrency", QUEUE) == f"{file}:3"
    assert loaded.source("store.read_timeout", QUEUE) == "built-in"
    assert loaded.source("paths.state_dir") == "PROPMASTER_STATE_DIR"
    assert loaded.source("paths.cache_dir") == "built-in"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(Size(), 0), (Size(5), 5), (Size(percent=100), psutil.virtual_memory().total)],
)
def test_the_memory_of_a_users_calls_is_bytes_or_a_part_of_the_hosts(
    chosen: Size, expected: int
) -> None:
    assert WorkerSettings(user_memory=chosen).user_memory_bytes() == expected


def test_a_table_that_a_queue_can_not_have_is_told_with_its_line(tmp_path: Path) -> None:
    told = refused(f'\n[queues."{QUEUE}"]\n\nworker.socket = "/a"\n', tmp_path)

    assert f'config.toml, line 4: queues."{QUEUE}".worker: unknown key' in told.message
