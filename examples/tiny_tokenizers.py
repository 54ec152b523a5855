"""Small tokenizers for the tiny pipelines, trained here on `sentences.txt`.

They follow the conventions of the real ones (T5: `<pad>` 0, `</s>` 1 at the end of every text,
`<unk>` 2; CLIP: single bytes with and without the end-of-word mark, then the merges, then
`<|startoftext|>` and `<|endoftext|>`) and load with `AutoTokenizer` from their folder alone.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import CLIPTokenizer, T5Tokenizer

SENTENCES = Path(__file__).with_name("sentences.txt")


def sentences() -> list[str]:
    """The sentences that this repository ships, in order; each makes a usable prompt."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()


def write_t5_tokenizer(folder: Path, vocab_size: int = 1200, max_length: int = 512) -> int:
    """Trains a unigram tokenizer with T5's special tokens.

    Returns:
        The number of its tokens, at most `vocab_size`: the embedding needs that many rows.
    """
    trained = Tokenizer(Unigram())
    trained.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    trained.train_from_iterator(sentences(), trainer)
    scores = [(piece, score) for piece, score in _model(trained)["vocab"]]
    T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=max_length).save_pretrained(folder)
    return len(scores)


def write_clip_tokenizer(folder: Path, vocab_size: int = 1200, max_length: int = 77) -> int:
    """Trains a byte-level BPE tokenizer with CLIP's end-of-word mark and special tokens.

    Returns:
        The number of its tokens, at most `vocab_size`; the last one is `<|endoftext|>`.
    """
    rules = CLIPTokenizer().backend_tokenizer
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = [*bytes_, *(f"{byte}</w>" for byte in bytes_)]
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(sentences(), trainer)
    merges = [(a, b) for a, b in _model(trained)["merges"]][: vocab_size - len(single) - 2]
    merged = [a + b for a, b in merges]
    pieces = dict.fromkeys([*single, *merged, "<|startoftext|>", "<|endoftext|>"])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length).save_pretrained(folder)
    return len(vocab)


def _model(trained: Tokenizer) -> dict:
    """What was learnt; `Tokenizer` gives scores and merges out as JSON only."""
    return json.loads(trained.to_str())["model"]
