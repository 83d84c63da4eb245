"""What a model reads and is asked: windows of text, prompts to continue, and questions whose answers are known.

All but the prompts to continue are teacher-forced: the model reads question and answer, and each answer token counts as
right where it is the most likely one. Everything is drawn with fixed seeds: the same tokenizer gives the same tokens.
"""

import random
import re
from dataclasses import dataclass, replace

from tq_vllm.quality.text import fixed_text

PLACES = ("Lisbon", "Oslo", "Vienna", "Madrid", "Dublin", "Athens", "Warsaw", "Prague", "Helsinki", "Rome")
PROMPT_TOKENS = 64  # of a prompt to continue
AROUND_NEEDLE = 96  # tokens that a needle and the question after it take at most


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        windows, window_tokens: text whose every token is predicted.
        greedy_prompts, greedy_tokens: prompts that are continued, and how far.
        needle_lengths: tokens around a needle; `needle_depths`: where it stands, 0 the start, 1 the end.
        copies, copy_words: sequences of random words that are repeated once.
        lookups, pairs: lists of names with numbers, and how many names a list has; an eighth of them is asked for.
        num_seqs: requests at a time.
    """

    windows: int
    window_tokens: int
    greedy_prompts: int
    greedy_tokens: int
    needle_lengths: tuple[int, ...]
    needle_depths: tuple[float, ...]
    copies: int
    copy_words: int
    lookups: int
    pairs: int
    num_seqs: int = 4

    def text_only(self) -> "Size":
        """The same text and no tasks."""
        return replace(self, greedy_prompts=0, needle_lengths=(), copies=0, lookups=0)

    def within(self, max_model_len: int) -> "Size":
        """Without the needles in more text than a sequence of the model may have."""
        lengths = tuple(n for n in self.needle_lengths if n + AROUND_NEEDLE <= max_model_len)
        return replace(self, needle_lengths=lengths)


SIZES = {
    "ci": Size(2, 512, 2, 32, (256,), (0.0, 0.5, 1.0), 1, 64, 1, 24),
    "small": Size(4, 1024, 4, 256, (128, 256, 512), (0.0, 0.25, 0.5, 0.75, 1.0), 2, 128, 2, 48),
    "full": Size(
        16, 4096, 16, 256, (1024, 2048, 4096, 8192, 16384), (0.0, 0.25, 0.5, 0.75, 1.0), 8, 512, 8, 256, num_seqs=16
    ),
}


@dataclass(frozen=True)
class Question:
    """A sequence to read; `answers` are the positions of its tokens whose prediction counts."""

    kind: str  # "needle", "copy" or "lookup"
    name: str
    tokens: list[int]
    answers: list[int]


@dataclass(frozen=True)
class Tasks:
    """Token ids: windows of text, prompts to continue, questions with answers."""

    windows: list[list[int]]
    prompts: list[list[int]]
    questions: list[Question]


def longest_sequence(size: Size) -> int:
    """Tokens that the longest sequence of a size can have, with what is generated after it; a bound, any tokenizer."""
    a_word, a_pair = 5, 24
    return max(
        size.window_tokens + 1,
        PROMPT_TOKENS + size.greedy_tokens,
        max(size.needle_lengths, default=0) + AROUND_NEEDLE,
        2 * size.copy_words * a_word + 16,
        (size.pairs + size.pairs // 8 + 2) * a_pair,
    )


def build_tasks(tokenizer, size: Size) -> Tasks:
    """Make the tasks for a tokenizer (`encode(text, add_special_tokens=False)`)."""
    builder = _Builder(tokenizer, fixed_text())
    questions = [builder.needle(length, depth) for length in size.needle_lengths for depth in size.needle_depths]
    questions += [builder.copy(i, size.copy_words) for i in range(size.copies)]
    questions += [builder.lookup(i, size.pairs) for i in range(size.lookups)]
    windows = builder.pieces(size.windows, size.window_tokens)
    return Tasks(windows, builder.pieces(size.greedy_prompts, PROMPT_TOKENS), questions)


class _Builder:
    def __init__(self, tokenizer, text: str):
        self.encode = lambda words: tokenizer.encode(words, add_special_tokens=False)
        with_special = tokenizer.encode("a")
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and with_special[0] == bos else []
        self.text = self.encode(text)
        self.words = sorted({word for word in re.findall(r"[a-z]+", text) if 3 <= len(word) <= 8})

    def pieces(self, count: int, length: int) -> list[list[int]]:
        """Windows of `length` tokens, evenly spaced over the text."""
        length -= len(self.start)
        step = (len(self.text) - length) // max(count, 1)
        if step < length:
            raise ValueError(f"{count} windows of {length} tokens: the text has {len(self.text)} tokens; use less.")
        return [self.start + self.text[i * step : i * step + length] for i in range(count)]

    def needle(self, length: int, depth: float) -> Question:
        """A number stated once inside `length` tokens of text and asked for after them."""
        rng = random.Random(f"needle {length} {depth}")
        place, number = rng.choice(PLACES), str(rng.randrange(10_000, 100_000))
        stated, digits = self.encode(f"\nThe secret number of {place} is"), self.encode(f" {number}")
        first = rng.randrange(len(self.text) - length)
        hay = self.text[first : first + length]
        at = round(depth * length)
        question = f"\n\nQuestion: What is the secret number of {place}?\nAnswer:"
        asked = self.encode(f"{question} The secret number of {place} is")
        tokens = self.start + hay[:at] + stated + digits + self.encode(".\n") + hay[at:] + asked
        return Question("needle", f"{length} @ {depth:g}", tokens + digits, _positions(tokens, digits))

    def copy(self, seed: int, count: int) -> Question:
        """Random words twice; the second time counts, but for its first four words, which say where to copy from."""
        words = random.Random(f"copy {seed}").sample(self.words, count)
        head, tail = self.encode(" " + " ".join(words[:4])), self.encode(" " + " ".join(words[4:]))
        tokens = self.start + self.encode("Words:") + head + tail + self.encode("\nThe same words:") + head
        return Question("copy", str(seed), tokens + tail, _positions(tokens, tail))

    def lookup(self, seed: int, count: int) -> Question:
        """A list of names with numbers, then an eighth of the names again, in another order; their numbers count."""
        rng = random.Random(f"lookup {seed}")
        names = rng.sample(self.words, count)
        numbers = {name: str(rng.randrange(1000, 10_000)) for name in names}
        asked = rng.sample(names, max(1, count // 8))

        def entry(name: str) -> tuple[list[int], list[int]]:
            return self.encode(f"{name}:"), self.encode(f" {numbers[name]}")

        line = self.encode("\n")
        tokens, answers = self.start + self.encode("Telephone list\n"), []
        for name in names:
            label, digits = entry(name)
            tokens = tokens + label + digits + line
        tokens += self.encode("\nFrom the telephone list above\n")
        for name in asked:
            label, digits = entry(name)
            answers += _positions(tokens + label, digits)
            tokens = tokens + label + digits + line
        return Question("lookup", str(seed), tokens, answers)


def _positions(before: list[int], answer: list[int]) -> list[int]:
    return list(range(len(before), len(before) + len(answer)))
