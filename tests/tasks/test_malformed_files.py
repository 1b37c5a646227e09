"""Whatever a file holds, a reader reads all of it or says in one line what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm.errors import UserError
from vlm.records import OfficialFile
from vlm.tasks.gqa import GQATask
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.retrieval import RetrievalTask
from vlm.tasks.task import read_missing_images, read_texts
from vlm.tasks.vqav2 import VQAv2Task, read_minival
from vlm.types import Question

VQAV2 = [{"question_id": 100 + n, "image_id": 7, "question": f"what is {n}?"} for n in range(3)]
ANNOTATIONS = [
    {
        "question_id": row["question_id"],
        "image_id": 7,
        "answers": [{"answer": "red"}] * 10,
        "multiple_choice_answer": "red",
        "answer_type": "other",
        "question_type": "what is",
    }
    for row in VQAV2
]
GQA = {
    f"0{n}": {"question": f"what is {n}?", "imageId": "n1", "answer": "red", "types": {"structural": "query"}}
    for n in range(3)
}
NLVR2 = [{"identifier": f"dev-1-{n}-0", "sentence": "one dog", "label": "True"} for n in range(3)]
RETRIEVAL = [{"id": n, "text": "a dog", "image_key": f"dog-{n}"} for n in range(3)]

Text = Callable[[Any], str]
READERS: dict[str, tuple[str, Any, Text, Callable[[Path], list[Question]]]] = {
    "vqav2 questions": (
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        VQAV2,
        lambda rows: json.dumps({"info": {}, "questions": rows}),
        lambda root: VQAv2Task().read(root, "validation"),
    ),
    "vqav2 annotations": (
        "vqav2/v2_mscoco_val2014_annotations.json",
        ANNOTATIONS,
        lambda rows: json.dumps({"info": {}, "annotations": rows}),
        lambda root: VQAv2Task().read(root, "validation"),
    ),
    "gqa": ("gqa/testdev_balanced_questions.json", GQA, json.dumps, lambda root: GQATask().read(root, "test")),
    "nlvr2": (
        "nlvr2/dev.json",
        NLVR2,
        lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        lambda root: NLVR2Task().read(root, "validation"),
    ),
    "retrieval": (
        "retrieval/captions.json",
        RETRIEVAL,
        json.dumps,
        lambda root: RetrievalTask().read(root, "captions"),
    ),
}
each_reader = pytest.mark.parametrize("name", READERS)
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples every time
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its files anew
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=5,
)


def written(root: Path, name: str, text: str | bytes | None = None) -> Path:
    """All files in good order, but for that of `name`."""
    for other, (path, rows, dump, _) in READERS.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(dump(rows), encoding="utf-8")
        if other == name and text is not None:
            (root / path).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return root / READERS[name][0]


def reads_all_or_names_the_file(root: Path, name: str, file: Path) -> None:
    """The property: three questions, or one error of one line with the file's name and a remedy."""
    try:
        questions = READERS[name][3](root)
    except UserError as error:
        assert "\n" not in str(error)
        if name == "vqav2 questions":  # the other file of the pair may be the one that does not fit
            assert str(error).startswith(str(file.parent))
        else:
            assert str(error).startswith(str(file))
        assert "again" in str(error)
    else:
        assert len(questions) == 3


