"""Reference implementation of byte-level BPE: merge the most frequent adjacent pair, again and again.

Sennrich et al. 2016 (arXiv:1508.07909), over bytes as in GPT-2 (Radford et al. 2019). The fast library is tested
against it: the same merges and the same ids. Slow on purpose; does not handle special tokens or files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex

from llmworks.tokenize.bpe.bulk_encoder import GPT2, get_byte_characters

Pair = tuple[int, int]
BYTE_ORDER = [
    byte for _, byte in sorted(get_byte_characters().items())
]  # ids of bytes are in the order of their printable characters, as in GPT-2


class BPE:
    """Byte-level BPE tokenizer given by a list of merges.

    Ids start at `first_id`: 256 for the bytes, then one for each merge that gives a new token.

    `pattern` splits text into words; no token crosses a word boundary.
    """

    def __init__(self, merges: Sequence[Pair] = (), *, pattern: str = GPT2, first_id: int = 0) -> None:
        self._words, self._first = regex.compile(pattern), first_id
        self.id_to_bytes = {first_id + i: bytes([byte]) for i, byte in enumerate(BYTE_ORDER)}
        self._bytes_to_id = {token: id for id, token in self.id_to_bytes.items()}
        self.merges: dict[Pair, int] = {}  # pair -> merged id, in the order of training
        self._rank: dict[Pair, int] = {}
        for pair in merges:
            self._add_merge(pair)

    def _add_merge(self, pair: Pair) -> int:
        token = self.id_to_bytes[pair[0]] + self.id_to_bytes[pair[1]]
        id = self._bytes_to_id.setdefault(
            token, self._first + len(self.id_to_bytes)
        )  # two merges may give the same token
        self.id_to_bytes[id] = token
        self.merges[pair] = id
        self._rank.setdefault(pair, len(self._rank))
        return id

    def _split_words(self, data: str | bytes) -> list[list[int]]:
        """Split text into words of byte ids; bytes that are not valid UTF-8 are preserved."""
        text = data.decode("utf-8", "surrogateescape") if isinstance(data, bytes) else data
        return [
            [self._bytes_to_id[bytes([b])] for b in word.encode("utf-8", "surrogateescape")]
            for word in self._words.findall(text)
        ]

    def train(self, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 1) -> None:
        """Train merges until the vocabulary has `vocab_size` ids (including those before `first_id`).

        Stop earlier when no pair occurs `min_frequency` times.

        Of equally frequent pairs the one with the smaller ids is merged first.
        """
        words = Counter(tuple(word) for text in texts for word in self._split_words(text))
        spelled = [(list(word), count) for word, count in words.items()]
        counts: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> words that contain it

        def count(number: int, sign: int) -> None:
            ids, times = spelled[number]
            for pair in pairwise(ids):
                counts[pair] += sign * times
                where[pair].add(number)

        for number in range(len(spelled)):
            count(number, 1)
        while self._first + len(self.id_to_bytes) < vocab_size and counts:
            pair = min(counts, key=lambda p: (-counts[p], p))
            if counts[pair] < min_frequency:
                break
            merged_id = self._add_merge(pair)
            for number in where.pop(pair):
                count(number, -1)
                spelled[number] = (merge_pair(spelled[number][0], pair, merged_id), spelled[number][1])
                count(number, 1)
            counts = +counts  # drop pairs with count 0

    def encode(self, data: str | bytes) -> list[int]:
        """Encode a text: in each word, merge the pair of lowest rank, leftmost first, until none is left."""
        out: list[int] = []
        for ids in self._split_words(data):
            while len(ids) > 1:
                at = min(range(len(ids) - 1), key=lambda i: (self._rank.get((ids[i], ids[i + 1]), len(self._rank)), i))
                pair = (ids[at], ids[at + 1])
                if pair not in self.merges:
                    break
                ids[at : at + 2] = [self.merges[pair]]
            out += ids
        return out

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes; KeyError for an unknown id."""
        return b"".join(self.id_to_bytes[id] for id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; invalid UTF-8 bytes become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def merge_pair(ids: Sequence[int], pair: Pair, merged_id: int) -> list[int]:
    """Replace every occurrence of the pair, from the left, by the merged id."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        if tuple(ids[at : at + 2]) == pair:
            out.append(merged_id)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out
