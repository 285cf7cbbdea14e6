"""Settings of the whole suite, and what several of its files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run this suite are shared: how long an example takes says nothing of the code. Derandomised,
# so that a red build is red again when it is run again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("few", parent=settings.get_profile("suite"), max_examples=10)
settings.load_profile(os.environ.get("RLEF_HYPOTHESIS_PROFILE", "suite"))

# A shell's background job ignores Ctrl-C, and so would everything that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with 50,000 random weights: it talks nonsense, but does so at once."""
    from rlef.pretrain import END, PAD, VOCAB_SIZE, train_tokenizer, write_tokenizer
    from rlef.pretrained import write_pretrained
    from rlef.records import ModelShape
    from rlef.torch_model import LlamaModel, initialise

    folder = tmp_path_factory.mktemp("random-model")
    tokenizer = train_tokenizer(iter(["Print the numbers.", "print(1)"]))
    write_tokenizer(folder, tokenizer)
    shape = ModelShape(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = LlamaModel(shape)
    initialise(model, seed=0)
    end_token_id, pad_token_id = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    assert end_token_id is not None
    assert pad_token_id is not None
    write_pretrained(folder, shape, model.state_dict(), end_token_id=end_token_id, pad_token_id=pad_token_id)
    return folder
