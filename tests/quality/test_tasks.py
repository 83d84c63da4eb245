"""Tasks made with a tokenizer of one token a character: the same every time, the answers where they are said."""

import re

import pytest

from tq_vllm.quality.tasks import SIZES, Size, build_tasks, longest_sequence

SIZE = Size(2, 100, 2, 16, (300, 600), (0.0, 0.5, 1.0), 2, 20, 2, 16)


class Characters:
    """`encode` as in transformers; `bos` says whether sequences start with a token of their own."""

    bos_token_id = 0x10FFFF

    def __init__(self, bos: bool = False):
        self.bos = bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([self.bos_token_id] if self.bos and add_special_tokens else []) + [ord(c) for c in text]


def words(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture(scope="module")
def tasks():
    return build_tasks(Characters(), SIZE)


def of_kind(tasks, kind):
    return [(q, words(q.tokens), words([q.tokens[i] for i in q.answers])) for q in tasks.questions if q.kind == kind]


def test_windows_are_text_of_the_length_asked_for(tasks):
    assert [len(w) for w in tasks.windows] == [100, 100] and tasks.windows[0] != tasks.windows[1]
    assert len(tasks.prompts) == 2


def test_a_needle_is_said_once_where_its_name_says_and_asked_for_last(tasks):
    needles = of_kind(tasks, "needle")
    assert len(needles) == 6
    for question, text, answer in needles:
        length, depth = map(float, question.name.split(" @ "))
        assert re.fullmatch(r" \d{5}", answer) and text.endswith(f" is{answer}") and text.count(answer) == 2
        assert text.index(answer) == pytest.approx(depth * length, abs=60)


def test_copies_repeat_their_words(tasks):
    for _, text, answer in of_kind(tasks, "copy"):
        assert text.count(answer) == 2 and text.endswith(answer)
        assert len(answer.split()) == SIZE.copy_words - 4


def test_lookups_ask_for_numbers_of_the_list(tasks):
    for question, text, answer in of_kind(tasks, "lookup"):
        assert len(answer.split()) == SIZE.pairs // 8
        assert question.answers[0] > text.index("From the telephone list above")
        for number in answer.split():
            assert text.count(f" {number}\n") == 2


def test_the_same_tokenizer_gives_the_same_tasks(tasks):
    assert build_tasks(Characters(), SIZE) == tasks


def test_every_sequence_starts_as_the_tokenizer_starts_one(tasks):
    with_bos = build_tasks(Characters(bos=True), SIZE)
    sequences = [*with_bos.windows, *with_bos.prompts, *(q.tokens for q in with_bos.questions)]
    assert all(s[0] == Characters.bos_token_id and Characters.bos_token_id not in s[1:] for s in sequences)
    assert [len(w) for w in with_bos.windows] == [100, 100]


def test_more_text_than_there_is_is_refused():
    with pytest.raises(ValueError, match="the text has .* tokens; use less"):
        build_tasks(Characters(), Size(1000, 10_000, 0, 1, (), (), 0, 0, 0, 0))


def test_text_only_has_the_same_windows_and_nothing_else(tasks):
    text = build_tasks(Characters(), SIZE.text_only())
    assert text.windows == tasks.windows and not text.questions and not text.prompts


@pytest.mark.parametrize("name", SIZES)
def test_no_sequence_is_longer_than_its_bound(name):
    """For a real vocabulary: the default model's."""
    from transformers import AutoTokenizer

    from tq_vllm.cli.demo_model import demo_model

    size = SIZES[name]
    tasks = build_tasks(AutoTokenizer.from_pretrained(str(demo_model())), size)
    longest = max(len(s) for s in [*tasks.windows, *(q.tokens for q in tasks.questions)])
    assert max(longest + 1, len(tasks.prompts[0]) + size.greedy_tokens) <= longest_sequence(size)


def test_needles_in_more_text_than_a_sequence_may_have_are_left_out():
    full = SIZES["full"]
    assert full.within(16_480) == full and longest_sequence(full) == 16_480
    assert full.within(8_192).needle_lengths == (1024, 2048, 4096)
    assert longest_sequence(full.within(8_192)) <= 8_192
