"""Keys with dots: where the key ends in the names of a source's tars.

By webdataset's rule it ends at the first dot: cat.0.jpg and cat.1.jpg are the members 0.jpg and 1.jpg of one sample `cat`.
In the tars of many people they are two samples. What is meant follows from which of the two readings gives each image a
label of its own.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from wds_train.conversion.sources.tar_samples import BESIDE_CAPTIONS, Split, WdsSample, gather, is_field
from wds_train.dataset.tar import FIELD_WORDS, Member, key_and_extension, key_and_last_extension
from wds_train.errors import DataError

FIRST, LAST = key_and_extension, key_and_last_extension  # the dot at which a key ends
ANYTHING: tuple[str, ...] = ()  # instead of the kinds of labels, where samples need neither image nor label
NEARLY = 0.9  # of the samples
NO_FIELD = re.compile(r"[^\w.-]")  # no field of a sample is called so


class Keys:
    """How the names in the tars of a source are split: one way for all of them."""

    def __init__(self) -> None:
        self._decided: dict[Split, str] = {}  # by the split, the first tar that can only be read so
        self._example = ("", "")  # a name whose dots may belong to it, and its key
        self._samples = {FIRST: 0, LAST: 0}  # of the tars that have such names

    def choose(self, tar: str, members: Sequence[Member], kinds: Collection[str] = BESIDE_CAPTIONS) -> Split:
        """How the `members` of the next tar are split.

        Args:
            tar: Its name, for messages.
            kinds: Of the members that may hold a label; `ANYTHING` for none.

        Raises:
            DataError: an earlier tar can only be read the other way.
        """
        dotted = [member.name for member in members if LAST(member.name) != FIRST(member.name)]
        if not dotted:
            return FIRST
        rule = _by_labels(members, kinds) if kinds else _by_extensions(members, dotted)
        if rule is None:  # it holds no sample either way
            return FIRST
        self._decided.setdefault(rule, tar)
        if len(self._decided) > 1:
            raise DataError(
                f"the names in {self._decided[LAST]} are samples only where their keys end before the last extension, those "
                f"in {self._decided[FIRST]} only where they end at the first dot; make a dataset of each: they cannot be one"
            )
        split = rule
        if rule is LAST:
            split = partial(LAST, fields=FIELD_WORDS | _own_fields(gather(members, LAST), kinds))
            self._remember(members, kinds, split, dotted)
        elif not kinds and not all(is_field(FIRST(name)[1]) for name in dotted):
            self._remember(members, kinds, LAST, dotted)
        return split

    def _remember(self, members: Sequence[Member], kinds: Collection[str], split: Split, dotted: Sequence[str]) -> None:
        """Keep what `told` says of a tar whose names may be split before the last extension by `split`."""
        if not self._example[0]:
            example = next((name for name in dotted if split(name) != FIRST(name)), dotted[0])
            self._example = (example, split(example)[0])
        samples = gather(members, split)
        self._samples[LAST] += sum(bool(sample.images()) for sample in samples) if kinds else len(samples)
        self._samples[FIRST] += _stock_samples(members)

    def told(self) -> str:
        """What there is to say of the keys: nothing where no name has dots that may belong to it."""
        name, key = self._example
        if not name:
            return ""
        first, last = (f"{self._samples[split]:,}" for split in (FIRST, LAST))
        if LAST in self._decided:
            return (
                f"its names have dots: {key!r} is the key of {name!r}, which makes {last} samples; "
                f"stock webdataset, whose keys end at the first dot, would see {first} in these {last}"
            )
        return (
            f"its names have dots: {FIRST(name)[0]!r} is the key of {name!r}, as in stock webdataset, which "
            f"makes {first} samples; were the dots part of the names, it would be {last}"
        )


def _by_labels(members: Sequence[Member], kinds: Collection[str]) -> Split | None:
    """The split that leaves fewer images and labels without each other; None where neither gives any image its label."""
    stock_pairs, stock_lost = _pairs(gather(members, FIRST), kinds)
    pairs, lost = _pairs(gather(members, LAST), kinds)
    if not pairs and not stock_pairs:
        labelled = _with_one_label(members, LAST, kinds)
        return LAST if labelled and labelled >= _with_one_label(members, FIRST, kinds) else None
    # Where both fit, the image and the label share what lies between their dots: a.1.jpg, a.1.cls.
    return LAST if pairs and lost <= stock_lost else FIRST


def _pairs(samples: Iterable[WdsSample], kinds: Collection[str]) -> tuple[int, int]:
    """How many of `samples` have one image and one label, and how many images or labels are in others."""
    pairs = lost = 0
    for sample in samples:
        images = len(sample.images())
        labels = next((len(found) for kind in kinds if (found := sample.labels(kind))), 0)
        if images == labels == 1:
            pairs += 1
        else:
            lost += images or labels
    return pairs, lost


def _with_one_label(members: Sequence[Member], split: Split, kinds: Collection[str]) -> int:
    """How many samples have one label, and images of which nothing says which one is meant: a.1.png, a.1.jpg, a.1.cls."""
    samples = [sample for sample in gather(members, split) if sample.images()]
    return sum(sum(len(sample.labels(kind)) for kind in kinds) == 1 for sample in samples)


def _own_fields(samples: Sequence[WdsSample], kinds: Collection[str]) -> set[str]:
    """The words that name fields in these tars alone: `edges`, where cat.0 has an image and a label, and cat.0.edges none."""
    labelled = {sample.key for sample in samples if any(sample.labels(kind) for kind in kinds)}
    words = {True: set[str](), False: set[str]()}  # by whether such a name has a label of its own
    for sample in samples:
        parent, _, word = sample.key.rpartition(".")
        if parent in labelled and is_field(word):
            words[sample.key in labelled].add(word.lower())
    return words[False] - words[True]


def _by_extensions(members: Sequence[Member], dotted: Sequence[str]) -> Split:
    """The split of samples that may hold anything: before the last extension where that makes samples of several members
    that are alike, or where one of the `dotted` names holds what no field's name does.
    """
    if any(NO_FIELD.search(FIRST(name)[1]) for name in dotted):
        return LAST
    samples = [{*sample.members} for sample in gather(members, LAST)]
    frequent = Counter(name for names in samples for name in names).most_common(1)[0][0]
    alike = sum(frequent in names and len(names) > 1 for names in samples)
    return LAST if alike >= NEARLY * len(samples) else FIRST


def _stock_samples(members: Sequence[Member]) -> int:
    """How many samples webdataset makes of `members`: of those in a row whose names are equal up to the first dot."""
    count, before = 0, ""
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, _ = base.partition(".")
        if not stem or not dot:  # which it passes over
            continue
        count += f"{folder}/{stem}" != before
        before = f"{folder}/{stem}"
    return count
