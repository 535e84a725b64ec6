"""Settings of each recipe, frozen and checked before anything is done. Imports only the standard library and errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from control_plane.training.errors import InvalidOption

MIN_VOCAB_SIZE = 257  # one token per byte, and the end of text
MAY_BE_ZERO = frozenset({"seed", "warmup_steps", "weight_decay", "dropout", "label_smoothing_factor"})


@dataclass(frozen=True)
class PretrainConfig:
    """Names are those of TrainingArguments and LlamaConfig; the defaults suit two CPU cores and 100 seconds."""

    max_steps: int = 320
    time_limit_s: float = 105.0  # for everything, saving included; slower machines train fewer steps
    seed: int = 42
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 3
    max_seq_length: int = 512
    eval_steps: int = 120
    max_eval_tokens: int = 16384
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024  # rotary positions carry a little beyond the rows trained on

    @property
    def num_tokens_per_step(self) -> int:
        return self.per_device_train_batch_size * self.max_seq_length

    def check(self) -> None:
        """Raise InvalidOption for the first setting that cannot work."""
        _check_numbers(self)
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise InvalidOption(f"vocab_size has value {self.vocab_size}; expected at least {MIN_VOCAB_SIZE}")
        if self.max_seq_length > self.max_position_embeddings:
            raise InvalidOption(
                f"max_seq_length has value {self.max_seq_length}; expected at most max_position_embeddings, "
                f"{self.max_position_embeddings}"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InvalidOption(
                f"hidden_size has value {self.hidden_size}; expected a multiple of twice the "
                f"num_attention_heads, {2 * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InvalidOption(
                f"num_attention_heads has value {self.num_attention_heads}; expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Names are those of TrainingArguments and of Seq2SeqTransformerConfig; the defaults suit two CPU cores, 100 s,
    and the names of the standard library, spelled in bytes. Larger data deserves a larger ``vocab_size``.

    data                    JSON-lines file of source and target; none: names of the standard library
    label_smoothing_factor  fraction of the target's probability that is spread over all tokens
    """

    data: str = ""
    max_steps: int = 1500
    time_limit_s: float = 105.0
    seed: int = 42
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.1
    per_device_train_batch_size: int = 64
    eval_steps: int = 500
    max_eval_pairs: int = 128
    max_source_len: int = 64
    max_target_len: int = 64
    vocab_size: int = MIN_VOCAB_SIZE
    hidden_size: int = 128
    intermediate_size: int = 384
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    dropout: float = 0.0
    activation: str = "gelu"
    positions: str = "sinusoidal"

    def check(self) -> None:
        """Raise InvalidOption for the first setting that cannot work; what only the model knows, it checks itself."""
        _check_numbers(self)
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise InvalidOption(f"vocab_size has value {self.vocab_size}; expected at least {MIN_VOCAB_SIZE}")
        if self.label_smoothing_factor >= 1:
            raise InvalidOption(
                f"label_smoothing_factor has value {self.label_smoothing_factor}; expected a fraction below 1"
            )
        # The exported attention takes heads of a multiple of 8.
        if self.hidden_size % (8 * self.num_attention_heads):
            raise InvalidOption(
                f"hidden_size has value {self.hidden_size}; expected a multiple of 8 times the num_attention_heads, "
                f"{8 * self.num_attention_heads}"
            )
        for name in ("max_source_len", "max_target_len"):
            if not 2 <= getattr(self, name) < self.max_position_embeddings:
                raise InvalidOption(
                    f"{name} has value {getattr(self, name)}; expected at least 2 and less than "
                    f"max_position_embeddings, {self.max_position_embeddings}"
                )


def _check_numbers(config: PretrainConfig | Seq2SeqConfig) -> None:
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, str):
            continue
        if not value > 0 and not (value == 0 and name in MAY_BE_ZERO):
            raise InvalidOption(f"{name} has value {value}; expected a number above 0")
