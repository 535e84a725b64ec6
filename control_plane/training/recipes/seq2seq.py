"""``python -m control_plane.training.recipes.seq2seq OUT``: an encoder–decoder Transformer from pairs of texts.

Trains on ``--data pairs.jsonl`` or, without it, on names of the standard library (pairs.py), on the CPU, and writes
config.json, model.safetensors, tokenizer.json and generation_config.json. Events go to stdout (events.py).

    corpus → tokenizer → train → evaluate → save     held-out loss, token accuracy and exact match along the way

Exit codes: 0 trained · 1 failed or stopped (the last event is ``error``) · 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast

from control_plane.training.checkpoint import staged_folder
from control_plane.training.command_line import run_recipe
from control_plane.training.config import Seq2SeqConfig
from control_plane.training.errors import InvalidData, InvalidOption, LossNotFinite
from control_plane.training.events import Events
from control_plane.training.model_card import seq2seq_card
from control_plane.training.pairs import Pair, read_pairs, standard_library_pairs
from control_plane.training.recipes.seq2seq_transformer import Seq2SeqTransformer, Seq2SeqTransformerConfig
from control_plane.training.schedule import Schedule
from control_plane.training.tokenizer import END_OF_TEXT, train_tokenizer

STEPS = ("corpus", "tokenizer", "train", "evaluate", "save")


@dataclass(frozen=True)
class Example:
    """Token ids of one pair, each with the end-of-text token."""

    source: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """On held-out pairs: nats per token, and fractions of tokens and of whole targets that are right."""

    loss: float
    token_accuracy: float
    exact_match: float


def seq2seq(out: Path, config: Seq2SeqConfig, events: Events) -> None:
    started = time.monotonic()
    config.check()
    torch.manual_seed(config.seed)
    with staged_folder(out) as folder:
        events.emit("started", recipe="seq2seq", folder=str(out), **dataclasses.asdict(config))
        events.step("corpus")
        pairs = read_pairs(Path(config.data)) if config.data else standard_library_pairs(events.progress)
        events.step("tokenizer")
        tokenizer = new_tokenizer([pair for pair in pairs if not pair.is_held_out], config)
        examples = encode(tokenizer, [pair for pair in pairs if not pair.is_held_out], config)
        held_out = encode(tokenizer, [pair for pair in pairs if pair.is_held_out], config)[: config.max_eval_pairs]
        check_enough_pairs(examples, held_out, config)
        events.step("train")
        model = new_model(config, tokenizer)
        num_steps = train(model, examples, held_out, config, started, events)
        events.step("evaluate")
        score = evaluate(model, held_out, events)
        events.step("save")
        card = seq2seq_card(
            num_parameters=model.num_parameters,
            vocab_size=model.config.vocab_size,
            data=Path(config.data).name if config.data else "names of the standard library and their words",
            num_pairs=len(examples),
            num_steps=num_steps,
            seed=config.seed,
            exact_match=score.exact_match,
        )
        save(folder, model, tokenizer, card)
    events.emit(
        "finished",
        folder=str(out),
        num_parameters=model.num_parameters,
        num_steps=num_steps,
        loss=round(score.loss, 4),
        token_accuracy=round(score.token_accuracy, 4),
        exact_match=round(score.exact_match, 4),
        seconds=round(time.monotonic() - started, 1),
    )


def new_tokenizer(pairs: Sequence[Pair], config: Seq2SeqConfig) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that ends every text, as the encoder has learned to expect."""
    texts = (text for pair in pairs for text in (pair.source, pair.target))
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
    end = (END_OF_TEXT, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[end])
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], config: Seq2SeqConfig) -> list[Example]:
    """Pairs of which both sides fit; a cut one would teach to stop in the middle."""
    sources = tokenizer([pair.source for pair in pairs], verbose=False)["input_ids"] if pairs else []
    targets = tokenizer([pair.target for pair in pairs], verbose=False)["input_ids"] if pairs else []
    return [
        Example(tuple(source), tuple(target))
        for source, target in zip(sources, targets, strict=True)
        if len(source) <= config.max_source_len and len(target) <= config.max_target_len
    ]


def check_enough_pairs(examples: Sequence[Example], held_out: Sequence[Example], config: Seq2SeqConfig) -> None:
    if len(examples) < config.per_device_train_batch_size or not held_out:
        raise InvalidData(
            f"there are {len(examples)} pairs for training and {len(held_out)} held out that fit into max_source_len "
            f"{config.max_source_len} and max_target_len {config.max_target_len}; expected at least one batch of "
            f"{config.per_device_train_batch_size} and one held out (one pair in 15 is): bring more, or shorter ones"
        )


