"""Which texts plainly are advertisements and which plainly are not: labels to train a classifier from, nothing more.

LLaMA-MoE (section 5.1) drops the worst half of CommonCrawl and C4 by a classifier of advertisements; neither it nor its
training data was published. Ours is another one, made the way of weak supervision (Ratner et al. 2017, Snorkel,
arXiv:1711.10160): a few high-precision phrases label some texts, and a classifier that sees all words learns from those
what the rest look like. The phrases are those that offer, price and urge: calls to action and shop boilerplate as
RefinedWeb removes by line (Penedo et al. 2023, arXiv:2306.01116, appendix G.2), prices, discounts and delivery.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["label_advertisements"]

_OFFERS = re.compile(
    r"add to (?:cart|basket|bag|wishlist)|shopping cart|(?:buy|order|shop|book|call|apply|sign up) (?:now|today|online)"
    r"|free (?:shipping|delivery|quote|estimate|trial|consultation|returns)|(?:next|same)[- ]day delivery"
    r"|money[- ]back guarantee|satisfaction guaranteed|limited time|while (?:stocks|supplies) last|special offer"
    r"|best (?:price|deal)s?|great (?:price|deal)s?|low(?:est)? prices?|(?:competitive|affordable) (?:price|rate)s?"
    r"|discounts?\b|coupons?\b|promo(?:tional)? codes?|on sale\b|in stock\b|out of stock|wholesale|\d+ ?% off\b"
    r"|our (?:products|services|customers|clients|store|shop|team of experts)|contact us"
    r"|visit our (?:website|store|shop)"
    r"|years of experience|one[- ]stop|look no further|high[- ]quality (?:products|services)"
    r"|[$£€] ?\d[\d,.]*|\b\d[\d,.]* ?(?:usd|eur|gbp)\b",
    re.IGNORECASE,
)
MIN_KINDS, MIN_PER_WORD, MIN_WORDS = 2, 0.01, 30


def label_advertisements(texts: Sequence[str]) -> npt.NDArray[np.int8]:
    """[N]: 0 plainly an advertisement, 1 plainly not, -1 unsure.

    The first has two different offers or more, and one in 100 words; the second has none. Texts under 30 words are
    unsure.
    """
    labels = np.full(len(texts), -1, np.int8)
    for number, text in enumerate(texts):
        words = len(text.split())
        if words < MIN_WORDS:
            continue
        offers = [offer.lower() for offer in _OFFERS.findall(text)]
        if not offers:
            labels[number] = 1
        # Any two prices are one kind of offer.
        elif (
            len({"price" if offer[-1].isdigit() else offer for offer in offers}) >= MIN_KINDS
            and len(offers) >= MIN_PER_WORD * words
        ):
            labels[number] = 0
    return labels
