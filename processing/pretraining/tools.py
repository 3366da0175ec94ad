"""Tool calls and thinking in the chat format of the released model: short tasks with one right answer."""

import json
import random
from collections.abc import Callable
from typing import Any

from .recall import CITIES
from .rows import Row, check_split

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jan",
    "Kim",
    "Leo",
    "Mia",
    "Nils",
    "Olga",
    "Paul",
)
ITEMS = ("apples", "books", "candles", "eggs", "flowers", "kites", "lamps", "marbles", "pens", "shells")
SKIES = ("sun", "rain", "snow", "fog", "wind")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CURRENCIES = ("dollar", "euro", "pound", "yen")


def _tool(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
NAMES_OF_LIST = {"type": "array", "items": {"type": "string"}}

Case = tuple[str, dict[str, Any], str, str]  # question, arguments, what the tool returns, answer


def _weather(numbers: random.Random) -> Case:
    city, day, sky = numbers.choice(CITIES), numbers.choice(DAYS), numbers.choice(SKIES)
    return f"How will the weather be in {city} on {day}?", {"city": city, "day": day}, sky, f"{sky} in {city}"


def _time(numbers: random.Random) -> Case:
    city, hour = numbers.choice(CITIES), numbers.randrange(24)
    return f"What time is it in {city}?", {"city": city}, f"{hour}:00", f"{hour}:00 in {city}"


def _exchange(numbers: random.Random) -> Case:
    amount, result = numbers.randrange(2, 500), str(numbers.randrange(2, 999))
    source, target = numbers.sample(CURRENCIES, 2)
    question = f"How much is {amount} {source} in {target}?"
    return question, {"amount": amount, "source": source, "target": target}, result, f"{result} {target}"


def _message(numbers: random.Random) -> Case:
    people = numbers.sample(NAMES, numbers.randint(1, 3))
    day = numbers.choice(DAYS)
    question = f"Invite {' and '.join(people)} for {day}."
    return question, {"people": people, "day": day}, "sent", f"{len(people)} invited"


def _stock(numbers: random.Random) -> Case:
    item, count = numbers.choice(ITEMS), numbers.randrange(100)
    return f"How many {item} are in stock?", {"item": item}, str(count), f"{count} {item}"


TOOLS: dict[str, tuple[dict[str, Any], Callable[[random.Random], Case]]] = {
    "weather": (_tool("weather", "The weather of a day.", city=STRING, day=STRING), _weather),
    "local_time": (_tool("local_time", "The time in a city.", city=STRING), _time),
    "exchange": (_tool("exchange", "Converts money.", amount=INTEGER, source=STRING, target=STRING), _exchange),
    "invite": (_tool("invite", "Invites people.", people=NAMES_OF_LIST, day=STRING), _message),
    "stock": (_tool("stock", "Counts an item.", item=STRING), _stock),
}


def tool_row(numbers: random.Random, split: str, characters: int = 0) -> Row:
    """Several requests, each of which needs one of the tools, and the answers from what the tools return."""
    check_split(split)
    offered = numbers.sample(tuple(TOOLS), numbers.randint(2, len(TOOLS)))
    messages: list[dict[str, Any]] = []
    kinds, answers, cases = [], [], []
    for _ in range(numbers.randint(1, 4)):
        name = numbers.choice(offered)
        question, arguments, result, answer = TOOLS[name][1](numbers)
        call = {"name": name, "arguments": arguments}
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": answer},
        ]
        kinds += ["call", "result"]
        answers += [json.dumps(call), answer]
        cases.append({**call, "result": result})
    return {
        "task": "tools",
        "modality": "tools",
        "messages": messages,
        "tools": [TOOLS[name][0] for name in offered],
        "chat_template_kwargs": {"thinking_mode": numbers.choice(("adaptive", "disabled"))},
        "questions": kinds,
        "answers": answers,
        "scene": {"cases": cases},
    }


def thinking_row(numbers: random.Random, split: str, characters: int = 0) -> Row:
    """Several small sums, whose steps the answer thinks through first."""
    check_split(split)
    messages: list[dict[str, Any]] = []
    answers, cases = [], []
    for _ in range(numbers.randint(2, 5)):
        name, item = numbers.choice(NAMES), numbers.choice(ITEMS)
        total = numbers.randrange(2, 30)
        story, thoughts, steps = [f"{name} has {total} {item}."], [], [total]
        for _ in range(numbers.randint(1, 3)):
            change = numbers.randrange(1, 20)
            if change >= total or numbers.random() < 0.5:
                story.append(f"{name} buys {change}.")
                thoughts.append(f"{total} + {change} = {total + change}.")
            else:
                story.append(f"{name} loses {change}.")
                thoughts.append(f"{total} - {change} = {total - change}.")
                change = -change
            total += change
            steps.append(change)
        question = f"{' '.join(story)} How many {item} are left?"
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": " ".join(thoughts), "content": str(total)},
        ]
        answers.append(str(total))
        cases.append({"steps": steps})
    return {
        "task": "thinking",
        "modality": "tools",
        "messages": messages,
        "chat_template_kwargs": {"thinking_mode": numbers.choice(("adaptive", "enabled"))},
        "questions": ["sum"] * len(answers),
        "answers": answers,
        "scene": {"cases": cases},
    }