def new_model(config: Seq2SeqConfig, tokenizer: PreTrainedTokenizerFast) -> Seq2SeqTransformer:
    sizes = {field.name for field in dataclasses.fields(Seq2SeqTransformerConfig)}
    given = {name: value for name, value in dataclasses.asdict(config).items() if name in sizes}
    end = tokenizer.eos_token_id
    given |= {"vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end, "decoder_start_token_id": end}
    try:
        return Seq2SeqTransformer(Seq2SeqTransformerConfig(**given))
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches in random order, for ever; what does not fill a batch at the end of a pass is left to the next one."""
    while True:
        for chosen in torch.randperm(len(examples)).split(batch_size):
            if len(chosen) == batch_size:
                yield [examples[index] for index in chosen.tolist()]


def padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, S) int64, of rows padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_token_id] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def losses(model: Seq2SeqTransformer, examples: Sequence[Example], smoothing: float) -> tuple[torch.Tensor, float]:
    """(mean loss per target token in nats, fraction of target tokens that are the likeliest)."""
    config = model.config
    source, source_mask = padded([example.source for example in examples], config.pad_token_id)
    target, target_mask = padded([example.target for example in examples], config.pad_token_id)
    start = torch.full_like(target[:, :1], config.decoder_start_token_id)
    logits = model(source, source_mask, torch.cat((start, target[:, :-1]), dim=1), target_mask)  # (B, T, V)
    is_target = target_mask.bool()  # the padding token may be the end-of-text token, so ids do not tell
    loss = functional.cross_entropy(logits[is_target].float(), target[is_target], label_smoothing=smoothing)
    accuracy = (logits[is_target].argmax(-1) == target[is_target]).float().mean().item()
    return loss, accuracy


def train(
    model: Seq2SeqTransformer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: Seq2SeqConfig,
    started: float,
    events: Events,
) -> int:
    """Train in place until the schedule ends; returns the number of steps. Raises LossNotFinite and InvalidOption."""
    evaluation_started = time.monotonic()
    evaluate(model, held_out, events)
    begun = time.monotonic()
    # What follows training takes another evaluation and a second or so for saving.
    train_s = config.time_limit_s - (begun - started) - 2 * (begun - evaluation_started) - 2
    schedule = Schedule(config.learning_rate, config.warmup_steps, config.max_steps, train_s)
    optimizer = new_optimizer(model, config.weight_decay)
    num_tokens = 0
    for step, batch in enumerate(batches(examples, config.per_device_train_batch_size)):
        elapsed_s = time.monotonic() - begun
        if schedule.fraction(step, elapsed_s) >= 1:
            break
        if step and step % config.eval_steps == 0:
            evaluate(model, held_out, events)
        learning_rate = schedule.learning_rate_at(step, elapsed_s)
        loss = train_step(model, optimizer, batch, learning_rate, config)
        if not math.isfinite(loss):
            raise LossNotFinite(
                f"the loss became {loss} at step {step + 1} with learning rate {learning_rate:.2g}; "
                f"start again with a learning_rate below {config.learning_rate:g} or more warmup_steps"
            )
        num_tokens += sum(len(example.target) for example in batch)
        events.progress(
            step + 1,
            config.max_steps,
            loss=round(loss, 4),
            learning_rate=round(learning_rate, 8),
            tokens_per_s=round(num_tokens / (time.monotonic() - begun)),
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


def new_optimizer(model: Seq2SeqTransformer, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices of the layers decay, not tables, norms and biases."""
    named = list(model.named_parameters())
    layers = [p for name, p in named if p.dim() > 1 and name.startswith(("encoder.", "decoder."))]
    others = [p for name, p in named if p.dim() < 2 or not name.startswith(("encoder.", "decoder."))]
    groups = [{"params": layers, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


def train_step(
    model: Seq2SeqTransformer,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    learning_rate: float,
    config: Seq2SeqConfig,
) -> float:
    """One update; returns the loss per token, which is not finite when training broke down."""
    model.train()
    loss, _ = losses(model, batch, config.label_smoothing_factor)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() + 0 * norm.item()  # a gradient that is not finite makes the loss so


@torch.no_grad()
def evaluate(model: Seq2SeqTransformer, held_out: Sequence[Example], events: Events) -> Score:
    """Report loss, token accuracy (given the right tokens before) and exact match (given nothing) on held-out pairs."""
    model.eval()
    loss, accuracy = losses(model, held_out, smoothing=0.0)
    source, mask = padded([example.source for example in held_out], model.config.pad_token_id)
    found = model.generate(source, mask, max(len(example.target) for example in held_out))
    num_exact = sum(tuple(row) == example.target[:-1] for row, example in zip(found, held_out, strict=True))
    score = Score(loss.item(), accuracy, num_exact / len(held_out))
    events.metrics(
        loss=round(score.loss, 4),
        perplexity=round(math.exp(score.loss), 3),
        token_accuracy=round(score.token_accuracy, 4),
        exact_match=round(score.exact_match, 4),
        num_pairs=len(held_out),
    )
    return score


def save(folder: Path, model: Seq2SeqTransformer, tokenizer: PreTrainedTokenizerFast, card: str) -> None:
    model.save(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    GenerationConfig(
        do_sample=False, decoder_start_token_id=end, bos_token_id=end, eos_token_id=end, pad_token_id=end
    ).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_recipe(
        seq2seq, Seq2SeqConfig, STEPS, "Train an encoder-decoder Transformer on pairs of texts.", arguments
    )


if __name__ == "__main__":
    sys.exit(main())
