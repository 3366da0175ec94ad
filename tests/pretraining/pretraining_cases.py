"""What the tests of the pretraining data share."""

import re

from processing_minimax_m3.pretraining import WEIGHTS


def available_tasks() -> list[str]:
    """All tasks, without the digits where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return [task for task in WEIGHTS if task != "digits"]
    return list(WEIGHTS)


def question_texts(row: dict) -> list[str]:
    """The text of each question of a chat: the last text of the message before each answer."""
    texts = []
    for message, answer in zip(row["messages"], row["messages"][1:]):
        if answer["role"] == "assistant":
            content = message["content"]
            texts.append(content if isinstance(content, str) else content[-1]["text"])
    return texts


def media(row: dict, kind: str) -> list:
    """The images or videos of a chat, in order."""
    parts = [part for m in row.get("messages", ()) if isinstance(m.get("content"), list) for part in m["content"]]
    return [part[kind] for part in parts if part["type"] == kind]


def check_recall(row: dict) -> None:
    """Every answer follows from the facts in the text."""
    text = row["messages"][0]["content"][0]["text"]
    values: dict[str, str] = {}
    for line in text.split("\n"):
        if match := re.fullmatch(r"The number of the (\w+ \w+) is (\d+)\.", line):
            values[match[1]] = match[2]
        elif match := re.fullmatch(r"set (\w+) = (\w+)", line):
            values[match[1]] = values.get(match[2], match[2])
        elif match := re.fullmatch(r"The secret meeting is in (\w+) at (\d+) o'clock\.", line):
            values |= {"city": match[1], "hour": match[2]}
    for question, answer in zip(question_texts(row), row["answers"], strict=True):
        name = re.search(r"number of the (.+)\?|value of (.+)\?|(city)|(hour)", question)
        assert values[next(filter(None, name.groups()))] == answer
