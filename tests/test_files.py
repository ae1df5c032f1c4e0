"""Files appear whole or not at all, and the file system's refusals are one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.errors import OutputError
from llmctl.files import atomic_path, ensure_writable, write_bytes, write_json


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\x01")
    write_json(tmp_path / "b.json", {"名": [1, 2.5, None]})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\x01"
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"名": [1, 2.5, None]}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "b.json", "new"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def interrupted():
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent
            temporary.write_bytes(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_folder_appears_whole(tmp_path):
    with atomic_path(tmp_path / "folder") as temporary:
        write_bytes(temporary / "a", b"1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "a").read_bytes() == b"1"


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file/a"):
        write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(OutputError):
        ensure_writable(tmp_path / "file" / "sub")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_bytes(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more_keeps_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    program = """
import resource, sys
from pathlib import Path
from llmctl.errors import OutputError
from llmctl.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except OutputError as error:
    print(error, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=True)
    assert str(target) in done.stdout
    assert "file too large" in done.stdout
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_long_and_chinese_names_fit(tmp_path):
    for name in ("x" * 255, "名" * 80):
        write_bytes(tmp_path / name, b"1")
        assert (Path(tmp_path) / name).read_bytes() == b"1"
    with pytest.raises(OutputError, match="too long"):
        write_bytes(tmp_path / ("x" * 256), b"1")
