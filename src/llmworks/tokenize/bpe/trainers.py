"""Trainers of the `tokenizers` library for BPE, Unigram and WordPiece, with their normalizers, pre-tokenizers and
decoders.

`train_tokenizer` runs one of them, `to_transformers` adds special tokens and a chat template. Does not access files or
datasets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmworks.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

from llmworks.tokenize.bpe.config import TrainConfig

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE_SYMBOL = "▁"  # SentencePiece's symbol for a space
UNUSED_SCORE = -1e5  # score so low that no segmentation uses the piece
MAX_ALPHABET = 1000  # maximum alphabet size of WordPiece
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # byte-fallback tokens of SentencePiece


def train_tokenizer(
    config: TrainConfig, special_tokens: Sequence[str], texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """Train a tokenizer with the configured algorithm; `special_tokens` are its first tokens."""
    return {"bpe": train_bpe, "unigram": train_unigram, "wordpiece": train_wordpiece}[config.algorithm](
        config, special_tokens, texts
    )


def train_bpe(config: TrainConfig, special_tokens: Sequence[str], texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): lossless, without unknown tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = build_normalizer(config.normalizer)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = {
        "gpt2": whole,
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]),
        "llama-3": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[config.pre_tokenizer]
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=make_added_tokens(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=config.max_token_length,
            show_progress=False,
        ),
    )
    return made


def train_unigram(config: TrainConfig, special_tokens: Sequence[str], texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Train a Unigram tokenizer (Kudo 2018, arXiv:1804.10959) with SentencePiece's byte fallback.

    A "▁" in the text is decoded to a space.
    """
    made = Tokenizer(models.Unigram())
    made.normalizer = build_normalizer(config.normalizer)
    # split at line ends too: otherwise a word between two spaces may be a whole page
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n\t]+"), "isolated"),
            pre_tokenizers.Metaspace(SPACE_SYMBOL, prepend_scheme="never"),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=config.vocab_size - len(BYTE_TOKENS),
        special_tokens=make_added_tokens(special_tokens),
        unk_token="<unk>",
        initial_alphabet=sorted("<0123456789ABCDEFx>"),
        max_piece_length=min(config.max_token_length, 16),
        show_progress=False,
    )
    try:
        made.train_from_iterator(texts(), trainer)
    except Exception as error:  # the library raises plain exceptions
        if "not large enough to contain all chars" not in str(error):
            raise
        characters = len({character for text in texts() for character in text})
        raise UserError(
            f"config.vocab_size is {config.vocab_size}, but the texts have {characters:,} different characters, each of"
            f" which is a piece, beside {len(BYTE_TOKENS)} byte tokens; raise it, or use algorithm bpe"
        ) from None
    state = json.loads(made.to_str())
    first, pieces = (
        state["model"]["vocab"][: len(special_tokens)],
        sort_pieces(state["model"]["vocab"][len(special_tokens) :]),
    )
    # a literal "<0x41>" in the text means these six characters, so their pieces must score higher than the byte token
    state["model"] |= {
        "vocab": [*first, *((byte, UNUSED_SCORE) for byte in BYTE_TOKENS), *pieces],
        "byte_fallback": True,
    }
    whole: Tokenizer = Tokenizer.from_str(json.dumps(state))
    whole.decoder = decoders.Sequence([decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()])
    return whole


def sort_pieces(vocab: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Make the order and scores of the pieces reproducible.

    The library sums in varying order, so the last digits of scores differ; and single letters that it keeps despite low
    scores get their scores in varying order.
    """
    pieces = sorted(((piece, round(score, 6)) for piece, score in vocab), key=lambda item: (-item[1], item[0]))
    tail = len(pieces)
    while tail and len(pieces[tail - 1][0]) == 1:
        tail -= 1
    letters = sorted(piece for piece, _ in pieces[tail:])
    return [*pieces[:tail], *((letter, score) for letter, (_, score) in zip(letters, pieces[tail:], strict=True))]


def train_wordpiece(
    config: TrainConfig, special_tokens: Sequence[str], texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """Train WordPiece as in BERT (Devlin et al. 2019, arXiv:1810.04805).

    Splits at white space and punctuation, matches the longest piece first, else [UNK].
    """
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own = normalizers.BertNormalizer(lowercase=config.lowercase)
    made.normalizer = (
        own if config.normalizer == "none" else normalizers.Sequence([build_normalizer(config.normalizer), own])
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    letters = Counter(c for text in texts() for c in made.normalizer.normalize_str(text) if not c.isspace())
    alphabet = [
        c
        for c, _ in sorted(letters.items(), key=lambda item: (-item[1], item[0]))[
            : min(MAX_ALPHABET, (config.vocab_size - len(special_tokens)) // 4)
        ]
    ]
    inside = [f"##{c}" for c in sorted(alphabet)]  # ids are assigned here, since the library's order varies
    made.train_from_iterator(
        texts(),
        trainers.WordPieceTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=[*make_added_tokens(special_tokens), *inside],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special_tokens]
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return made


def make_added_tokens(special_tokens: Sequence[str]) -> list[AddedToken]:
    """Return the special tokens as AddedTokens, matched in text without normalization."""
    return [AddedToken(token, special=True, normalized=False) for token in special_tokens]


def build_normalizer(form: Literal["none", "nfc", "nfkc"]) -> Any:
    """Return the normalizer of a Unicode form, None for "none"."""
    return {"none": lambda: None, "nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[form]()


def to_transformers(backend: Tokenizer, roles: Mapping[str, str], template: str) -> PreTrainedTokenizerFast:
    """Wrap as a transformers tokenizer with special tokens by role (`eos_token` ...) and a chat template."""
    from transformers import PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = kind(
        tokenizer_object=backend, chat_template=template or None, clean_up_tokenization_spaces=False, **roles
    )
    return tokenizer
