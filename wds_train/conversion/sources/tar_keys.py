"""Find where the key ends in the names of a source's tars, which may have several dots.

By webdataset's rule it ends at the first dot: cat.0.jpg and cat.1.jpg are the members 0.jpg and
1.jpg of one sample `cat`. In the tars of many people they are two samples. The reading is chosen
that gives each image its own label.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from wds_train.conversion.sources.tar_samples import (
    BESIDE_CAPTIONS,
    Split,
    WdsSample,
    gather,
    is_field,
)
from wds_train.dataset.tar import FIELD_WORDS, Member, key_and_extension, key_and_last_extension
from wds_train.errors import DataError

# The dot at which a key ends.
FIRST = key_and_extension
LAST = key_and_last_extension
# Instead of the kinds of labels, where samples need neither image nor label.
ANYTHING: tuple[str, ...] = ()
NEARLY = 0.9  # of the samples
NO_FIELD = re.compile(r"[^\w.-]")  # the name of no field has such letters


class Keys:
    """Chooses how the names in the tars of a source are split: one way for all of them."""

    def __init__(self) -> None:
        self._decided: dict[Split, str] = {}  # the first tar that can only be read by this split
        self._example = ("", "")  # a name whose dots may belong to it, and its key
        self._samples = {FIRST: 0, LAST: 0}  # of the tars that have such names

    def choose(
        self, tar: str, members: Sequence[Member], kinds: Collection[str] = BESIDE_CAPTIONS
    ) -> Split:
        """Return how the names of the next tar are split.

        Args:
            tar: Its name, for messages.
            members: Its members.
            kinds: Of the members that may hold a label; `ANYTHING` for none.

        Raises:
            DataError: An earlier tar can only be read the other way.
        """
        # Without dots in names both rules give the same keys.
        dotted = [member.name for member in members if LAST(member.name) != FIRST(member.name)]
        if not dotted:
            return FIRST
        rule = _by_labels(members, kinds) if kinds else _by_extensions(members, dotted)
        if rule is None:  # it holds no sample either way
            return FIRST

        # All tars must agree: one sample's key must not depend on its tar.
        self._decided.setdefault(rule, tar)
        if len(self._decided) > 1:
            raise DataError(
                f"the names in {self._decided[LAST]} are samples only where their keys end before "
                f"the last extension, those in {self._decided[FIRST]} only where they end at the "
                "first dot; make a dataset of each: they cannot be one"
            )

        # Words that name fields in these tars alone do not belong to the key.
        split = rule
        if rule is LAST:
            own = _own_fields(gather(members, LAST), kinds)
            split = partial(LAST, fields=FIELD_WORDS | own)
            self._remember(members, kinds, split, dotted)
        elif not kinds and not all(is_field(FIRST(name)[1]) for name in dotted):
            self._remember(members, kinds, LAST, dotted)
        return split

    def _remember(
        self, members: Sequence[Member], kinds: Collection[str], split: Split, dotted: Sequence[str]
    ) -> None:
        """Keep the facts for `remark` about a tar whose names `split` may split."""
        # The first such name stands for all in the remark.
        if not self._example[0]:
            example = dotted[0]
            for name in dotted:
                if split(name) != FIRST(name):
                    example = name
                    break
            self._example = (example, split(example)[0])
        for sample in gather(members, split):
            if sample.images() or not kinds:
                self._samples[LAST] += 1
        self._samples[FIRST] += _stock_samples(members)

    def remark(self) -> str:
        """Return a sentence about the keys; empty if no name has dots that may belong to it."""
        name, key = self._example
        if not name:
            return ""
        first = f"{self._samples[FIRST]:,}"
        last = f"{self._samples[LAST]:,}"
        if LAST in self._decided:
            return (
                f"its names have dots: {key!r} is the key of {name!r}, which makes {last} samples; "
                "stock webdataset, whose keys end at the first dot, "
                f"would see {first} in these {last}"
            )
        return (
            f"its names have dots: {FIRST(name)[0]!r} is the key of {name!r}, as in stock "
            f"webdataset, which makes {first} samples; "
            f"were the dots part of the names, it would be {last}"
        )


def _by_labels(members: Sequence[Member], kinds: Collection[str]) -> Split | None:
    """Return the split that leaves fewer images and labels single.

    It is None where neither gives any image its label.
    """
    stock_pairs, stock_single = _pairs(gather(members, FIRST), kinds)
    pairs, single = _pairs(gather(members, LAST), kinds)
    # Neither rule finds a pair: samples may have one label and several images.
    if not pairs and not stock_pairs:
        labelled = _with_one_label(members, LAST, kinds)
        if labelled and labelled >= _with_one_label(members, FIRST, kinds):
            return LAST
        return None
    # Where both fit, image and label have the same text between their dots: a.1.jpg, a.1.cls.
    if pairs and single <= stock_single:
        return LAST
    return FIRST


def _pairs(samples: Iterable[WdsSample], kinds: Collection[str]) -> tuple[int, int]:
    """Count the samples with one image and one label, and the images or labels in others."""
    pairs = 0
    single = 0
    for sample in samples:
        images = len(sample.images())
        labels = 0
        for kind in kinds:
            labels = len(sample.labels(kind))
            if labels:
                break
        if images == labels == 1:
            pairs += 1
        else:
            single += images or labels
    return pairs, single


def _with_one_label(members: Sequence[Member], split: Split, kinds: Collection[str]) -> int:
    """Count the samples with one label, and any number of images: a.1.png, a.1.jpg, a.1.cls."""
    count = 0
    for sample in gather(members, split):
        labels = 0
        for kind in kinds:
            labels += len(sample.labels(kind))
        if sample.images() and labels == 1:
            count += 1
    return count


def _own_fields(samples: Sequence[WdsSample], kinds: Collection[str]) -> set[str]:
    """Return words that name fields in these tars alone.

    Such as `edges`, where cat.0 has an image and a label, and cat.0.edges has no label.
    """
    labelled = set()
    for sample in samples:
        if sample.has_label(kinds):
            labelled.add(sample.key)
    # `edges` of cat.0.edges, if cat.0 has a label.
    words: set[str] = set()
    of_samples: set[str] = set()  # words of names that have their own label
    for sample in samples:
        parent, _, word = sample.key.rpartition(".")
        if parent in labelled and is_field(word):
            words.add(word.lower())
            if sample.key in labelled:
                of_samples.add(word.lower())
    return words - of_samples


def _by_extensions(members: Sequence[Member], dotted: Sequence[str]) -> Split:
    """Return the split of samples that may hold anything.

    Keys end before the last extension where that makes samples of several members that are alike,
    or where one of the `dotted` names has letters that no field's name has.
    """
    # a.b c.jpg: no field is called `b c`, so the key is `a.b c`.
    if any(NO_FIELD.search(FIRST(name)[1]) for name in dotted):
        return LAST
    samples = gather(members, LAST)
    extensions: Counter[str] = Counter()
    for sample in samples:
        extensions.update(list(sample.members))
    frequent = extensions.most_common(1)[0][0]
    alike = 0
    for sample in samples:
        alike += frequent in sample.members and len(sample.members) > 1
    if alike >= NEARLY * len(samples):
        return LAST
    return FIRST


def _stock_samples(members: Sequence[Member]) -> int:
    """Count the samples that webdataset makes: neighbours with equal names up to the first dot."""
    count = 0
    before = ""
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, _ = base.partition(".")
        if not stem or not dot:  # which it passes over
            continue
        count += f"{folder}/{stem}" != before
        before = f"{folder}/{stem}"
    return count
