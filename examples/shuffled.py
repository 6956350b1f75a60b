"""The control: TF-IDF's scores dealt out anew among the supervised tokens of each sample.

    python train.py --grouper examples/shuffled.py:shuffled

The groups have TF-IDF's sizes, sample by sample, and no information. What trains as well with them owes nothing to
which tokens TF-IDF picks.
"""

import numpy as np

from groupers import tfidf


def shuffled(corpus, seed):
    scores, at = tfidf(corpus), np.flatnonzero(corpus.loss_mask)  # (tokens,), (supervised,)
    sample = corpus.doc_ids[at]
    dealt = np.lexsort((np.random.default_rng(seed).random(len(at)), sample))  # by sample, then at random
    scores[at] = scores[at[dealt]]
    return scores
