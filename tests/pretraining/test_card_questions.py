"""`scripts/card_questions.py`: the wordings in the model card are those of the rows."""

import re

import pytest

from processing_minimax_m3.pretraining import WEIGHTS, make_row

from .pretraining_cases import available_tasks

TEXTS = {"code", "english"}  # tasks without questions
ROWS = 60


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("card_questions")


def test_each_task_with_questions_is_described(script):
    assert set(script.QUESTIONS) == set(WEIGHTS) - TEXTS


@pytest.mark.parametrize("task", sorted(set(available_tasks()) - TEXTS))
def test_wordings_are_those_of_the_rows(script, task):
    """Each question of the rows has a wording, and each wording has a question."""
    opening = "(?:.* )?" if task == "thinking" else ""  # the sum stands before its question
    wordings = {
        wording: re.compile(opening + re.sub("[A-Z]{3,}", ".+", re.escape(wording)))
        for wording in script.QUESTIONS[task][1]
    }
    used = set()
    for index in range(ROWS):
        for message in make_row(task, "train", index, characters=200)["messages"]:
            if message["role"] == "user":
                content = message["content"]
                text = content if isinstance(content, str) else content[-1]["text"]
                found = {wording for wording, pattern in wordings.items() if pattern.fullmatch(text)}
                assert found, text
                used |= found
    assert used == set(wordings)


def test_section_has_the_tasks_of_the_training_alone(script):
    section = script.questions_section("image=4, video=2")
    assert "**image.**" in section and "**video.**" in section and "What moves?\n" in section
    assert section.count("```text") == 2
    assert script.questions_section().count("```text") == len(script.QUESTIONS)
