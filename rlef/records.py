"""The types that cross files. Everything else stays inside the file that made it.

They are named in the order in which data meets them: Problem, Turn, Episode, Batch, StepStats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from rlef_sandbox import Call, Judge, Result, Test


@dataclass(frozen=True, slots=True)
class Expression:
    """Python that is evaluated where the program was run, and the literal of the value that it should have.

    For what JSON cannot hold, such as tuples, sets and complex numbers. In a literal `1e999` stands for
    infinity and `...` for a number that is none.
    """

    code: str
    expected: str


@dataclass(frozen=True, slots=True)
class Assertion:
    """Python that is executed where the program was run, and raises if the program is wrong."""

    code: str


ProblemTest = Test | Call | Expression | Assertion
"""Standard input and output, a call of `Problem.function` with JSON, or Python that uses the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """A judge as problem packages have it: the sources of one program in C++, called with `flags`."""

    files: Mapping[str, str]  # by name: what is compiled, and its headers
    flags: tuple[str, ...] = ()


ProblemFlag = Literal["interactive", "several_answers", "tests_left_out"]
"""What no comparison of outputs can judge: a dialog with a judge, and statements that accept several answers
where the tests name one. Then, what the problem lacks of its source: tests whose answers would take too long
or be too large."""


FeedbackDialect = Literal["code_contests", "evalplus"]
"""How feedback tells of public tests: the failing ones with input and output, as the paper does for
CodeContests, or all of them as assertions with values, as it does for HumanEval+ and MBPP+."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One programming task. Public tests feed the dialog, private tests only the reward.

    All tests of a problem are of one kind.
    """

    id: str
    statement: str
    public_tests: tuple[ProblemTest, ...]
    private_tests: tuple[ProblemTest, ...]
    time_limit_s: float
    memory_limit_bytes: int
    source: str
    solutions: tuple[str, ...] = ()  # programs that should pass all tests
    incorrect_solutions: tuple[str, ...] = ()  # programs that should fail one
    judge: Judge | Validator | None = None  # None: "code_contests" for text, equal values for the other kinds
    function: str = ""  # what a `Call` calls: a function, or a method of `Solution`
    prelude: str = ""  # Python that runs before each program: imports that its source takes for granted
    starter_code: str = ""  # the beginning of an answer that the source gives
    flags: tuple[ProblemFlag, ...] = ()
    difficulty: str = ""  # in the source's own words
    rating: int | None = None
    solve_rate: float | None = None  # of a model's dialogs about it: `rlef problems select`
    dialect: FeedbackDialect = "code_contests"
    stub: str = ""  # what the code of every response begins with; prefilled, so the policy is not charged


def text_input(test: ProblemTest) -> str:
    """The input of a test for a program that reads text: the files of problems are JSON."""
    assert isinstance(test, Test)
    assert isinstance(test.input, str)
    return test.input


class TurnOutcome(StrEnum):
    """What the public tests said about one response, the worst news first."""

    NO_CODE = "no_code"
    SYNTAX_ERROR = "syntax_error"
    EXCEPTION = "exception"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    OUTPUT_LIMIT = "output_limit"
    SECURITY = "security"
    WRONG_OUTPUT = "wrong_output"
    PASSED = "passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One response of the policy and what execution said about it."""

    start: int  # index in Episode.token_ids of the response's first token
    end: int  # one past the response's last token, the end-of-turn token included
    finish_reason: str  # "stop" or "length"
    code: str | None  # None when no program could be found in the response
    outcome: TurnOutcome
    public_results: tuple[Result, ...]
    seconds: float = field(default=0.0, compare=False)  # its share of the wall-clock time, where it is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One problem, attempted until its public tests pass or the turns run out."""

    problem_id: str
    number: int  # unique in a run: the sampler's random stream is keyed by it
    token_ids: list[int]  # [tokens] prompt, responses and feedback, in order; never re-tokenised
    sampled: list[bool]  # [tokens] True where the policy chose the token
    logprobs: list[float]  # [tokens] under the distribution that sampled it; 0.0 elsewhere
    versions: list[int]  # [tokens] weights version that sampled it; -1 elsewhere
    turns: tuple[Turn, ...]
    solved: bool  # the last code passed every test, public and private
    rewards: tuple[float, ...] = ()  # [turns] environment reward, without the KL term

    @property
    def passed_public(self) -> bool:
        return self.turns[-1].outcome is TurnOutcome.PASSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Episodes packed end to end: what one forward pass of a policy or value network takes.

    `tokens`, `sequences`, `turns` and `values` are counts over the whole pack. A *value* is one
    reading of the value network: one per turn (the paper), or one per response token (ablation).
    Everything per token is aligned with the token itself, not with the position that predicts it.
    """

    token_ids: Tensor  # [tokens] int64
    position_ids: Tensor  # [tokens] int64, restarting at 0 in every sequence
    cu_seqlens: Tensor  # [sequences + 1] int32
    response_mask: Tensor  # [tokens] bool, True where the policy chose the token
    behaviour_logprobs: Tensor  # [tokens] float32, 0 outside the response mask
    token_turns: Tensor  # [tokens] int64, the turn that a response token belongs to; -1 elsewhere
    token_values: Tensor  # [tokens] int64, the value whose advantage it takes; -1 elsewhere
    value_positions: Tensor  # [values] int64, the packed index at which the value is read
    value_turns: Tensor  # [values] int64
    turn_rewards: Tensor  # [turns] float32, environment reward
    turn_sequences: Tensor  # [turns] int64, the sequence of each turn, ascending

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_turns(self) -> int:
        return self.turn_rewards.shape[0]

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_mask.sum())

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: getattr(self, name).to(device) for name in self.__slots__})


ModelType = Literal["llama", "qwen2", "qwen3"]
"""The families of decoders that are implemented, under their names in `config.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies stretched for long contexts, as Llama 3.1 has them ("llama3" in `config.json`).

    Wavelengths beyond `original_max_position_embeddings / low_freq_factor` grow by `factor`, those below
    `original_max_position_embeddings / high_freq_factor` stay, and between the two it goes smoothly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The shape of a decoder, under the names of its Hugging Face `config.json`."""

    model_type: ModelType = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # need not be hidden_size / num_attention_heads
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float
    tie_word_embeddings: bool

    @property
    def query_key_value_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def query_key_norm(self) -> bool:
        """Whether each head's query and key pass through a norm before they are rotated."""
        return self.model_type == "qwen3"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one training step reports; one line of `metrics.jsonl`."""

    step: int
    metrics: dict[str, float]
