from __future__ import annotations

import itertools

import pytest

from vlm.metrics.vqav2 import CONTRACTIONS, Annotation, normalised, official_accuracy, score, vqa_accuracy


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_matches_of_ten_answers_give_the_published_accuracy(matches: int, accuracy: float) -> None:
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(accuracy)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_accuracy_is_the_mean_over_all_sets_that_leave_one_answer_out(count: int) -> None:
    for matches in range(count + 1):
        answers = ["red"] * matches + ["blue"] * (count - matches)
        left = itertools.combinations(answers, count - 1)
        expected = [min(1.0, sum(answer == "red" for answer in part) / 3) for part in left]
        assert vqa_accuracy("red", answers) == pytest.approx(sum(expected) / len(expected))


def test_the_order_of_the_answers_does_not_matter() -> None:
    answers = ["red", "blue", "red", "green", "red", "blue", "red", "pink", "blue", "blue"]
    assert vqa_accuracy("red", answers) == vqa_accuracy("red", sorted(answers)) == pytest.approx(1)


def test_without_human_answers_there_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match="at least one human answer"):
        vqa_accuracy("red", [])


# --- The normaliser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Articles go, wherever they stand, once the text is in lower case.
        ("The cat", "cat"),
        ("a", ""),
        ("cat in THE hat", "cat in hat"),
        ("an A", ""),
        ("another", "another"),
        # Number words are digits up to ten; "none" is 0, as in the script.
        ("Two", "2"),
        ("none", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("twenty one", "twenty 1"),
        # A contraction gets back the apostrophe that it lacks; one with none or the wrong one stays.
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("whatre", "what're"),
        ("don\u2019t", "don\u2019t"),
        # Odd entries of the script's table: one is the wrong way round, those with a capital meet only lower case.
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("Im", "im"),
        ("Id've", "id've"),
        # A mark between letters is a space; beside a space it vanishes, and so does every other of its kind.
        ("t-shirt", "t shirt"),
        ("yes/no", "yes no"),
        ("black - white", "black white"),
        ("a-b, c-d", "b c d"),  # "a" is an article once the mark between letters has become a space
        ("x-y -z", "xy z"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("snow_board", "snow board"),
        # A comma inside a number makes all marks vanish, not only commas.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("yes,no", "yes no"),
        ("1, 2", "1 2"),
        # A period goes unless a digit follows.
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("no.1", "no.1"),
        ("St. Louis", "st louis"),
        # Marks that the script does not know stay.
        ("it's", "it's"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("rock & roll", "rock & roll"),
        ("$5", "$5"),
        # Unicode is left alone, except for case and for spaces of any kind.
        ("CAF\u00c9", "caf\u00e9"),
        ("\u00bfque?", "\u00bfque"),
        ("a\u00a0cat", "cat"),
        ("\u732b", "\u732b"),
        ("", ""),
        ("  ", ""),
        ("?", ""),
    ],
)
def test_the_normaliser_gives_what_the_official_script_gives(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_only_the_first_32_periods_go() -> None:
    assert normalised("." * 40) == "." * 8  # the script passes the flag re.UNICODE, 32, as a count


def test_all_official_contractions_that_change_a_word_are_there() -> None:
    assert len(CONTRACTIONS) == 118  # the script lists 120; "let's" and "she's" stand for themselves
    assert {len(right) - len(wrong) for wrong, right in CONTRACTIONS.items()} == {1, -1}
    assert [wrong for wrong, right in CONTRACTIONS.items() if len(right) < len(wrong)] == ["somebody'd"]


# --- The rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "rule_2021", "rule_2016"),
    [
        # Where the ten agree, 2021 compares as it stands, after stripping; 2016 always normalises the prediction.
        ("yes", ["yes"] * 10, 1, 1),
        ("Yes", ["yes"] * 10, 0, 1),
        ("yes.", ["yes"] * 10, 0, 1),
        ("the cat", ["the cat"] * 10, 1, 0),  # and never the articles of an answer
        ("two", ["two"] * 10, 1, 0),
        ("t-shirt", ["t-shirt"] * 10, 1, 0),
        (" yes\n", ["yes"] * 10, 1, 1),
        ("yes", ["yes "] * 10, 1, 0),  # 2016 does not strip answers
        ("ab", ["a\tb"] * 10, 0, 0),
        ("a b", ["a\tb"] * 10, 1, 0),
        ("stop", ["stop "] * 5 + ["stop"] * 5, 1, 1),  # they agree once stripped; in 2016 the five "stop" are enough
        ("Stop", ["stop "] * 5 + ["stop"] * 5, 0, 1),
        ("", [""] * 10, 1, 1),
        ("", ["yes"] * 10, 0, 0),
        # Where they differ, 2021 normalises both sides; 2016 processes punctuation only on the answers'.
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1, 1),
        ("the cat", ["cat"] * 3 + ["dog"] * 7, 0.9, 0.9),
        ("cat", ["the cat"] * 9 + ["dog"], 1, 0),
        ("2", ["two"] * 9 + ["3"], 1, 0),
        ("yes", ["Yes"] * 9 + ["no"], 1, 0),
        ("1000", ["1,000"] * 2 + ["1000"] + ["many"] * 7, 0.9, 0.9),
        ("0", ["none"] * 4 + ["many"] * 6, 1, 0),
        ("none", ["none"] * 4 + ["many"] * 6, 1, 0),
        ("", ["a"] * 4 + ["many"] * 6, 1, 0),  # an article alone is an empty answer
        ("A", ["the"] * 2 + ["b"] * 8, 0.6, 0),
        ("dont", ["don't"] * 2 + ["do"] * 8, 0.6, 0.6),
        # Ties: each of the answers has its own matches, and both score alike.
        ("red", ["red"] * 5 + ["blue"] * 5, 1, 1),
        ("blue", ["red"] * 5 + ["blue"] * 5, 1, 1),
        ("red", ["red", "Red", "red."] + ["blue"] * 7, 0.9, 0.6),
    ],
)
def test_the_two_rules_differ_where_the_official_scripts_do(
    prediction: str, answers: list[str], rule_2021: float, rule_2016: float
) -> None:
    assert official_accuracy(prediction, answers) == pytest.approx(rule_2021)
    assert official_accuracy(prediction, answers, "2016") == pytest.approx(rule_2016)


def test_tables_are_means_over_the_questions_of_a_type() -> None:
    annotations = {
        1: Annotation(10, ("yes",) * 10, "is the", "yes/no"),
        2: Annotation(10, ("no",) * 10, "is the", "yes/no"),
        3: Annotation(11, ("red",) * 2 + ("blue",) * 8, "what color", "other"),
        4: Annotation(11, ("5",) * 10, "how many", "number"),
    }
    # 1 right, 2 wrong, 3 matches two of ten (0.6), 4 was not answered.
    assert score(annotations, {1: "yes", 2: "yes", 3: "red", 4: None}) == {
        "overall": pytest.approx(100 * 1.6 / 4),
        "per_answer_type": {"yes/no": 50, "other": pytest.approx(60), "number": 0},
        "per_question_type": {"is the": 50, "what color": pytest.approx(60), "how many": 0},
    }
