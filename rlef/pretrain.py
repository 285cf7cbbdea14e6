"""The starting model: a tokenizer and a small Llama trained on dialogs of a noisy teacher. `rlef pretrain`.

The teacher stands in for what an instruct model has read: it knows the tasks and the dialog format, guesses
the open conventions, and hardly uses execution feedback. After a failure it often hands in the very same
program again; else it reads an open convention off the feedback now and then, and guesses the others anew.
Reinforcement learning has to do the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from rlef import prompts
from rlef.config import RolloutConfig
from rlef.files import write_text
from rlef.hidden_conventions import READ_NUMBERS, Task, problem, run_reference, task_of
from rlef.pretrained import write_pretrained
from rlef.prompts import Dialog, FailedTest
from rlef.records import ModelShape, Problem, ProblemTest, text_input
from rlef.torch_model import LlamaModel, initialise
from rlef_sandbox import Result, Verdict

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
VOCAB_SIZE = 512

# Words with their leading space, single digits, quotes alone (so that a quoted separator is a token of its
# own), minus alone (so that a separator before a negative number is one), runs of other punctuation, and
# white space.
_PIECES = r" ?[A-Za-z]+| ?\d| ?'|-|[^\sA-Za-z\d'-]+|\s+"


_FIXED_TEXTS = (*prompts.TEMPLATE_TEXTS, READ_NUMBERS)


_TRACE_START = "Traceback (most recent call last):"
_MAX_TEST_CHARACTERS = 80  # as in configs/tiny.toml

SHAPE = ModelShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """How often the teacher does what, each time.

    With these shares it is wholly right after feedback in 10 to 20 % of cases: a test counts them.
    """

    reads: float = 0.3  # one open convention off the feedback; the others are guessed anew
    repeats: float = 0.3  # hands in the same program again
    forgets_fence: float = 0.03  # writes a program without a code block
    breaks: float = 0.04  # leaves out a closing bracket, or misspells a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that determines the shipped model."""

    seed: int = 7
    threads: int = 2  # the last bits of the weights depend on it
    tokenizer_dialogs: int = 3000  # that the tokenizer is trained on
    steps: int = 4500
    tokens_per_step: int = 4096
    lr: float = 2e-3
    warmup_steps: int = 100
    final_lr_ratio: float = 0.05
    weight_decay: float = 0.05
    observation_weight: float = 0.1  # of the loss on tokens that the teacher did not write
    turns: int = 3
    teacher: Teacher = Teacher()
    shape: ModelShape = SHAPE


@dataclass(frozen=True, slots=True)
class Message:
    """One piece of a supervised dialog."""

    role: str  # "prompt", "response" or "feedback"
    text: str


def teach(problem: Problem, random: Random, teacher: Teacher, *, turns: int) -> list[Message]:
    """One dialog of the noisy teacher about a problem of the embedded source."""
    task = task_of(problem)
    (right,) = problem.solutions
    (public,) = problem.public_tests
    messages = [Message("prompt", problem.statement)]
    program = task.program(random.choice(task.readings()))
    for turn in range(turns):
        response, written = _write(program, random, teacher)
        messages.append(Message("response", response))
        if turn == turns - 1 or (written is not None and written == right):
            break
        messages.append(Message("feedback", _feedback(written, public)))
        if random.random() >= teacher.repeats:
            program = task.program(_reconsider(task, right, random, teacher))
    return messages


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens in which each fixed text is one token: the templates, and the
    line that every program starts with."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_FIXED_TEXTS),
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _FIXED_TEXTS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and rlef's own `dialog.json` (the role markers)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    markers = {"user": USER, "assistant": ASSISTANT, "end": END}
    write_text(folder / "dialog.json", json.dumps(markers, indent=2) + "\n")


def pretrain(folder: Path, recipe: Recipe, *, log: Callable[[str], None] = print) -> LlamaModel:
    """Make the starting model from nothing but the recipe, and write it as a Hugging Face folder."""
    torch.set_num_threads(recipe.threads)
    random = Random(recipe.seed)
    sample = [_dialog(recipe, random, index) for index in range(recipe.tokenizer_dialogs)]
    tokenizer = train_tokenizer(_bpe_text(messages) for messages in sample)
    write_tokenizer(folder, tokenizer)
    dialog = Dialog.read(folder, RolloutConfig())
    model = LlamaModel(recipe.shape)
    initialise(model, seed=recipe.seed)
    decay = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    index = len(sample)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(recipe, step)
        sequences: list[tuple[list[int], list[float]]] = []
        while sum(len(ids) for ids, _ in sequences) < recipe.tokens_per_step:
            sequences.append(_encode(dialog, _dialog(recipe, random, index), recipe.observation_weight))
            index += 1
        loss = _loss(model, sequences)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            log(f"pretrain step {step} of {recipe.steps}: loss {loss.item():.4f}")
    write_pretrained(
        folder,
        recipe.shape,
        model.state_dict(),
        end_token_id=dialog.end_token_id,
        pad_token_id=_token_id(tokenizer, PAD),
    )
    return model


