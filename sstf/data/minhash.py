"""Near duplicates, found without comparing all pairs, and how diverse a set of texts is.

A text is the set of its shingles: the 5-character windows of its words (k = 5 is what Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets" 3.2, advise for short texts; characters need no word segmentation). Two texts are near
duplicates if the Jaccard similarity of these sets, |A ∩ B| / |A ∪ B|, reaches a threshold.

MinHash (Broder 1997): the smallest hash of A equals that of B with probability J(A, B). With 192 hash functions the
share of equal minima estimates J with standard error sqrt(J (1 - J) / 192), 0.033 at J = 0.7. Locality-sensitive
hashing finds the candidates: the minima are cut into bands of r, and texts that agree on a whole band are candidates,
which a pair is with probability 1 - (1 - J^r)^bands.

The decision itself is exact: candidates are compared by their real Jaccard similarity, so that what is reported IS a
near duplicate. What may go wrong is a miss: of pairs exactly at a threshold of 0.7 one in 50, at 0.8 one in 10,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sstf.data.words import words

SHINGLE = 5  # characters
HASHES = 192
# Of pairs exactly at the threshold; bands are as narrow as this needs, and no narrower, or everything is a candidate.
RECALL = 0.98
# Where a nearest neighbour is sought among all texts, this many are looked at: the work grows with the square.
DIVERSITY_SAMPLE = 2000

Hashes = npt.NDArray[np.uint64]
Minima = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 4096  # shingles hashed at once, a bound on memory for long texts


class NearDuplicates:
    """Remembers texts and recognises near duplicates of them, one by one as they arrive.

    One to two kB a text, besides the text. Results depend on the texts and their order only, never on the process.
    """

    def __init__(self, threshold: float = 0.7, seed: int = 0) -> None:
        """`threshold` of the Jaccard similarity in (0, 1]; `seed` of the hash functions."""
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected more than 0 and at most 1")
        self.threshold = threshold
        self.texts: list[str] = []  # those that were no near duplicate
        self._hash = MinHash(seed)
        self.rows = _rows(threshold)
        self.bands = HASHES // self.rows
        # Below this estimate an exact comparison is not worth its time: three standard errors under the threshold.
        self._plausible = threshold - 3 * (threshold * (1 - threshold) / HASHES) ** 0.5
        self._allocate(1024)

    def add(self, text: str) -> int | None:
        """Remember `text`, or, if it is a near duplicate, leave it out.

        Returns:
            None if the text is new; it is then the last of `texts`. Else the index in `texts` of the most similar
            one, the earliest of several.
        """
        own = shingles(text)
        minima = self._hash.minima(own)
        candidates = self._candidates(minima)
        estimate = (self._minima[candidates] == minima).mean(axis=1)
        best, similarity = None, 0.0
        for index in candidates[estimate >= self._plausible].tolist():
            exact = jaccard(own, shingles(self.texts[index]))
            if exact >= self.threshold and exact > similarity:
                best, similarity = index, exact
        if best is None:
            self._remember(text, minima)
        return best

    # Texts whose minima fall into the same slot of a band form a chain: `_newest[band, slot]` is the last of them and
    # `_older[index, band]` the one before; -1 ends it. Other minima may share a slot, so candidates are checked.

    def _candidates(self, minima: Minima) -> Indices:
        found = []
        band = np.arange(self.bands)
        index = self._newest[band, self._slots(minima)]
        while (live := index >= 0).any():
            band, index = band[live], index[live]
            found.append(index)
            index = self._older[index, band]
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def _remember(self, text: str, minima: Minima) -> None:
        index = len(self.texts)
        if index == len(self._minima):
            before = self._minima
            self._allocate(2 * index)
            self._minima[:index] = before
            for earlier in range(index):
                self._link(earlier)
        self.texts.append(text)
        self._minima[index] = minima
        self._link(index)

    def _allocate(self, capacity: int) -> None:
        """`capacity` is a power of two, and the number of slots of a band, so that chains stay short."""
        self._minima = np.zeros((capacity, HASHES), dtype=np.uint32)
        self._older = np.full((capacity, self.bands), -1, dtype=np.int32)
        self._newest = np.full((self.bands, capacity), -1, dtype=np.int32)

    def _link(self, index: int) -> None:
        bands, slots = np.arange(self.bands), self._slots(self._minima[index])
        self._older[index] = self._newest[bands, slots]
        self._newest[bands, slots] = index

    def _slots(self, minima: Minima) -> Indices:
        parts = minima[: self.bands * self.rows].reshape(self.bands, self.rows).astype(np.uint64)
        return (_mixed(_polynomial(parts.T)) & np.uint64(len(self._minima) - 1)).astype(np.int64)


class MinHash:
    """`HASHES` hash functions h(x) = top half of (a x + b) mod 2^64, with a odd and x already well mixed."""

    def __init__(self, seed: int = 0) -> None:
        draws = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, size=(2, HASHES, 1), dtype=np.uint64)
        self._a, self._b = draws[0] | np.uint64(1), draws[1]

    def minima(self, hashes: Hashes) -> Minima:
        """The smallest value of each function over a set of shingles [HASHES]."""
        smallest = np.full(HASHES, 2**32 - 1, dtype=np.uint64)
        for start in range(0, len(hashes), _CHUNK):
            values = self._a * hashes[start : start + _CHUNK] + self._b
            np.minimum(smallest, (values >> np.uint64(32)).min(axis=1), out=smallest)
        return smallest.astype(np.uint32)


def shingles(text: str) -> Hashes:
    """Sorted 64-bit hashes of the distinct 5-character windows of a text's words; at least one.

    A text of fewer characters is one shingle, and a text without any word ("?!") is taken as it is.
    """
    normal = " ".join(words(text)) or text
    codes = np.frombuffer(normal.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = min(SHINGLE, len(codes))
    windows = [codes[i : len(codes) - width + 1 + i] for i in range(width)] or [np.zeros(1, dtype=np.uint64)]
    return np.unique(_mixed(_polynomial(windows)))


def jaccard(a: Hashes, b: Hashes) -> float:
    """|A ∩ B| / |A ∪ B| of two sets of shingles."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


