"""Files are read record by record whatever their layout, and a broken one is named, never half read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm import records as module
from vlm.errors import UserError
from vlm.records import Kind, OfficialFile, Row, json_lines, lines, records

each_example = settings(  # the same examples every time, and none kept in the tree
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
layouts = st.fixed_dictionaries({"indent": st.none() | st.integers(0, 2), "ensure_ascii": st.booleans()})


def read(file: Path, kind: Kind, under: str | None = None) -> list[Any]:
    return [content for _, content in records(OfficialFile.given(file), kind, under)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)  # so that every kind of value is cut somewhere


def write(file: Path, content: Any, layout: dict[str, Any]) -> None:
    text = json.dumps(content, **layout)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


@each_example
@given(st.lists(json_values, max_size=5), layouts)
def test_a_list_reads_as_the_standard_library_reads_it(
    tmp_path: Path, content: list[Any], layout: dict[str, Any]
) -> None:
    write(tmp_path / "a.json", content, layout | {"ensure_ascii": True})
    assert read(tmp_path / "a.json", "list") == content


@each_example
@given(st.dictionaries(st.text(), json_values, max_size=5), layouts)
def test_an_object_reads_as_the_standard_library_reads_it(
    tmp_path: Path, content: dict[str, Any], layout: dict[str, Any]
) -> None:
    write(tmp_path / "a.json", content, layout | {"ensure_ascii": True})
    assert dict(records(OfficialFile.given(tmp_path / "a.json"), "object")) == content


@each_example
@given(json_values, st.lists(json_values, max_size=4), json_values)
@example(10.0, [], None)  # a chunk ends behind "10."
@example(1e30, [1.5e-9], 12e300)
def test_a_list_is_found_under_its_key(tmp_path: Path, before: Any, content: list[Any], after: Any) -> None:
    write(tmp_path / "a.json", {"before": before, "rows": content, "after": after}, {})
    assert read(tmp_path / "a.json", "list", "rows") == content


@each_example
@given(st.lists(json_values, min_size=1, max_size=4), st.data())
def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path: Path, content: list[Any], data: st.DataObject) -> None:
    whole = json.dumps(content)
    (tmp_path / "a.json").write_text(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=r"a\.json: "):
        read(tmp_path / "a.json", "list")


@each_example
@given(st.binary(max_size=40) | st.text(alphabet='[]{},:"\\ \n0123456789-+.eEtruefalsn').map(str.encode))
@pytest.mark.parametrize(("kind", "under"), [("list", None), ("object", None), ("list", "rows")])
def test_noise_reads_as_the_standard_library_reads_it_or_is_one_error(
    tmp_path: Path, kind: Kind, under: str | None, content: bytes
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    try:
        found = list(records(OfficialFile.given(tmp_path / "a.json"), kind, under))
    except UserError as error:
        assert str(error).startswith(str(tmp_path / "a.json"))
        return
    expected = json.loads(content)
    assert (dict(found) if kind == "object" else [value for _, value in found]) == (
        expected[under] if under else expected
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "after the start: the file is cut off"),
        ("   ", "after the start: the file is cut off"),
        ('[{"a": 1}, {"a": 2}, {"a"', "after record 2: the file is cut off"),
        ('[{"a": 1}, {"a": 2}', "after record 2: the file is cut off"),
        ('[{"a": 1} {"a": 2}]', 'after record 1: expected ",", got "{"'),
        ('[{"a": 1}] []', "after record 1: more text after the end"),
        ('[{"a": nope, "b": "xxxxxxxxxxxxxxxxxxxxxx"}]', "after the start: not valid JSON (Expecting value)"),
        ('[{"a": 1}, ]', "after record 1: a comma, and no value after it"),
        ('[{"a": 1}, {"a": 2, "a": 3}]', 'after record 1: the key "a" stands twice in one object'),
        ('{"a": 1}', "expected the file to hold a list of records. Is it another file?"),
        ("[" * 100_000, "after the start: "),
        ("[1" + "0" * 5000 + "]", "after the start: Exceeds the limit"),
    ],
)
def test_a_defect_names_the_last_good_record(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json", "list")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: {message}")


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"201": {}, "202": {}, "201": {}}')
    with pytest.raises(UserError, match='"201" stands twice'):
        read(tmp_path / "a.json", "object")


def test_files_that_cannot_be_opened_or_decoded_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read(tmp_path / "nowhere.json", "list")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, "list")
    (tmp_path / "a.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(UserError, match=r"a\.json: not UTF-8 text"):
        read(tmp_path / "a.json", "list")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read(tmp_path / "a.json", "list") == [1]


def test_the_list_that_holds_the_records_may_not_stand_twice(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [1], "rows": [2]}')
    with pytest.raises(UserError, match='"rows" stands twice'):
        read(tmp_path / "a.json", "list", "rows")


def test_an_error_ends_with_the_remedy_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1")
    for file, remedy in (
        (OfficialFile.given(tmp_path / "a.json"), "Download or write it again"),
        (OfficialFile.at(tmp_path / "a.json"), "Download or prepare it again"),
    ):
        with pytest.raises(UserError, match=rf"after record 1: the file is cut off\. {remedy}$"):
            list(records(file, "list"))


def test_half_a_character_is_text_only_where_it_is_asked_for_as_it_stands() -> None:
    row = Row(OfficialFile("made up", io.BytesIO), "record 1", {"text": "\ud800"})
    assert row.raw_text("text") == "\ud800"
    with pytest.raises(UserError, match=r'made up: record 1: "text" holds half a character\. Got "\\ud800"'):
        row.text("text")


def test_a_large_file_is_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read ahead is bounded, so that a file of gigabytes needs no more memory than a small one."""
    chunk = 1 << 16
    monkeypatch.setattr(module, "CHUNK", chunk)
    read: list[int] = []

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            head = b'{"questions": [' if not read else b""
            content = (head + b"7, " * len(buffer))[: len(buffer) // 3 * 3]
            buffer[: len(content)] = content
            read.append(len(content))
            return len(content)

    stream = records(OfficialFile("endless", lambda: io.BufferedReader(Endless())), "list", "questions")
    for _ in range(chunk // 3):
        assert next(stream)[1] == 7
    assert sum(read) < 3 * chunk
    stream.close()


def test_a_damaged_zip_member_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "questions.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("q.json", json.dumps([{"question": "what is 1?"}]))
    data = bytearray(path.read_bytes())
    at = bytes(data).index(b"what is 1?")
    data[at : at + 4] = b"that"
    path.write_bytes(bytes(data))
    with zipfile.ZipFile(path) as archive:
        file = OfficialFile("questions.zip: q.json", lambda: archive.open("q.json"))
        with pytest.raises(UserError, match=r"questions\.zip: q\.json: cannot be read \(BadZipFile"):
            list(records(file, "list"))


def test_lines_may_hold_any_character_that_is_no_line_end() -> None:
    file = OfficialFile("lines", lambda: io.BytesIO('"a\u2028b\x85c"\n"d"\n\n'.encode()))
    assert list(json_lines(file)) == [("line 1", "a\u2028b\x85c"), ("line 2", "d")]
    torn = OfficialFile("lines", lambda: io.BytesIO(b"1\n\n2\n"))
    with pytest.raises(UserError, match="line 2 is empty"):
        list(lines(torn))