@each_reader
def test_good_files_are_read(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    assert len(READERS[name][3](tmp_path)) == 3


@each_reader
@quick
@given(data=st.data())
def test_a_field_of_any_other_value_is_read_or_named(tmp_path: Path, name: str, data: st.DataObject) -> None:
    _, rows, dump, _ = READERS[name]
    changed = json.loads(json.dumps(rows))
    record = changed["01"] if isinstance(changed, dict) else changed[1]
    field = data.draw(st.sampled_from(sorted(record)))
    if data.draw(st.booleans()):
        record[field] = data.draw(anything)
    else:
        del record[field]
    file = written(tmp_path, name, dump(changed))
    reads_all_or_names_the_file(tmp_path, name, file)


@each_reader
@quick
@given(data=st.data())
def test_a_record_of_any_other_value_is_read_or_named(tmp_path: Path, name: str, data: st.DataObject) -> None:
    _, rows, dump, _ = READERS[name]
    changed = json.loads(json.dumps(rows))
    changed["01" if isinstance(changed, dict) else 1] = data.draw(anything)
    file = written(tmp_path, name, dump(changed))
    with pytest.raises(UserError) as error:
        READERS[name][3](tmp_path)
    assert str(error.value).startswith(str(file))


@each_reader
@quick
@given(data=st.data())
def test_a_file_that_is_cut_short_is_never_read_in_part(tmp_path: Path, name: str, data: st.DataObject) -> None:
    _, rows, dump, _ = READERS[name]
    text = dump(rows).rstrip("\n")
    line_ends = [at for at, character in enumerate(text) if character == "\n"] if name == "nlvr2" else []
    end = data.draw(st.integers(0, len(text) - 1))
    if name == "nlvr2" and any(end in (at, at + 1) for at in [-1, *line_ends]):
        return  # a shorter file of whole lines is a whole file
    file = written(tmp_path, name, text[:end])
    with pytest.raises(UserError) as error:
        READERS[name][3](tmp_path)
    assert str(error.value).startswith(str(file))


@each_reader
@quick
@given(content=st.binary(max_size=40) | st.text(max_size=40) | anything.map(lambda value: json.dumps(value)))
def test_any_other_content_is_named(tmp_path: Path, name: str, content: bytes | str) -> None:
    file = written(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        READERS[name][3](tmp_path)
    assert str(error.value).startswith(str(file))


@each_reader
def test_a_file_without_a_question_is_named(tmp_path: Path, name: str) -> None:
    _, rows, dump, read = READERS[name]
    file = written(tmp_path, name, dump(type(rows)()))
    with pytest.raises(
        UserError, match=r"holds no question|question 100 is annotated, but not|has no annotation"
    ) as error:
        read(tmp_path)
    assert str(error.value).startswith(str(file.parent))


def test_vqav2_files_without_a_question_are_named_though_they_agree(tmp_path: Path) -> None:
    written(tmp_path, "vqav2 questions", '{"questions": []}')
    (tmp_path / READERS["vqav2 annotations"][0]).write_text('{"annotations": []}')
    with pytest.raises(UserError, match=r"questions\.json: holds no question"):
        VQAv2Task().read(tmp_path, "validation")


@each_reader
@pytest.mark.parametrize(
    "damage", ["[" * 100_000, '{"questions": ' + "[" * 100_000, "1" * 6000, "\ufeff\ufeff{}", "NaN"]
)
def test_hostile_json_is_named(tmp_path: Path, name: str, damage: str) -> None:
    file = written(tmp_path, name, damage)
    with pytest.raises(UserError) as error:
        READERS[name][3](tmp_path)
    assert str(error.value).startswith(str(file))


@each_reader
def test_a_record_that_occurs_twice_is_named(tmp_path: Path, name: str) -> None:
    _, rows, dump, _ = READERS[name]
    text = dump([*rows, rows[0]]) if isinstance(rows, list) else dump(rows)[:-1] + f', "00": {json.dumps(rows["00"])}}}'
    written(tmp_path, name, text)
    with pytest.raises(UserError, match=r'(100|"00"|dev-1-0-0|question 0).*twice'):
        READERS[name][3](tmp_path)


@each_reader
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        READERS[name][3](tmp_path)


def test_annotations_of_questions_that_are_not_asked_are_refused(tmp_path: Path) -> None:
    dump = READERS["vqav2 questions"][2]
    written(tmp_path, "vqav2 questions", dump(VQAV2[:2]))
    with pytest.raises(UserError, match="question 102 is annotated, but not asked"):
        VQAv2Task().read(tmp_path, "validation")


@quick
@given(value=anything | st.lists(st.sampled_from([100, 101, 7, "COCO_val2014_000000000007", {"img_id": "7"}, None])))
def test_a_minival_list_names_known_questions_or_images_or_is_refused(tmp_path: Path, value: Any) -> None:
    held_out = [Question(str(row["question_id"]), "?", ("COCO_val2014_000000000007",)) for row in VQAV2]
    file = tmp_path / "minival.json"
    file.write_text(json.dumps(value))
    try:
        chosen = read_minival(OfficialFile.at(file), held_out)
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:  # ids of questions as they are, of the one image all of its questions
        assert isinstance(value, list) and value
        of_images = {str(row["question_id"]) for row in VQAV2}
        assert chosen == ({str(entry) for entry in value} if set(map(str, value)) <= of_images else of_images)


@quick
@given(value=anything)
def test_a_list_of_missing_images_is_a_list_of_texts_or_refused(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "missing_images.json"
    file.write_text(json.dumps(value))
    try:
        missing = read_missing_images(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert missing == set(value) and len(missing) == len(value)


@quick
@given(value=anything)
def test_an_answer_vocabulary_is_a_list_of_distinct_texts_or_refused(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(value))
    good = isinstance(value, list) and all(isinstance(text, str) for text in value) and len(set(value)) == len(value)
    if good:
        assert read_texts(file) == tuple(value)
    else:
        with pytest.raises(UserError, match=r"answers\.json: "):
            read_texts(file)
