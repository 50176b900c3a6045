from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.data.minhash import HASHES, MinHash, NearDuplicates, diversity, jaccard, shingles
from sstf.data.words import words


def random_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(count)]


def overlapping(rng: random.Random, count: int, changed: int) -> tuple[str, str]:
    """Two texts of `count` words that differ in the last `changed` of them."""
    common = random_words(rng, count - changed)
    return tuple(" ".join([*common, *random_words(rng, changed)]) for _ in range(2))  # type: ignore[return-value]


def naive_jaccard(a: str, b: str) -> float:
    one, other = ({t[i : i + 5] for i in range(max(1, len(t) - 4))} for t in (" ".join(words(a)), " ".join(words(b))))
    return len(one & other) / len(one | other)


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_jaccard_similarity_is_that_of_the_sets_of_windows(a: str, b: str) -> None:
    if words(a) and words(b):
        assert jaccard(shingles(a), shingles(b)) == naive_jaccard(a, b)


def test_the_similarity_by_hand() -> None:
    # windows of "abcdef": abcde bcdef; of "abcdeg": abcde bcdeg; one of three is common
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == 1 / 3
    # case, punctuation, spacing and full-width letters do not count
    assert jaccard(shingles("Hello,   World!"), shingles("hello ｗorld")) == 1.0
    assert jaccard(shingles("?!"), shingles("?!?!?!?!")) < 1.0, "texts without words are compared as they are"
    assert jaccard(shingles(""), shingles("")) == 1.0
    assert jaccard(shingles("ab"), shingles("cd")) == 0.0


def test_the_estimate_is_unbiased_and_has_the_stated_standard_error() -> None:
    rng = random.Random(1)
    errors, expected = [], []
    for _ in range(150):
        a, b = (shingles(text) for text in overlapping(rng, 40, rng.randint(1, 30)))
        exact = jaccard(a, b)
        minhash = MinHash(rng.randrange(2**32))
        errors.append(float((minhash.minima(a) == minhash.minima(b)).mean()) - exact)
        expected.append((exact * (1 - exact) / HASHES) ** 0.5)
    scaled = np.array(errors) / np.array(expected)
    # 150 draws of a standard normal variable: the mean is within 0.3 and the spread within 0.75 .. 1.25, barring 1e-4
    assert abs(scaled.mean()) < 0.3
    assert 0.75 < scaled.std() < 1.25


def test_a_long_text_is_hashed_in_chunks_and_the_minima_are_the_same() -> None:
    hashes = shingles(" ".join(random_words(random.Random(2), 3000)))
    assert len(hashes) > 2 * 4096
    minhash = MinHash()
    halves = [minhash.minima(part) for part in np.array_split(hashes, 7)]
    assert (minhash.minima(hashes) == np.minimum.reduce(halves)).all()


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(3)
    missed = 0
    seen = NearDuplicates(threshold=0.7)
    for number in range(1500):  # more than the first 1,024 slots
        a, b = overlapping(rng, 30, rng.choice([1, 2, 3, 8, 20]))
        similarity = naive_jaccard(a, b)
        assert seen.add(a) is None, "random words share no window with earlier texts"
        found = seen.add(b)
        if found is not None:
            assert similarity >= 0.7
            assert seen.texts[found] == a
        elif similarity >= 0.7:
            missed += 1
        assert len(seen.texts) >= number
    # 3 in 5 pairs are near duplicates, most of them well above the threshold
    assert missed <= 9, "1 %"


def test_recall_just_above_the_threshold() -> None:
    rng = random.Random(4)
    pairs = [overlapping(rng, 60, 10) for _ in range(300)]
    assert all(0.70 <= naive_jaccard(a, b) < 0.75 for a, b in pairs)
    seen = NearDuplicates(threshold=0.7)
    missed = 0
    for a, b in pairs:
        seen.add(a)
        missed += seen.add(b) is None
    assert missed <= 15, "2 % are expected, 5 % is three standard deviations more"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet="abc .,", max_size=30), max_size=30), st.sampled_from([0.3, 0.7, 1.0]))
