"""What the tests of the pretraining data share."""

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
