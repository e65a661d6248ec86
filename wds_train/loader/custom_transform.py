"""A person's own function in the place of our transforms: called, watched, and what it returns looked at."""

import copyreg
import io
import traceback
from collections.abc import Callable, Collection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wds_train.dataset.index import image_of
from wds_train.dataset.reader import SplitReader
from wds_train.dataset.tar import fields_of
from wds_train.errors import DataError, UsageError
from wds_train.global_rng import drawn_from, generator_states
from wds_train.images.decode import decode_whole
from wds_train.loader.decoder import NOTHING
from wds_train.loader.transform import Form, Place
from wds_train.rng import generator

Function = Callable[[Any, str, np.random.Generator], Any]
WATCHED, EVERY = 32, 32  # calls of a process: the first so many, then one in so many
SUSPICIONS = 3  # times that a generator must move: a library's own thread may draw from it, too, once
SOUGHT = 100  # samples, among which one is readable
OBJECT = Form((1,), np.dtype(object))


class Own:
    """Calls `function` with what it is to have of each sample of `split`, its key, and a generator keyed by (seed, epoch,
    position).
    """

    def __init__(self, function: Function, split: SplitReader, seed: int) -> None:
        self._function, self._split, self._seed = function, split, seed
        self._calls = 0

    def __call__(self, given: Callable[[], Any], place: Place) -> Any:
        """The result for `given()`, which is asked for anew where the call must be repeated."""
        self._calls += 1
        if self._calls > WATCHED and self._calls % EVERY:
            return self._call(given(), place)
        for _ in range(SUSPICIONS):
            before = generator_states()
            result = self._call(given(), place)
            if not (drawn := drawn_from(before)):
                return result
        raise UsageError(
            f"the transform draws from the global generator of {drawn} ({self.named(place)}), which makes a sample differ "
            "from run to run; draw from the rng that it is given, or do what draws in `with wds_train.keyed(rng):`"
        )

    def _call(self, given: Any, place: Place) -> Any:
        rng = generator(self._seed, "transform", place.epoch, place.position)
        try:
            return self._function(given, self._split.index.key_of(place.sample), rng)
        except DataError:  # the person's word for a sample that cannot be used
            raise
        except Exception as error:
            raise self._failure(error, place) from error

    def _failure(self, error: Exception, place: Place) -> UsageError:
        failure = UsageError(f"the transform failed on {self.named(place)}: {type(error).__name__}: {error}")
        if torch.utils.data.get_worker_info():  # the chain of exceptions does not reach the main process
            failure.add_note("".join(traceback.format_exception(error)).rstrip())
        return failure

    def named(self, place: Place) -> str:
        return f"{self._split.shard_of(place.sample)}, key {self._split.index.key_of(place.sample)}"


class OwnArrays:
    """A `Transform` of images, decoded whole or (not `decoded`) as bytes, into arrays that are all of one form."""

    def __init__(self, function: Function, split: SplitReader, seed: int, *, decoded: bool) -> None:
        self._own, self._split, self._decoded = Own(function, split, seed), split, decoded
        self.largest = NOTHING

    def form(self, step: int) -> Form:
        return self.largest

    def draw(self, place: Place) -> None:
        """Nothing: the function draws for itself."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        array = self._array(data, place)
        if (form := Form(array.shape, array.dtype)) != self.largest:
            raise UsageError(
                f"the transform returned {form} for {self._own.named(place)}, and {self.largest} for the first sample; all "
                "must have one shape and dtype"
            )
        out[...] = array

    def _array(self, data: memoryview, place: Place) -> NDArray[Any]:
        result = self._own(lambda: decode_whole(data) if self._decoded else bytes(data), place)
        try:
            array = np.asarray(result)
            torch.from_numpy(np.empty(0, array.dtype))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"the transform returned a {type(result).__name__} for {self._own.named(place)}, which is no array of "
                "numbers; return one of NumPy, or use SampleLoader"
            ) from error
        return array

    def measure(self) -> Form:
        """The form of the first sample that can be read: memory is laid out for it before workers fork."""
        split = self._split
        damage = DataError(f"the split {split.name!r} of {split.store.url} has no samples")
        for sample in range(min(SOUGHT, len(split))):
            record = split.record(sample)
            try:
                array = self._array(image_of(split.index, sample, record), Place(sample, (0, 0), 0, 0))
            except DataError as error:
                damage = error
            else:
                return Form(array.shape, array.dtype)
        raise DataError(
            f"none of the first {min(SOUGHT, len(split))} samples of {split.store.url} can be read; the last: {damage}"
        )


class OwnObjects:
    """A `Transform` of samples, as the bytes of their members by extension, into what `function` returns, or as they are.
    With `names`, of these members alone, all of which a sample must have.
    """

    largest = OBJECT

    def __init__(self, function: Function | None, split: SplitReader, seed: int, names: Collection[str] | None) -> None:
        self._own = Own(function, split, seed) if function else None
        self._split, self._names = split, names

    def form(self, step: int) -> Form:
        return OBJECT

    def draw(self, place: Place) -> None:
        """Nothing: the function draws for itself."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        out[0] = self._made(self._own, data, place) if self._own else self._fields(data, place)

    def _made(self, own: Own, data: memoryview, place: Place) -> Any:
        made = own(lambda: self._fields(data, place), place)
        if torch.utils.data.get_worker_info():
            try:
                _try_sending(made)
            except Exception as error:
                raise UsageError(
                    f"the transform returned a {type(made).__name__} for {own.named(place)}, which a worker cannot send "
                    f"({error}); return arrays, numbers, texts, or lists and dictionaries of them, or use workers=0"
                ) from error
        return made

    def _fields(self, data: memoryview, place: Place) -> dict[str, bytes]:
        fields = fields_of(data, self._split.index.key_of(place.sample))
        if self._names is None:
            return fields
        if lacking := [name for name in self._names if name not in fields]:
            raise DataError(f"it has no member .{lacking[0]}, only .{', .'.join(fields)}")
        return {name: fields[name] for name in self._names}


def _try_sending(made: Any) -> None:
    """Raise what the queue from a worker to its loop would meet with `made`: it drops such a thing, and the loop waits for ever."""
    attempt = ForkingPickler(io.BytesIO())
    attempt.dispatch_table = copyreg.dispatch_table  # without PyTorch's, which keeps shared memory for every tensor
    attempt.dump(made)