def _dialog(recipe: Recipe, random: Random, index: int) -> list[Message]:
    return teach(problem("train", seed=recipe.seed, index=index), random, recipe.teacher, turns=recipe.turns)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def _reconsider(task: Task, right: str, random: Random, teacher: Teacher) -> tuple[str, ...]:
    """A fresh guess, in which some conventions are read off the feedback."""
    (right_reading,) = (reading for reading in task.readings() if task.program(reading) == right)
    guess = random.choice(task.readings())
    return tuple(
        known if random.random() < teacher.reads else guessed
        for known, guessed in zip(right_reading, guess, strict=True)
    )


def _write(program: str, random: Random, teacher: Teacher) -> tuple[str, str | None]:
    """The response text, and the program that execution will see in it (None when there is no code block)."""
    draw = random.random()
    if draw < teacher.forgets_fence:
        return program, None
    if draw < teacher.forgets_fence + teacher.breaks:
        program = (
            program.replace("print(", "print", 1) if random.random() < 0.5 else program.replace("(a", "(b", 1)
        )
    return f"{prompts.FENCE_OPEN}{program}{prompts.FENCE_CLOSE}", program


def _feedback(program: str | None, public_test: ProblemTest) -> str:
    if program is None:
        return prompts.no_code_text()
    try:
        output, verdict, trace = run_reference(program, text_input(public_test)), Verdict.WRONG_OUTPUT, ""
    except SyntaxError as error:
        output, verdict = "", Verdict.SYNTAX_ERROR
        trace = (
            f'  File "solution.py", line {error.lineno}\n    {error.text}\n    ^\nSyntaxError: {error.msg}'
        )
    except NameError as error:
        output, verdict = "", Verdict.EXCEPTION
        line = program.splitlines()[-1]
        trace = f'{_TRACE_START}\n  File "solution.py", line 2, in <module>\n    {line}\nNameError: {error}'
    result = Result(
        verdict=verdict,
        exit_code=0 if verdict is Verdict.WRONG_OUTPUT else 1,
        signal=None,
        stdout=output,
        stderr=trace,
        stdout_truncated=False,
        stderr_truncated=False,
        cpu_s=0.0,
        wall_s=0.0,
        peak_memory_bytes=0,
    )
    return prompts.feedback_text(
        [FailedTest(test=public_test, result=result)], max_test_characters=_MAX_TEST_CHARACTERS
    )


def _bpe_text(messages: Sequence[Message]) -> str:
    text = "\n".join(message.text for message in messages)
    for fixed in _FIXED_TEXTS:
        text = text.replace(fixed, "\n")
    return text


def _encode(
    dialog: Dialog, messages: Sequence[Message], observation_weight: float
) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        if message.role == "prompt":
            piece = dialog.prompt(message.text)
        elif message.role == "response":
            piece = dialog.response(message.text)
        else:
            piece = dialog.feedback(message.text)
        ids += piece
        weights += [1.0 if message.role == "response" else observation_weight] * len(piece)
    return ids, weights


def _loss(model: LlamaModel, sequences: Sequence[tuple[list[int], list[float]]]) -> Tensor:
    token_ids = torch.tensor([token for ids, _ in sequences for token in ids])
    position_ids = torch.cat([torch.arange(len(ids)) for ids, _ in sequences])
    lengths = torch.tensor([0, *(len(ids) for ids, _ in sequences)])
    weights = torch.tensor([weight for _, all_weights in sequences for weight in [0.0, *all_weights[1:]]])
    logits = model(token_ids, position_ids, lengths.cumsum(0).int())  # [tokens, vocab]
    losses = functional.cross_entropy(logits[:-1], token_ids[1:], reduction="none")  # [tokens - 1]
    return (losses * weights[1:]).sum() / weights[1:].sum()


def _schedule(recipe: Recipe, step: int) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return warm * (recipe.final_lr_ratio + (1 - recipe.final_lr_ratio) * cosine)
