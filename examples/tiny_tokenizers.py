"""Small tokenizers for the tiny pipelines, trained here on `sentences.txt`.

They follow the conventions of the real ones (T5: `<pad>` 0, `</s>` 1 at the end of every text,
`<unk>` 2; CLIP: single bytes with and without the end-of-word mark, then the merges, then
`<|startoftext|>` and `<|endoftext|>`) and load with `AutoTokenizer` from their folder alone.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE, Unigram
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

SENTENCES = Path(__file__).with_name("sentences.txt")

TEMPLATE_WORDS = """
Actions Describe The and angles aspects assistant atmosphere background behaviors by camera changes
color content detailing environment events following image in light main movement movements objects
of physical quantity relationships shape size spatial style system temporal text texture the theme
transitions used user video
"""
"""What the prompts of Qwen-Image, Z-Image and HunyuanVideo are wrapped in. Each word is one token,
as in the real tokenizers, because pipelines drop the wrapping by its number of tokens."""

QWEN_SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """\
{% for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{% endif -%}
"""
"""Qwen3's format for messages of plain text: one that may think begins its answer with nothing."""


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


def write_qwen_tokenizer(folder: Path, vocab_size: int = 1600) -> Qwen2Tokenizer:
    """Trains a byte-level BPE tokenizer with Qwen's special tokens and Qwen3's chat template."""
    vocab, merges = _train_byte_level(vocab_size)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=QWEN_SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_llama_tokenizer(folder: Path, vocab_size: int = 1600) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with Llama 3's special tokens.

    Every text begins with `<|begin_of_text|>` and has no end mark.
    """
    vocab, merges = _train_byte_level(vocab_size)
    trained = Tokenizer(BPE(vocab=vocab, merges=merges))
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    begin = "<|begin_of_text|>"
    marks = [begin, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trained.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    trained.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, trained.token_to_id(begin))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_gemma_tokenizer(folder: Path, vocab_size: int = 1600) -> GemmaTokenizer:
    """Trains a BPE tokenizer with Gemma's special tokens and a token for every byte.

    Spaces are `▁`, and every text begins with `<bos>`. Padding goes left unless asked otherwise.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation, "▁"],
        show_progress=False,
    )
    trained.train_from_iterator(sentences(), trainer)
    pieces = sorted(_model(trained)["vocab"].items(), key=lambda item: item[1])
    tokenizer = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate([*special, *(piece for piece, _ in pieces)])},
        merges=[(a, b) for a, b in _model(trained)["merges"]],
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        add_bos_token=True,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_byte_level(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges that split text as Qwen does; Llama 3 differs in numbers only."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    wrapping = [form for word in TEMPLATE_WORDS.split() for form in (word, f" {word}")]
    # Often enough for their merges to come first.
    trained.train_from_iterator([*sentences(), *(["\n\n", *wrapping] * 1000)], trainer)
    return _model(trained)["vocab"], [(a, b) for a, b in _model(trained)["merges"]]


def _model(trained: Tokenizer) -> dict:
    """What was learnt; `Tokenizer` gives scores and merges out as JSON only."""
    return json.loads(trained.to_str())["model"]
