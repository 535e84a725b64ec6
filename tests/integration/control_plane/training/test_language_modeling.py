"""Windows over a text, and the loss over them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from control_plane.training.language_modeling import batches, mean_loss
from control_plane.training.optimizer import Optimizers, initialise

pytestmark = pytest.mark.integration


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_windows_are_pieces_of_the_text_with_one_token_to_predict_each() -> None:
    torch.manual_seed(0)
    for rows in islice(batches(torch.arange(100), batch_size=3, length=8), 50):
        assert rows.shape == (3, 9)
        assert (rows.diff(dim=1) == 1).all()


def test_one_pass_shows_no_token_twice() -> None:
    torch.manual_seed(0)
    targets = torch.cat([rows[:, 1:].flatten() for rows in islice(batches(torch.arange(100), 2, 8), 5)])
    assert len(targets) == len(targets.unique()) == 80


def test_mean_loss_predicts_every_token_of_whole_windows(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(50, (30,))
    loss, num_tokens = mean_loss(model, tokens, length=8)
    whole = [model(input_ids=tokens[None, s : s + 9], labels=tokens[None, s : s + 9]).loss.item() for s in (0, 8, 16)]
    assert num_tokens == 24
    assert loss == pytest.approx(sum(whole) / 3, abs=1e-5)


def test_initialised_layers_are_the_identity(model: LlamaForCausalLM) -> None:
    initialise(model)
    embedded = model.model.embed_tokens(torch.arange(8)[None])  # (1, 8, hidden)
    assert torch.equal(model.model(torch.arange(8)[None]).last_hidden_state, model.model.norm(embedded))


def test_optimizers_move_every_parameter(model: LlamaForCausalLM) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = Optimizers(model, weight_decay=0.1)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizers.step(learning_rate=0.01)
    assert [name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)] == []
    assert all(parameter.grad is None for parameter in model.parameters())
