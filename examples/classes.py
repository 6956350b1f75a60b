"""Groups that are given, not scored: 2 for digits, 1 for words with a capital, 0 for all else.

    python train.py --grouper examples/classes.py:classes

Integers are the groups themselves, so --eta is not used.
"""

import numpy as np


def classes(corpus, seed):
    chars = np.frombuffer(corpus.text.encode("utf-32-le"), np.uint32)  # (characters,) code points
    space = np.isin(chars, [0, 9, 10, 13, 32])
    begins = np.append(True, space[:-1])  # after white space
    word = np.maximum.accumulate(np.where(begins, np.arange(len(chars)), 0))  # where the word of each character begins
    last = np.maximum(corpus.spans[:, 1] - 1, 0)  # (tokens,) a token's last character; the first may be a space
    digit = (chars[last] >= ord("0")) & (chars[last] <= ord("9"))
    capital = (chars[word[last]] >= ord("A")) & (chars[word[last]] <= ord("Z"))
    seen = (corpus.spans[:, 1] > corpus.spans[:, 0]) & ~space[last]  # an end token has no characters
    return np.select([seen & digit, seen & capital], [2, 1], 0)
