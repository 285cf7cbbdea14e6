"""Tokenizers from bare vocabularies, against a slow twin and against transformers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlef.byte_level_bpe import build_tokenizer
from tests.gguf_examples import MERGES, SPECIAL, TOKENS

# llama.cpp's expressions for each name (src/llama-vocab.cpp): each cuts the pieces of the one before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
}
TEXTS = st.text(st.one_of(st.sampled_from("the hello 10 12\n\n  '\t-_½²"), st.characters(codec="utf-8")))


def built(splitting: str) -> Tokenizer:
    return build_tokenizer(TOKENS, MERGES, splitting=splitting, special=SPECIAL, user_defined=["<think>"])


def twin(text: str, splitting: str, tokens: Collection[str], merges: Sequence[str]) -> list[str]:
    """The tokens, by applying to each piece the earliest merge that it has a place for, again and again."""
    pieces = [text]
    for expression in EXPRESSIONS[splitting]:
        pieces = [part for piece in pieces for part in cut(piece, expression)]
    spelling, ranks = bytes_to_unicode(), {merge: rank for rank, merge in enumerate(merges)}
    spelled = ["".join(spelling[byte] for byte in piece.encode("utf-8")) for piece in pieces]
    whole = set(spelled).intersection(tokens) if splitting == "llama-bpe" else set()
    return [token for word in spelled for token in ([word] if word in whole else merged(list(word), ranks))]


def cut(text: str, expression: str) -> list[str]:
    """Its matches, and what lies between them."""
    bounds = [bound for match in regex.finditer(expression, text) for bound in match.span()]
    return [text[start:end] for start, end in itertools.pairwise([0, *bounds, len(text)]) if start < end]


def merged(symbols: list[str], ranks: Mapping[str, int]) -> list[str]:
    while True:
        pairs = [f"{left} {right}" for left, right in itertools.pairwise(symbols)]
        best = min((pair for pair in pairs if pair in ranks), key=ranks.__getitem__, default=None)
        if best is None:
            return symbols
        place = pairs.index(best)
        symbols = [*symbols[:place], best.replace(" ", ""), *symbols[place + 2 :]]


@pytest.mark.parametrize("splitting", EXPRESSIONS)
@given(text=TEXTS)
def test_a_text_becomes_the_tokens_of_the_twin(splitting: str, text: str) -> None:
    tokenizer = built(splitting)
    tokenizer.encode_special_tokens = True
    if splitting == "qwen2":
        text = normalizers.NFC().normalize_str(text)
    assert tokenizer.encode(text).tokens == twin(text, splitting, TOKENS, MERGES)


@given(text=TEXTS)
def test_a_text_comes_back_whole(text: str) -> None:
    tokenizer = built("smollm")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(text=TEXTS)
def test_qwen2_is_split_as_transformers_splits_it(text: str) -> None:
    theirs = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(TOKENS)},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
    )
    assert built("qwen2").encode(text).ids == theirs.backend_tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("splitting", "tokens"),
    [
        ("gpt-2", ["Ġthe", "Ġ", "Ġ", "12"]),
        ("smollm", ["Ġthe", "ĠĠ", "1", "2"]),
        ("llama-bpe", ["Ġthe", "Ġ", "Ġ", "12"]),
        ("qwen2", ["Ġthe", "Ġ", "Ġ", "1", "2"]),
    ],
)
def test_numbers_are_split_as_each_name_says(splitting: str, tokens: list[str]) -> None:
    assert built(splitting).encode(" the  12").tokens == tokens
