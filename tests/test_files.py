"""Files are read with bounds and written whole or not at all; names in sentences are short and printable."""

import os

import pytest

from cogvideox.files import open_regular, parse_json, read_json, read_text, written_whole
from cogvideox.words import listed, reason, short


def test_names_are_one_printable_line_of_80_letters():
    assert short("proj_out.weight") == "proj_out.weight"
    assert short("a\nb\x00\u202e\udcff") == "a\\nb\\x00\\u202e\\udcff"
    for letters in (81, 300, 5_000_000):
        cut = short("x" * letters + "end")
        assert len(cut) == 80
        assert cut.endswith("end")
        assert "…" in cut
    assert listed(["a", "b", "c", "d"]) == "a, b, c, …"
    assert reason(KeyError()) == "KeyError"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        open_regular(tmp_path / "pipe")


def test_a_link_to_what_is_gone_is_called_that(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(ValueError, match="a link to .*gone"):
        open_regular(tmp_path / "link")


@pytest.mark.parametrize(
    "text", ["[" * 50_000, '{"a": ' * 200 + "1" + "}" * 200, "{", '{"a": ' + "9" * 5000 + "}", "nul"]
)
def test_json_that_is_none_or_too_deep_is_a_sentence(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_text_is_utf8_and_bounded(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_text(file)
    file.write_bytes(b" " * 11)
    with pytest.raises(ValueError, match="11 bytes"):
        read_text(file, limit=10)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_json(file)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "video.mp4"

    def interrupted():
        with written_whole(target) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with written_whole(target) as partial:
        assert partial.suffix == ".mp4"
        partial.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    with pytest.raises(ValueError, match="not replaced unasked"), written_whole(target):
        pass
    with written_whole(target, overwrite=True) as partial:
        partial.write_bytes(b"newer")
    assert target.read_bytes() == b"newer"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_replaced(links, tmp_path, monkeypatch):
    target = tmp_path / "video.mp4"
    if not links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)

    def beside_another():
        with written_whole(target) as partial:
            partial.write_bytes(b"mine")
            target.write_bytes(b"yours")

    with pytest.raises(ValueError, match="not replaced unasked"):
        beside_another()
    assert target.read_bytes() == b"yours"
    target.unlink()
    with written_whole(target) as partial:
        partial.write_bytes(b"mine")
    assert target.read_bytes() == b"mine"
