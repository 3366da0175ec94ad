"""Long rows have the length that was drawn, long recall asks many facts, and positions may jump inside a row."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3 import MiniMaxM3SparseForConditionalGeneration
from processing_minimax_m3.pretraining import LongRows, Packs, RowEncoder, Stage, collate_packs, make_row, parse_stages
from processing_minimax_m3.pretraining.encoding import EncodedRow
from processing_minimax_m3.pretraining.packs import join_rows
from processing_minimax_m3.pretraining.recall import many_facts_row
from processing_minimax_m3.pretraining.rows import random_numbers

from .pretraining_cases import check_recall, question_texts

ASKED = re.compile(r"(?:number of the|value of) (.+)\?")
PADDING = 1


def packs_of(processor, task: str, tokens: int, num_packs: int = 1, seed: int = 0, **long_rows) -> Packs:
    """Packs of one task with rows of up to so many tokens, each with a long row."""
    options = LongRows(**{"share": 1.0, "spread": 1.0} | long_rows)
    return Packs(
        processor,
        "train",
        num_packs,
        tokens=tokens,
        stages=[Stage(1.0, tokens)],
        weights={task: 1.0},
        seed=seed,
        long_rows=options,
    )


def first_lengths(packs: Packs) -> list[int]:
    return [packs[index]["lengths"][0] for index in range(len(packs))]


# ---- facts of long rows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fact_rows() -> list[dict]:
    """Rows of 60 facts, of both kinds."""
    rows = [many_facts_row(random_numbers("facts", index), "train", 40_000, 60) for index in range(6)]
    assert len({row["questions"][0].split("_")[0] for row in rows}) == 2
    return rows


def facts_in_text(row: dict) -> list[str]:
    """The names that get a number in the text, in its order."""
    lines = row["messages"][0]["content"][0]["text"].split("\n")
    matches = (re.fullmatch(r"The number of the (\w+ \w+) is \d+\.|set (\w+) = \w+", line) for line in lines)
    return [match[1] or match[2] for match in matches if match]


def hops(row: dict) -> dict[str, int]:
    """How many variables stand between each variable and its number, by the text."""
    found: dict[str, int] = {}
    for name, source in re.findall(r"^set (\w+) = (\w+)$", row["messages"][0]["content"][0]["text"], re.MULTILINE):
        found[name] = found[source] + 1 if source in found else 0
    return found


def test_each_fact_is_asked_once_in_another_order_than_that_of_the_text(fact_rows):
    for row in fact_rows:
        check_recall(row)
        asked, in_text = [ASKED.search(question)[1] for question in question_texts(row)], facts_in_text(row)
        assert len(asked) == len(set(asked)) == 60
        is_variable = row["questions"][0].startswith("variable")
        assert len(in_text) == (60 if is_variable else 120)  # as many other things with numbers
        places = [in_text.index(name) for name in asked]
        rises = sum(one < other for one, other in pairwise(places))
        assert 15 < rises < 45  # 59 in the order of the text, 29.5 on average in a random one


def test_messages_questions_and_answers_stay_together(fact_rows):
    for row in fact_rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 60
        assert [message["content"] for message in row["messages"][1::2]] == row["answers"]
        assert [len(message["content"]) for message in row["messages"][::2]] == [2, *[1] * 59]
        hops_of = hops(row)
        for kind, question in zip(row["questions"], question_texts(row), strict=True):
            name = ASKED.search(question)[1]
            assert kind == (f"variable_{hops_of[name]}" if name in hops_of else "key_value")


def test_the_scene_names_the_facts_in_the_order_of_the_questions(fact_rows):
    for row in fact_rows:
        text, scene = row["messages"][0]["content"][0]["text"], row["scene"]
        asked = [ASKED.search(question)[1] for question in question_texts(row)]
        assert scene["keys" if "keys" in scene else "asked"] == asked
        for name, depth in zip(asked, scene["depths"], strict=True):
            fact = re.search(rf"^(The number of the {name} is|set {name} =)", text, re.MULTILINE)
            assert abs(fact.start() / len(text) - depth) < 0.06


def test_half_of_the_facts_stand_early(fact_rows):
    """And a quarter of the others: 5 of 8 in all."""
    depths = [depth for row in fact_rows for depth in row["scene"]["depths"]]
    assert 0.55 < np.mean(np.less(depths, 0.25)) < 0.7
    assert 0.15 < np.mean(np.greater(depths, 0.6)) < 0.25


def test_no_row_asks_more_than_a_hundred_facts():
    for index in range(4):
        row = many_facts_row(random_numbers("most", index), "train", 1, 1000)  # a text without room is no fault
        assert len(row["answers"]) == 100
        check_recall(row)


# ---- lengths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_long_recall_has_the_drawn_length_or_a_little_less(processor, monkeypatch, spread):
    drawn = []
    draw = Packs._long_recall
    monkeypatch.setattr(
        Packs, "_long_recall", lambda self, index, tokens: drawn.append(tokens) or draw(self, index, tokens)
    )
    lengths = [*range(1100, 1500, 25), *range(1500, 6500, 500)]
    for seed, tokens in enumerate(lengths):  # each seed gives other rows
        (length,) = first_lengths(packs_of(processor, "recall", tokens, seed=seed, spread=spread))
        assert 0.95 * drawn[-1] <= length <= drawn[-1] <= tokens
        assert drawn[-1] >= max(int(tokens / spread), 1024)
    assert len(set(drawn)) > 20 and (drawn == lengths) == (spread == 1)


@pytest.mark.parametrize(("tokens", "least", "most"), [(10_999, 2, 10), (11_000, 11, 11), (24_500, 24, 24)])
def test_long_recall_asks_a_fact_in_a_thousand_tokens(processor, tokens, least, most):
    (row, *_) = packs_of(processor, "recall", tokens).rows(0)
    assert least <= len(row.answers) <= most
    assert 0.95 * tokens <= len(row.ids) <= tokens
    before = 0
    facts = dict(re.findall(r"^(?:The number of the|set) (.+?) (?:is|=) (\w+)\.?$", processor.decode(row.ids), re.M))
    for answer in row.answers:
        question, found = (
            processor.decode(row.ids[slice(*span)]) for span in ((before, answer.start), (answer.start, answer.end))
        )
        value = ASKED.findall(question)[-1] if answer.question != "needle" else None
        while value in facts:
            value = facts[value]
        assert value is None or found.endswith(f"{value}[e~[")
        before = answer.end


def test_share_says_how_many_packs_begin_with_a_long_row(processor):
    counts = {
        share: sum(length > 1024 for length in first_lengths(packs_of(processor, "code", 2048, 20, share=share)))
        for share in (0.0, 0.5, 1.0)
    }
    assert counts[0.0] == 0 and counts[1.0] == 20
    assert 4 < counts[0.5] < 16


def test_spread_says_how_short_a_long_row_may_be(processor):
    assert set(first_lengths(packs_of(processor, "code", 4096, 3, spread=1.0))) == {4096}
    lengths = first_lengths(packs_of(processor, "code", 4096, 16, spread=2.0))
    assert 2048 <= min(lengths) < 2500 and 3400 < max(lengths) <= 4096
    lengths = first_lengths(packs_of(processor, "code", 4096, 16, spread=1000.0))
    assert 1024 <= min(lengths) < 1300 and 2800 < max(lengths) <= 4096
    assert np.median(lengths) < 2400  # on a logarithmic scale


def test_stages_of_short_rows_have_no_long_ones(processor):
    stages = parse_stages("1024:0.5,2048:1")
    options = {"tokens": 2048, "weights": {"code": 1.0}, "long_rows": LongRows(share=1.0, spread=1.0)}
    lengths = first_lengths(Packs(processor, "train", 8, stages=stages, **options))
    assert max(lengths[:4]) < 1024 and set(lengths[4:]) == {2048}


@pytest.mark.parametrize("is_found", [True, False])
def test_recall_alone_gets_no_row_of_another_task(processor, monkeypatch, is_found):
    if not is_found:
        monkeypatch.setattr(Packs, "_long_recall", lambda *_: None)
    packs = packs_of(processor, "recall", 2500, 6)
    for index in range(6):
        pack = packs[index]
        assert set(pack["modalities"]) == {"recall"}
        assert (pack["lengths"][0] > 0.95 * 2500) == is_found
        assert (pack["labels"] >= 0).any()


# ---- positions -------------------------------------------------------------------------------------------------


def plain_row(tokens: int, jump: tuple[int, int] | None = None) -> EncodedRow:
    ids = np.arange(tokens) + 10
    return EncodedRow(ids, ids, "code", jump=jump)


def test_a_jump_moves_the_rest_of_its_row_alone():
    rows = [plain_row(3), plain_row(5, (2, 100)), plain_row(4), plain_row(2, (1, 7))]
    first = join_rows(rows, 17, PADDING)
    second = join_rows([plain_row(3, (1, 1))], 3, PADDING)
    expected = [0, 1, 2, 0, 1, 102, 103, 104, 0, 1, 2, 3, 0, 8, 0, 1, 2]
    assert first["position_ids"].tolist() == [expected]
    batch = collate_packs([first, second])
    assert batch["position_ids"].tolist() == [[*expected, 0, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 12, 14, 17, 20]


def row_positions(pack: dict) -> list[torch.Tensor]:
    return list(pack["position_ids"][0].split(pack["lengths"]))


def test_positions_of_half_of_the_long_rows_jump(processor):
    most, packs = 50_000, packs_of(processor, "code", 4096, 24, spread=2.0, most_positions=50_000)
    sizes, places = [], []
    for index in range(24):
        first, *others = row_positions(packs[index])
        steps = first.diff()
        assert first[0] == 0 and (steps >= 1).all() and first[-1] < most
        assert (steps > 1).sum() <= 1
        if (steps > 1).any():
            sizes.append(int(steps.max()) - 1)
            places.append(int(steps.argmax()) / len(steps))
        for positions in others:
            assert positions.tolist() == list(range(len(positions)))
    assert 6 < len(sizes) < 18
    assert min(sizes) < 15_000 and max(sizes) > 35_000
    assert min(places) < 0.3 and max(places) > 0.7


def test_the_last_position_stays_below_the_limit(processor):
    """Rows of 2048 tokens, and two positions more."""
    packs = packs_of(processor, "code", 2048, 30, most_positions=2050)
    last = Counter(int(packs[index]["position_ids"][0, -1]) for index in range(30))
    assert set(last) == {2047, 2048, 2049}


@pytest.mark.parametrize("most", [0, 1000, 2048])
def test_rows_without_room_do_not_jump(processor, most):
    packs = packs_of(processor, "code", 2048, 8, most_positions=most)
    for index in range(8):
        assert packs[index]["position_ids"].tolist() == [list(range(2048))]


def test_packs_with_jumps_depend_on_seed_and_number_alone(processor):
    options = {"spread": 2.0, "most_positions": 50_000}
    packs = packs_of(processor, "recall", 2500, 4, **options)
    alone = packs_of(processor, "recall", 2500, 4, **options)[3]
    in_order = [packs[index] for index in range(4)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(in_order[3][name], alone[name])
    assert any(pack["position_ids"].max() > 2500 for pack in in_order)
    without = packs_of(processor, "recall", 2500, 4, spread=2.0)
    for index, pack in enumerate(in_order):  # its positions are all that a jump changes
        length = pack["lengths"][0]
        assert torch.equal(pack["input_ids"][0, :length], without[index]["input_ids"][0, :length])


def test_a_row_with_a_jump_gets_the_output_that_it_gets_alone(processor):
    """And it stays one sequence: tokens behind the jump see those before it, at their new distance."""
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(tiny_config(text={"vocab_size": 1024})).eval()
    encoder, padding = RowEncoder(processor), processor.tokenizer.pad_token_id
    rows = [encoder.encode(make_row(task, "train", 1, characters=500)) for task in ("code", "recall", "english")]
    start, size = len(rows[1].ids) // 2, 20_000
    rows[1].jump = start, size
    pack = join_rows(rows, sum(len(row.ids) for row in rows) + 5, padding)

    @torch.no_grad()
    def alone(ids: np.ndarray, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=torch.tensor(ids)[None], position_ids=positions[None], use_cache=False).logits[0]

    with torch.no_grad():
        packed = model(**collate_packs([pack]), use_cache=False, skip_logits=False).logits[0]
    packed = packed.split(pack["lengths"])
    for row, found, positions in zip(rows, packed, row_positions(pack)):
        torch.testing.assert_close(found, alone(row.ids, positions), rtol=1e-3, atol=1e-4)

    ids, positions = rows[1].ids, row_positions(pack)[1]
    without_jump = alone(ids, torch.arange(len(ids)))
    torch.testing.assert_close(packed[1][:start], without_jump[:start], rtol=1e-3, atol=1e-4)
    assert ((packed[1] - without_jump)[start:].abs().amax(-1) > 1e-3).all()
    cut = alone(ids[start:], positions[start:])
    assert ((packed[1][start:] - cut).abs().amax(-1) > 1e-3).all()
