"""``python -m control_plane.training.recipes.pretrain OUT``: a small English model from nothing in a minute and a half.

Trains a tokenizer and a Llama-shaped causal LM on the documentation inside this Python installation, on the CPU, and
writes a Hugging Face folder. Events go to stdout (events.py). It downloads nothing and needs no data.

    corpus → tokenizer → train → evaluate → save          held-out perplexity before, during and after training

Exit codes: 0 trained · 1 failed or stopped (the last event is ``error``) · 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from control_plane.training.checkpoint import staged_folder, write_checkpoint
from control_plane.training.command_line import run_recipe
from control_plane.training.config import PretrainConfig
from control_plane.training.corpus import Document, standard_library_documents
from control_plane.training.errors import InvalidOption, LossNotFinite
from control_plane.training.events import Events
from control_plane.training.language_modeling import batches, encode, has_fast_bfloat16, mean_loss, next_token_loss
from control_plane.training.model_card import model_card
from control_plane.training.optimizer import Optimizers, initialise
from control_plane.training.schedule import Schedule
from control_plane.training.tokenizer import train_tokenizer

STEPS = ("corpus", "tokenizer", "train", "evaluate", "save")


def pretrain(out: Path, config: PretrainConfig, events: Events) -> None:
    started = time.monotonic()
    config.check()
    torch.manual_seed(config.seed)
    with staged_folder(out) as folder:
        events.emit("started", recipe="pretrain", folder=str(out), **dataclasses.asdict(config))
        events.step("corpus")
        documents = standard_library_documents(events.progress)
        events.step("tokenizer")
        tokenizer = train_tokenizer(training_texts(documents), config.vocab_size, config.max_position_embeddings)
        tokens = encode(tokenizer, training_texts(documents))
        held_out = encode(tokenizer, [d.text for d in documents if d.is_held_out])[: config.max_eval_tokens]
        check_enough_text(tokens, held_out, config)
        events.step("train")
        model = new_model(config, tokenizer)
        num_steps = train(model, tokens, held_out, config, started, events)
        events.step("evaluate")
        loss = evaluate(model, held_out, config, events)
        events.step("save")
        card = model_card(
            num_parameters=model.num_parameters(),
            vocab_size=model.config.vocab_size,
            max_seq_length=config.max_seq_length,
            max_position_embeddings=config.max_position_embeddings,
            num_text_tokens=len(tokens),
            num_trained_tokens=num_steps * config.num_tokens_per_step,
            num_steps=num_steps,
            seed=config.seed,
            perplexity=math.exp(loss),
        )
        write_checkpoint(folder, model, tokenizer, generation_config(tokenizer), card)
    events.emit(
        "finished",
        folder=str(out),
        num_parameters=model.num_parameters(),
        num_steps=num_steps,
        perplexity=round(math.exp(loss), 3),
        seconds=round(time.monotonic() - started, 1),
    )


def training_texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents if not document.is_held_out]


def check_enough_text(tokens: torch.Tensor, held_out: torch.Tensor, config: PretrainConfig) -> None:
    # Two rows' worth beyond one batch: a pass over the text may start up to one row late.
    if len(tokens) < config.num_tokens_per_step + 2 * config.max_seq_length or len(held_out) <= config.max_seq_length:
        raise InvalidOption(
            f"max_seq_length has value {config.max_seq_length}; the text has {len(tokens)} tokens for training and "
            f"{len(held_out)} held out, too few for one batch: ask for shorter or fewer rows"
        )


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    initialise(model)
    return model


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    config: PretrainConfig,
    started: float,
    events: Events,
) -> int:
    """Train in place until the schedule ends; returns the number of steps. Raises LossNotFinite and InvalidOption."""
    evaluation_started = time.monotonic()
    evaluate(model, held_out, config, events)
    begun = time.monotonic()
    # What follows training takes another evaluation and a second or so for saving.
    train_s = config.time_limit_s - (begun - started) - 2 * (begun - evaluation_started) - 2
    schedule = Schedule(config.learning_rate, config.warmup_steps, config.max_steps, train_s)
    optimizers = Optimizers(model, config.weight_decay)
    for step, rows in enumerate(batches(tokens, config.per_device_train_batch_size, config.max_seq_length)):
        elapsed_s = time.monotonic() - begun
        if schedule.fraction(step, elapsed_s) >= 1:
            break
        if step and step % config.eval_steps == 0:
            evaluate(model, held_out, config, events)
        learning_rate = schedule.learning_rate_at(step, elapsed_s)
        loss = train_step(model, optimizers, rows, learning_rate, config.max_grad_norm)
        if not math.isfinite(loss):
            raise LossNotFinite(
                f"the loss became {loss} at step {step + 1} with learning rate {learning_rate:.2g}; "
                f"start again with a learning_rate below {config.learning_rate:g} or more warmup_steps"
            )
        events.progress(
            step + 1,
            config.max_steps,
            loss=round(loss, 4),
            learning_rate=round(learning_rate, 8),
            tokens_per_s=round((step + 1) * config.num_tokens_per_step / (time.monotonic() - begun)),
        )
    if step == 0:
        prepared_s = begun - started
        raise InvalidOption(
            f"time_limit_s has value {config.time_limit_s:g}, and no step could be trained: what comes before training "
            f"took {prepared_s:.0f} s, and time is kept for what comes after it; allow more"
        )
    if step < config.max_steps:
        message = f"training ended after {step} of {config.max_steps} steps to keep within {config.time_limit_s:g} s"
        events.emit("warning", code="TIME_LIMIT", message=message)
    return step


def train_step(
    model: LlamaForCausalLM, optimizers: Optimizers, rows: torch.Tensor, learning_rate: float, max_grad_norm: float
) -> float:
    """One update from ``rows`` (B, S + 1); returns the loss per token, which is not finite when training broke down."""
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
        loss = next_token_loss(model, rows)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizers.step(learning_rate)
    return loss.item() + 0 * norm.item()  # a gradient that is not finite makes the loss so


def evaluate(model: LlamaForCausalLM, held_out: torch.Tensor, config: PretrainConfig, events: Events) -> float:
    """Report perplexity on text the model never sees; returns the loss in nats per token."""
    loss, num_tokens = mean_loss(model, held_out, config.max_seq_length)
    events.metrics(perplexity=round(math.exp(loss), 3), loss=round(loss, 4), num_tokens=num_tokens)
    return loss


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    end = tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=True, temperature=0.7, top_k=40, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run_recipe(
        pretrain,
        PretrainConfig,
        STEPS,
        "Train a small causal LM on the documentation inside this Python installation.",
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
