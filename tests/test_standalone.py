"""What is done with a run afterwards: its policy leaves as a Hugging Face folder, and that is evaluated."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlef.cli import main
from rlef.families import read_config, read_shape
from rlef.pretrained import read_pretrained, write_config, write_pretrained
from rlef.torch_model import LlamaModel, initialise
from tests.small_runs import one_process_job, run_file, saved


def rlef(*arguments: str) -> Result:
    with one_process_job():
        return CliRunner().invoke(main, list(arguments))


@dataclass(frozen=True)
class Finished:
    settings: Path
    start: Path  # model folders
    exported: Path
    run: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Finished:
    """A run of two steps, saved after each, and its exported policy."""
    folder = tmp_path_factory.mktemp("finished")
    settings = run_file(folder)
    trained = rlef("train", str(settings), f"model.path={random_model}", "checkpoint.every_steps=1")
    assert trained.exit_code == 0, trained.output
    exported = rlef("export", str(folder / "small"), str(folder / "exported"))
    assert exported.exit_code == 0, exported.output
    assert exported.stdout == f"wrote {folder / 'exported'}\n"
    return Finished(settings=settings, start=random_model, exported=folder / "exported", run=folder / "small")


def logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    shape, weights = read_pretrained(folder)
    model = LlamaModel(shape)
    model.load_named(weights)
    length = len(token_ids)
    with torch.no_grad():
        computed: torch.Tensor = model(
            torch.tensor(token_ids), torch.arange(length), torch.tensor([0, length]).int()
        )
    return computed


def test_transformers_computes_the_logits_of_an_exported_policy(finished: Finished) -> None:
    token_ids = [1, 40, 300, 2, 77, 511]
    model = AutoModelForCausalLM.from_pretrained(finished.exported, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(found, logits(finished.exported, token_ids), rtol=1e-5, atol=1e-6)


def test_transformers_reads_the_exported_tokenizer(finished: Finished) -> None:
    text = "Print the numbers.\n```python\nprint(1)\n```"
    tokenizer = AutoTokenizer.from_pretrained(finished.exported)
    expected = Tokenizer.from_file(str(finished.start / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(expected) == text


def test_the_exported_policy_is_that_of_the_last_checkpoint(finished: Finished) -> None:
    embedding = saved(finished.run, 2)["policy/weight/model.embed_tokens.weight"]
    _, exported = read_pretrained(finished.exported)
    _, start = read_pretrained(finished.start)
    assert torch.equal(exported["model.embed_tokens.weight"], embedding)
    assert not torch.equal(exported["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_an_earlier_checkpoint_can_be_exported(finished: Finished, tmp_path: Path) -> None:
    checkpoint = finished.run / "checkpoints" / "step-000001"
    result = rlef("export", str(finished.run), str(tmp_path / "earlier"), "--checkpoint", str(checkpoint))
    assert result.exit_code == 0, result.output
    _, earlier = read_pretrained(tmp_path / "earlier")
    _, last = read_pretrained(finished.exported)
    assert not torch.equal(earlier["lm_head.weight"], last["lm_head.weight"])


def test_a_policy_can_be_exported_in_half_precision_and_in_several_files(
    finished: Finished, tmp_path: Path
) -> None:
    options = ("--dtype", "bfloat16", "--max-file-mb", "0.05")
    result = rlef("export", str(finished.run), str(tmp_path / "small"), *options)
    assert result.exit_code == 0, result.output
    files = list((tmp_path / "small").glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 60_000 for file in files)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").state_dict()
    _, whole = read_pretrained(finished.exported)
    assert small.keys() == whole.keys()
    assert all(torch.equal(small[name], tensor.bfloat16()) for name, tensor in whole.items())


def test_a_policy_of_another_family_leaves_in_the_form_of_its_start(
    tmp_path: Path, random_model: Path
) -> None:
    """Qwen3, tied, in bfloat16: trained for a step, exported, and read by transformers."""
    start, exported = shutil.copytree(random_model, tmp_path / "start"), tmp_path / "exported"
    llama = read_shape(random_model)
    shape = replace(llama, model_type="qwen3", head_dim=12, tie_word_embeddings=True)
    model = LlamaModel(shape)
    initialise(model, seed=0)
    ids = {"end_token_id": 3, "pad_token_id": 0}
    write_pretrained(start, shape, model.state_dict(), dtype=torch.bfloat16, **ids)
    before = read_config(start)
    write_config(start, before | {"eos_token_id": [3, 0], "transformers_version": "5.0.0"})
    settings = run_file(tmp_path)
    trained = rlef("train", str(settings), f"model.path={start}", "run.steps=1")
    assert trained.exit_code == 0, trained.output
    result = rlef("export", str(tmp_path / "small"), str(exported))
    assert result.exit_code == 0, result.output
    assert read_config(exported) == before | {"eos_token_id": [3, 0], "transformers_version": "5.0.0"}
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    token_ids = [1, 40, 300, 2, 77, 511]
    with torch.no_grad():
        found = theirs.float()(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(found, logits(exported, token_ids), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, logits(start, token_ids))


def test_evaluating_the_exported_policy_gives_the_runs_own_final_figures(
    finished: Finished, tmp_path: Path
) -> None:
    result = rlef(
        *("eval", str(finished.settings), f"model.path={finished.exported}"),
        *("--output", str(tmp_path / "figures.json")),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "figures.json").read_text())
    expected = json.loads((finished.run / "summary.json").read_text())["final"]
    del found["seconds"], expected["seconds"]
    assert found == expected
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(expected["intervals"])


def test_a_folder_that_holds_a_model_is_not_overwritten(finished: Finished) -> None:
    result = rlef("export", str(finished.run), str(finished.exported))
    assert result.exit_code == 2
    assert result.stderr == f"rlef: error: {finished.exported} is not empty; name another folder\n"


def test_a_run_without_a_checkpoint_cannot_be_exported(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((finished.run / "config.json").read_bytes())
    result = rlef("export", str(tmp_path), str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr == f"rlef: error: {tmp_path} has no checkpoint yet; let the run save one first\n"


def test_a_report_can_be_written_again(finished: Finished) -> None:
    report = finished.run / "report.html"
    first = report.read_text()
    report.unlink()
    result = rlef("report", str(finished.run))
    assert result.exit_code == 0, result.output
    assert report.read_text() == first
