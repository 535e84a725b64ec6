"""One small tokenizer of every kind that language models come with, as a version folder has them.

Their vocabularies are full of what is hard to decode: parts of characters, combining marks, joiners, spaces, and added
tokens, special or not, in any place.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The import statement, combined with the from keyword, finds a module and binds names. It's isn't; do not.",
    "Größe, naïve café, 東京 and Ελλάδα; 🙂🚀👩‍👩‍👧 and 𝒳 are text too: e\u0301 a\u0308\u0323, שלום नमस्ते",
    "for number in range(10):\n    print(number, end=', ')\n\n\n        return  x ",
]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_FALLBACK = [decoders.ByteFallback(), decoders.Fuse()]
_SPACES = ["▁", "▁▁", "▁▁▁", "▁the", "▁a", "▁'", "▁n't", "▁\u0301"]
_WORDS = ["the", "a", "s", ".", "'", "n't", "##ing", "##s", "é", "\u0301", "👩", "\u200d", "\ufffd", "x</w>", "</w>"]


def byte_level(vocab_size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _finished(tokenizer, decoders.ByteLevel())


def byte_level_split() -> Tokenizer:
    """As Llama 3 and Qwen have it: a pattern of its own, and spelling normalized."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def byte_fallback(steps: list) -> Tokenizer:
    """Of SentencePiece's shape: what has no token is spelt in byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *_BYTES], limit_alphabet=40)
    trainer.show_progress = False
    tokenizer.train_from_iterator([text[:60] for text in TEXTS], trainer)
    # What training marks as special is plain in the real ones.
    vocab = {token: token_id for token, token_id in tokenizer.get_vocab().items()}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    plain.normalizer = tokenizer.normalizer
    return _finished(plain, decoders.Sequence(steps))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<pad>", "<unk>"], unk_token="<unk>")
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _finished(tokenizer, decoders.Metaspace())


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _finished(tokenizer, decoders.WordPiece())


def words(decoder: decoders.Decoder | None) -> Tokenizer:
    """Difficult words and all byte tokens under any decoder."""
    vocab = {token: token_id for token_id, token in enumerate([*_SPACES, *_WORDS, "<0xZZ>", *_BYTES])}
    return _finished(Tokenizer(models.WordLevel(vocab, unk_token="a")), decoder)


KINDS = {
    "byte_level": byte_level,
    "byte_level_split": byte_level_split,
    "llama": lambda: byte_fallback([decoders.Replace("▁", " "), *_BYTE_FALLBACK, decoders.Strip(" ", 1, 0)]),
    "gemma": lambda: byte_fallback([decoders.Replace("▁", " "), *_BYTE_FALLBACK]),
    "unigram": unigram,
    "word_piece": word_piece,
    "words_llama": lambda: words(
        decoders.Sequence([decoders.Replace("▁", " "), *_BYTE_FALLBACK, decoders.Strip(" ", 1, 0)])
    ),
    "words_strip_two": lambda: words(
        decoders.Sequence([decoders.Replace("▁", " "), *_BYTE_FALLBACK, decoders.Strip(" ", 2, 0)])
    ),
    "words_always": lambda: words(decoders.Metaspace(prepend_scheme="always")),
    "words_first": lambda: words(decoders.Metaspace(prepend_scheme="first")),
    "words_never": lambda: words(decoders.Metaspace(prepend_scheme="never")),
    "words_metaspace_bytes": lambda: words(decoders.Sequence([decoders.Metaspace(), *_BYTE_FALLBACK])),
    "words_replace": lambda: words(decoders.Sequence([decoders.Replace("▁", " ")])),
    "words_pieces": lambda: words(decoders.WordPiece()),
    "words_bytes_only": lambda: words(decoders.ByteFallback()),
    "words_without_decoder": lambda: words(None),
    "words_suffix": lambda: words(decoders.BPEDecoder()),
    "words_across": lambda: words(
        decoders.Sequence([decoders.Replace("▁", " "), *_BYTE_FALLBACK, decoders.Replace("  ", "-")])
    ),
    "words_ctc": lambda: words(decoders.CTC(pad_token="a")),
}


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _finished(tokenizer: Tokenizer, decoder: decoders.Decoder | None) -> Tokenizer:
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>", "<|the end|>"])
    tokenizer.add_tokens(["two words", AddedToken(" lead", normalized=False), "<é>", "▁meta"])
    return tokenizer
