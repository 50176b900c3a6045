"""Text as a list of normalised words: what near duplicates and contamination are compared by.

Case, punctuation, spacing and the width of characters do not count, as in GPT-3's filters (Brown et al. 2020,
appendices A and C). Chinese and Japanese are written without spaces, so there each character is a word.
"""

from __future__ import annotations

import re
import unicodedata

# Han with its extensions, Hiragana, Katakana. Korean has spaces.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case, without punctuation.

    >>> words("Don't use  `my_list`, 你好!")
    ['don', 't', 'use', 'my', 'list', '你', '好']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
