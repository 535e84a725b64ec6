"""Settings of each recipe, frozen and checked before anything is done. Imports only the standard library and errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from control_plane.training.errors import InvalidOption

MIN_VOCAB_SIZE = 257  # one token per byte, and the end of text
MAY_BE_ZERO = frozenset({"seed", "warmup_steps", "weight_decay"})


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
        for name, value in dataclasses.asdict(self).items():
            if not value > 0 and not (value == 0 and name in MAY_BE_ZERO):
                raise InvalidOption(f"{name} has value {value}; expected a number above 0")
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
