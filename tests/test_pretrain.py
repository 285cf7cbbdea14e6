"""The noisy teacher and the recipe of the starting model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlef.config import RolloutConfig
from rlef.hidden_conventions import problem
from rlef.pretrain import Message, Recipe, Teacher, pretrain, teach
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog, extract_code
from rlef.torch_model import LlamaModel

CLEAN = Teacher(forgets_fence=0.0, breaks=0.0)


def dialogs(teacher: Teacher, count: int = 600) -> list[tuple[str, list[Message]]]:
    """(right program, messages) of many dialogs."""
    random = Random(0)
    made = []
    for index in range(count):
        item = problem("train", seed=1, index=index)
        made.append((item.solutions[0], teach(item, random, teacher, turns=3)))
    return made


def later_programs(teacher: Teacher) -> list[tuple[str, str | None, str | None]]:
    """(right program, program, the one after it) for each response that follows feedback."""
    triples = []
    for right, messages in dialogs(teacher):
        codes = [extract_code(message.text) for message in messages if message.role == "response"]
        triples += [(right, earlier, later) for earlier, later in pairwise(codes)]
    return triples


def test_the_shipped_teacher_is_right_after_feedback_in_a_tenth_to_a_fifth_of_cases() -> None:
    programs = later_programs(Teacher())
    assert 0.1 <= sum(later == right for right, _, later in programs) / len(programs) <= 0.2


def test_a_teacher_that_reads_everything_is_right_unless_it_repeats_itself() -> None:
    programs = later_programs(replace(CLEAN, reads=1.0, repeats=0.0))
    assert all(later == right for right, _, later in programs)


def test_the_teacher_repeats_itself_about_as_often_as_it_says() -> None:
    programs = later_programs(CLEAN)
    share = sum(later == earlier for _, earlier, later in programs) / len(programs)
    assert 0.27 < share < 0.4  # 0.3, and guesses that hit the same again


def test_a_dialog_ends_with_the_right_program_or_at_its_last_turn() -> None:
    for right, messages in dialogs(CLEAN, count=100):
        codes = [extract_code(message.text) for message in messages if message.role == "response"]
        assert right not in codes[:-1]
        assert codes[-1] == right or len(codes) == 3


def test_a_forgotten_fence_leaves_no_code() -> None:
    (_, messages), *_ = dialogs(replace(CLEAN, forgets_fence=1.0), count=1)
    assert extract_code(messages[1].text) is None
    assert "No program could be found" in messages[2].text


def test_a_broken_program_is_answered_with_what_it_raised() -> None:
    texts = [messages[2].text for _, messages in dialogs(replace(CLEAN, breaks=1.0), count=20)]
    assert any("\nSyntaxError: " in text for text in texts)
    assert any("\nNameError: " in text for text in texts)


def test_the_recipe_reproduces_the_model_from_its_seed(tmp_path: Path) -> None:
    recipe = replace(Recipe(), steps=3, tokens_per_step=256, tokenizer_dialogs=100)
    for name in ("one", "two"):
        pretrain(tmp_path / name, recipe, log=lambda _: None)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == [
        "config.json",
        "dialog.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_shipped_model_is_small_enough_for_package_data() -> None:
    size = sum(file.stat().st_size for file in model_folder("embedded").iterdir())
    assert size <= 8 * 1024 * 1024


def test_the_shipped_model_has_one_to_three_million_parameters() -> None:
    _, weights = read_pretrained(model_folder("embedded"))
    assert 1_000_000 <= sum(tensor.numel() for tensor in weights.values()) <= 3_000_000


def test_the_shipped_model_has_the_recipes_shape() -> None:
    shape, _ = read_pretrained(model_folder("embedded"))
    assert shape == Recipe().shape


def test_transformers_reads_the_shipped_model_and_gives_our_logits() -> None:
    folder = model_folder("embedded")
    shape, weights = read_pretrained(folder)
    ours = LlamaModel(shape)
    ours.load_named(weights)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(Dialog.read(folder, RolloutConfig()).prompt("Print the numbers sorted."))
    with torch.no_grad():
        mine = ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
        torch.testing.assert_close(mine, theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_shipped_tokenizer() -> None:
    folder = model_folder("embedded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "```python\nprint(1)\n```"
    assert (
        tokenizer(text, add_special_tokens=False).input_ids
        == (Dialog.read(folder, RolloutConfig()).response(text)[:-1])
    )


def test_whoever_may_read_a_new_file_may_read_a_written_model(random_model: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in (*random_model.iterdir(), tmp_path / "new")}
    assert len(modes) == 1
