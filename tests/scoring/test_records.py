"""Files are read record by record whatever their layout, and a broken one is named, never half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm.errors import UserError
from vlm.scoring import records as module
from vlm.scoring.records import Kind, records

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
    return [content for _, content in records(file, kind, under, unique_keys=True)]


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
    assert dict(records(tmp_path / "a.json", "object")) == content


@each_example
@given(json_values, st.lists(json_values, max_size=4), json_values)
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
        found = list(records(tmp_path / "a.json", kind, under, unique_keys=True))
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
        ('[{"a": 1}, {"a": 2, "a": 3}]', 'after record 1: the key "a" stands twice in one object'),
        ('{"a": 1}', "expected the file to hold a list of records. Is it another file of the release?"),
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
