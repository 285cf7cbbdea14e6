"""Tokenizers of byte-level BPE from a bare vocabulary: tokens, merges, and the name of the splitting.

The names are llama.cpp's, which GGUF files give under `tokenizer.ggml.pre`; `_SPLITTINGS` says what each
stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from rlef.config import ConfigError

_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """How a text is cut into the pieces inside which merges are applied."""

    digits_apart: bool = False  # each is a piece; then GPT-2's pattern on the rest
    pattern: str = ""  # instead of GPT-2's
    composed: bool = False  # Unicode's normal form C comes first
    whole_pieces: bool = False  # a piece that is a token is taken as it is


_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(digits_apart=True),
    "llama-bpe": _Splitting(pattern=_START + r"\p{N}{1,3}" + _END, whole_pieces=True),
    "qwen2": _Splitting(pattern=_START + r"\p{N}" + _END, composed=True),
}


def build_tokenizer(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    splitting: str,
    special: Sequence[str],
    user_defined: Sequence[str],
) -> Tokenizer:
    """A tokenizer whose token ids are the places in `tokens`.

    A merge is two tokens with a blank between them. `special` and `user_defined` tokens are found whole in a
    text; the former are role markers and the like.

    Raises:
        ConfigError: an unknown splitting, or merges of what is no token.
    """
    if splitting not in _SPLITTINGS:
        raise ConfigError(f"splitting {splitting!r} is not implemented, only {', '.join(_SPLITTINGS)}")
    chosen = _SPLITTINGS[splitting]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ConfigError(f"{len(tokens)} tokens, but only {len(vocabulary)} different ones")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = BPE(vocabulary, pairs, ignore_merges=chosen.whole_pieces)
    except Exception as error:  # noqa: BLE001  the library raises nothing more exact
        raise ConfigError(f"merges that do not fit the tokens ({error})") from None
    tokenizer = Tokenizer(model)
    if chosen.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(chosen)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return tokenizer


def _pre_tokenizer(splitting: _Splitting) -> pre_tokenizers.PreTokenizer:
    if splitting.pattern:
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(
            Regex(splitting.pattern), behavior="isolated"
        )
        return pre_tokenizers.Sequence(
            [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    of_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splitting.digits_apart:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), of_gpt2])
    return of_gpt2