def test_whatever_is_reported_is_a_near_duplicate_and_a_copy_always_is(texts: list[str], threshold: float) -> None:
    seen = NearDuplicates(threshold)
    for text in texts:
        found = seen.add(text)
        if found is None:
            assert seen.texts[-1] == text
        else:
            assert jaccard(shingles(text), shingles(seen.texts[found])) >= threshold
        again = seen.add(text)
        assert again is not None, "a text that was seen, or a near duplicate of one"


def test_the_misses_are_as_rare_as_stated() -> None:
    seen = NearDuplicates(threshold=0.7)
    assert (seen.rows, seen.bands) == (6, 32)

    def missed(similarity: float) -> float:
        return float((1 - similarity**seen.rows) ** seen.bands)

    assert missed(0.7) == pytest.approx(0.0183, abs=1e-4)
    assert missed(0.8) < 1e-4
    assert NearDuplicates(threshold=0.5).rows < 6 < NearDuplicates(threshold=0.9).rows


def test_the_most_similar_text_is_named() -> None:
    seen = NearDuplicates(threshold=0.5)
    seen.add("the quick brown fox jumps over the lazy dog near the old river bank today")
    seen.add("wonderful clouds drift above a silent meadow while children play football")
    seen.add("the quick brown fox jumps under a busy cat near the new river bridge now")
    assert len(seen.texts) == 3
    assert seen.add("The quick brown fox jumps under a busy cat near the new river bridge!") == 2


def test_a_threshold_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold is 0, expected more than 0"):
        NearDuplicates(threshold=0)


SCRIPT = """
import random
from sstf.data.minhash import NearDuplicates
rng, seen = random.Random(5), NearDuplicates(0.6)
print([seen.add(" ".join(rng.choices(["alpha", "beta", "gamma", "delta"], k=6))) for _ in range(80)])
"""


def test_another_process_with_another_string_hash_gives_the_same() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "None" in runs[0] and "0" in runs[0]


def test_diversity_by_hand() -> None:
    # words: a b a b | a c; distinct: a b c of 6; bigrams: ab ba ab | ac: 3 different of 4
    figures = diversity(["a b a b", "a c"])
    assert (figures.texts, figures.compared) == (2, 2)
    assert figures.distinct_1 == 3 / 6
    assert figures.distinct_2 == 3 / 4
    # "abcdef" and "abcdeg" have similarity 1/3, the third text is like none
    figures = diversity(["abcdef", "abcdeg", "xyzxyz"])
    assert figures.nearest_mean == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert figures.nearest_p90 == pytest.approx(1 / 3)


def test_diversity_of_nothing_and_of_copies() -> None:
    assert diversity([]).nearest_mean == 0.0
    assert diversity(["only one text here"]).nearest_p90 == 0.0
    copies = diversity(["the same words again"] * 5)
    assert copies.nearest_mean == 1.0
    assert copies.distinct_1 == 4 / 20


def test_the_nearest_neighbour_is_the_best_over_all_pairs() -> None:
    rng = random.Random(6)
    texts = [" ".join(rng.choices(["red", "green", "blue", "yellow", "white"], k=5)) for _ in range(40)]
    best = [max(naive_jaccard(a, b) for j, b in enumerate(texts) if i != j) for i, a in enumerate(texts)]
    figures = diversity(texts)
    assert figures.nearest_mean == pytest.approx(np.mean(best))
    assert figures.nearest_p90 == pytest.approx(np.quantile(best, 0.9))


def test_words_of_several_scripts() -> None:
    assert words("Ａ-b_c 你好 カナ it's 3.5") == ["a", "b", "c", "你", "好", "カ", "ナ", "it", "s", "3", "5"]
    assert words("STRASSE straße") == ["strasse", "strasse"]
    assert words("안녕 하세요") == ["안녕", "하세요"]
