"""The file beside a destination, and who may give it the destination's name."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from agent_plugin.content.errors import LocalWriteError
from agent_plugin.content.leftovers import partial_name
from agent_plugin.transfer.copy_partial import PartialFile, growing


@pytest.mark.parametrize("overwrite", [True, False])
def test_t1_who_has_lost_the_file_to_another_attempt_does_not_place_it(
    tmp_path: Path, *, overwrite: bool
) -> None:
    """As an engine that stood still while another went on with a source that had changed.

    Seen to fail when whatever has the file's name is moved.
    """

    def attempt(etag: str) -> AbstractContextManager[PartialFile]:
        return growing(
            tmp_path / "a", partial_name("copy"), {"etag": etag, "size": 4}, {},
            begun=lambda _identity: None, drops=lambda: False,
        )  # fmt: skip

    with attempt("old") as lost, attempt("new") as file:
        with pytest.raises(LocalWriteError, match="begun it anew"):
            lost.place(0.0, overwrite=overwrite)
        assert not (tmp_path / "a").exists()

        file.place(0.0, overwrite=overwrite)
        assert (tmp_path / "a").exists()