@dataclass(frozen=True)
class Diversity:
    """How varied a set of texts is.

    `distinct_1`, `distinct_2`: different word n-grams over all of them (Li et al. 2016). They fall as a set grows, so
    compare sets of one size. `nearest_mean`, `nearest_p90`: similarity of a text to the most similar other one, mean
    and 90th percentile, as in Self-Instruct (Wang et al. 2023, which takes ROUGE-L where this takes the Jaccard
    similarity that near duplicates are told by). Neighbours are sought among `compared` texts, evenly taken.
    """

    texts: int
    distinct_1: float
    distinct_2: float
    nearest_mean: float
    nearest_p90: float
    compared: int


def diversity(texts: Sequence[str]) -> Diversity:
    """The figures of `Diversity`; zeros where there is nothing to count."""
    tokens = [words(text) for text in texts]
    compared = min(len(texts), DIVERSITY_SAMPLE)
    chosen = np.linspace(0, len(texts) - 1, compared).astype(np.int64).tolist()
    nearest = _nearest([shingles(texts[i]) for i in chosen])
    return Diversity(
        texts=len(texts),
        distinct_1=_distinct(tokens, 1),
        distinct_2=_distinct(tokens, 2),
        nearest_mean=float(nearest.mean()) if len(nearest) else 0.0,
        nearest_p90=float(np.quantile(nearest, 0.9)) if len(nearest) else 0.0,
        compared=compared,
    )


def _distinct(tokens: Sequence[list[str]], n: int) -> float:
    grams = [tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _nearest(sets: Sequence[Hashes]) -> npt.NDArray[np.float64]:
    """For each set the Jaccard similarity of the most similar other one, exact, through an inverted index."""
    if len(sets) < 2:
        return np.zeros(len(sets))
    sizes = np.array([len(s) for s in sets])
    _, feature = np.unique(np.concatenate(sets), return_inverse=True)
    owners = np.repeat(np.arange(len(sets)), sizes)[np.argsort(feature, kind="stable")]
    postings = np.split(owners, np.cumsum(np.bincount(feature))[:-1])
    nearest = np.zeros(len(sets))
    for i, own in enumerate(np.split(feature, np.cumsum(sizes)[:-1])):
        common = np.bincount(np.concatenate([postings[f] for f in own]), minlength=len(sets))
        similarity = common / (sizes[i] + sizes - common)
        similarity[i] = 0.0
        nearest[i] = similarity.max()
    return nearest


def _rows(threshold: float) -> int:
    """The most rows a band may have for pairs at the threshold to be found with probability `RECALL`."""
    fitting = [r for r in range(1, HASHES + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL]
    return max(fitting, default=1)


def _polynomial(columns: Sequence[Hashes] | Hashes) -> Hashes:
    """Hash of each row of a table given by its columns."""
    value = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        value = value * _MULTIPLIER + column
    return value


def _mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al. 2014): each input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
