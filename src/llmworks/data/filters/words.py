"""Texts as arrays of word ids, and per-word features, so that filters use array operations instead of loops.

A whitespace-separated chunk is tokenized once (`english.split_chunk`) and cached. The vocabulary is cleared when it
exceeds a limit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from llmworks.core.text.words import SPACELESS
from llmworks.data.filters.english import split_chunk

Array = npt.NDArray[Any]
MAX_CHUNKS = 400_000  # cached chunks
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
SENTENCE_ENDS = frozenset(
    "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌"
    "𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈｡。"
)
# what datatrove counts as a symbol: its PUNCTUATION (with control characters) and TERMINAL_PUNCTUATION
TERMINAL = SENTENCE_ENDS | frozenset(
    "؞؝᠉᭽᭾⹓⹔࠷࠹࠽࠾𐽕𐽖𐽗𐽘𐽙𑥄𑥆𑻷𑻸𖺘\U00010f86\U00010f87\U00010f88\U00010f89\U00011f43\U00011f44។៕៖៙៚"
)
SYMBOLS = (
    TERMINAL
    | frozenset("!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»")
    | frozenset(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)
SPACELESS_WORD = regex.compile(rf"([{SPACELESS}]\p{{M}}*)")
END, PUNCTUATION, WORD = 0, 1, 2  # word kinds for the sentence splitter


@dataclass(frozen=True)
class WordBatch:
    """A batch of texts and their word ids: text `i` has `ids[starts[i]:starts[i + 1]]`."""

    texts: list[str]
    ids: Array
    starts: Array

    @property
    def counts(self) -> Array:
        """Number of words of each text."""
        return np.diff(self.starts)

    @property
    def owner(self) -> Array:
        """Index of the text that each word belongs to."""
        return np.repeat(np.arange(len(self.texts)), self.counts)

    def select(self, chosen: Array) -> WordBatch:
        """Select texts by index."""
        parts = [self.ids[self.starts[i] : self.starts[i + 1]] for i in chosen]
        ids = np.concatenate(parts) if parts else self.ids[:0]
        return WordBatch(
            [self.texts[i] for i in chosen],
            ids,
            np.concatenate(([0], np.cumsum([len(p) for p in parts], dtype=np.int64))).astype(np.int64),
        )

    def sum_per_text(self, values: Array) -> Array:
        """Sum a per-word value over each text."""
        total = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
        return total[self.starts[1:]] - total[self.starts[:-1]]


class _ChunkCache(dict[str, tuple[int, ...]]):
    """Cache of chunk -> word ids; a missing chunk is tokenized."""

    def __init__(self) -> None:
        self.word_ids: dict[str, int] = {}
        self.words: list[str] = []

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        ids = []
        for word in split_by_script(chunk):
            number = self.word_ids.get(word)
            if number is None:
                number = self.word_ids[word] = len(self.words)
                self.words.append(word)
            ids.append(number)
        found = tuple(ids)
        if len(chunk) < 100:  # longer ones rarely recur
            self[chunk] = found
        return found


def split_by_script(chunk: str) -> list[str]:
    """Split a chunk between white space into words; each character of a script without spaces is one."""
    if SPACELESS_WORD.search(chunk) is None:
        return list(split_chunk(chunk))
    parts = [part for part in SPACELESS_WORD.split(chunk) if part]
    return [word for part in parts for word in ([part] if SPACELESS_WORD.match(part) else split_chunk(part))]


class WordVocabulary:
    """Word tokenizer with a vocabulary; the arrays hold features of each word, indexed by word id."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.chunks = _ChunkCache()
        self._num_described = 0
        self.length = self.symbol = self.alpha = self.stop = self.spaceless = np.zeros(0, np.int32)
        self.kinds = bytearray()

    def encode(self, texts: Sequence[str]) -> WordBatch:
        """Tokenize texts. Word ids are valid until the next call that clears a too large vocabulary."""
        if len(self.chunks) > MAX_CHUNKS:
            self._reset()
        flat: list[int] = []
        starts = [0]
        for text in texts:
            flat.extend(self._ids(text))
            starts.append(len(flat))
        self._update_features()
        return WordBatch(list(texts), np.array(flat, dtype=np.int32), np.array(starts, dtype=np.int64))

    def _ids(self, text: str) -> Iterable[int]:
        return chain.from_iterable(map(self.chunks.__getitem__, text.split()))

    def _update_features(self) -> None:
        """Extend the feature arrays with new words."""
        new = self.chunks.words[self._num_described :]
        if not new:
            return
        self._num_described += len(new)

        def extend(array: Array, values: list[int]) -> Array:
            return np.concatenate((array, np.array(values, dtype=np.int32)))

        self.length = extend(self.length, [len(w) for w in new])
        self.symbol = extend(self.symbol, [not w.isalnum() and all(c in SYMBOLS for c in w) for w in new])
        self.alpha = extend(self.alpha, [w.isalpha() or any(c.isalpha() for c in w) for w in new])
        self.stop = extend(self.stop, [1 << STOP_WORDS.index(w) if w in STOP_WORDS else 0 for w in new])
        self.spaceless = extend(self.spaceless, [SPACELESS_WORD.match(w) is not None for w in new])
        self.kinds.extend(map(classify_word, new))

    def count_sentences(self, text: str) -> int:
        """Count the sentences of a line: a sentence starts at the first word after a sentence-final mark."""
        ids = list(self._ids(text))
        self._update_features()
        kinds = bytes(map(self.kinds.__getitem__, ids)).translate(None, bytes([PUNCTUATION]))
        return 1 + kinds.count(bytes([END, WORD]))


def classify_word(word: str) -> int:
    """Classify a word as sentence-final punctuation (END), other punctuation (PUNCTUATION), or neither (WORD)."""
    if word in SENTENCE_ENDS:
        return END
    return PUNCTUATION if all(unicodedata.category(c)[0] == "P" for c in word) else WORD
