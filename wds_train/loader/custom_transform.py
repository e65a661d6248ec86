"""User-supplied transforms: call them, check that they use only `rng`, validate the result.

`ArrayTransform` is for `TrainLoader` and `EvalLoader`, `ObjectTransform` for `SampleLoader`. They
run in a loader worker, as `decoder.py` asks.
"""

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
from wds_train.loader.transform import Form, Place
from wds_train.rng import generator

Function = Callable[[Any, str, np.random.Generator], Any]
# Calls whose use of global generators is checked: a process's first, then one of every so many.
FIRST_CHECKED = 32
CHECKED_EVERY = 32
# A generator must move in so many tries: once, it may be a thread of a library that draws from it.
SUSPICIONS = 3
SEARCHED = 100  # samples, among which one must be readable
# The form of samples that are objects: they travel to the training process without a slot.
OBJECT = Form((1,), np.dtype(object))


class CustomTransform:
    """Calls the user's function with a sample, its key and a generator.

    The generator is keyed by (seed, epoch, position), so that a sample becomes the same in
    whichever process it is transformed.

    Args:
        function: The user's function.
        split: The split that the samples are of.
        seed: The seed of all generators.
    """

    def __init__(self, function: Function, split: SplitReader, seed: int) -> None:
        self._function = function
        self._split = split
        self._seed = seed
        self._calls = 0

    def __call__(self, make_input: Callable[[], Any], place: Place) -> Any:
        """Call the function for a sample, and return its result.

        Args:
            make_input: Makes the function's first argument. It is called again if the function
                must be, because the function may change its argument.
            place: The sample's place.

        Raises:
            UsageError: The function failed, or draws from a global generator.
            DataError: The function says so: the sample is unreadable.
        """
        # Comparing the generators costs more than many a transform, so that not every call is
        # checked.
        self._calls += 1
        if self._calls > FIRST_CHECKED and self._calls % CHECKED_EVERY:
            return self._call(make_input(), place)

        # The sample is made again and again, until no generator moves.
        for _ in range(SUSPICIONS):
            before = generator_states()
            result = self._call(make_input(), place)
            drawn = drawn_from(before)
            if not drawn:
                return result
        raise UsageError(
            f"the transform draws from the global generator of {drawn} ({self.describe(place)}), "
            "which makes a sample differ from run to run; draw from the rng that it is given, or "
            "do what draws in `with wds_train.keyed(rng):`"
        )

    def describe(self, place: Place) -> str:
        """Return the shard and the key of the sample at `place`, for messages."""
        key = self._split.index.key_of(place.sample)
        return f"{self._split.shard_of(place.sample)}, key {key}"

    def _call(self, given: Any, place: Place) -> Any:
        rng = generator(self._seed, "transform", place.epoch, place.position)
        try:
            return self._function(given, self._split.index.key_of(place.sample), rng)
        except DataError:  # with this, the function says that a sample is unreadable
            raise
        except Exception as error:
            raise self._failure(error, place) from error

    def _failure(self, error: Exception, place: Place) -> UsageError:
        cause = f"{type(error).__name__}: {error}"
        failure = UsageError(f"the transform failed on {self.describe(place)}: {cause}")
        if torch.utils.data.get_worker_info():
            # The chain of exceptions does not reach the main process.
            failure.add_note("".join(traceback.format_exception(error)).rstrip())
        return failure


class ArrayTransform:
    """A `Transform` that calls the user's function with an image, and expects an array.

    All arrays must have one form.

    Args:
        function: The user's function.
        split: The split that the samples are of.
        seed: The seed of the function's generators.
        decoded: Give the function pixels, uint8 [height, width, 3]; False: the encoded bytes.
        form: The form of the arrays. Default: that of the first readable sample, found now,
            because memory is laid out for it before workers fork.

    Raises:
        UsageError: The function failed, or returned no array.
        DataError: The first samples are all unreadable.
    """

    def __init__(
        self,
        function: Function,
        split: SplitReader,
        seed: int,
        *,
        decoded: bool,
        form: Form | None = None,
    ) -> None:
        self._call = CustomTransform(function, split, seed)
        self._split = split
        self._decoded = decoded
        if form is None:
            form = self._measure()
        self.largest = form

    def form(self, step: int) -> Form:
        """Return the form of all samples."""
        return self.largest

    def draw(self, place: Place) -> None:
        """Draw nothing: the function draws from its own generator."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        """Fill `out` with the array that the function makes of the encoded image `data`."""
        array = self._make_array(data, place)
        form = Form(array.shape, array.dtype)
        if form != self.largest:
            raise UsageError(
                f"the transform returned {form} for {self._call.describe(place)}, and "
                f"{self.largest} for the first sample; all must have one shape and dtype"
            )
        out[...] = array

    def _make_array(self, data: memoryview, place: Place) -> NDArray[Any]:
        def make_input() -> Any:
            if self._decoded:
                return decode_whole(data)
            return bytes(data)

        result = self._call(make_input, place)
        try:
            array = np.asarray(result)
            torch.from_numpy(np.empty(0, array.dtype))  # raises for a dtype that torch lacks
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"the transform returned a {type(result).__name__} for "
                f"{self._call.describe(place)}, which is no array of numbers; return one of NumPy, "
                "or use SampleLoader"
            ) from error
        return array

    def _measure(self) -> Form:
        """Return the form of the first sample that can be read."""
        split = self._split
        # The cause is that of the last try.
        cause = DataError(f"the split {split.name!r} of {split.store.url} has no samples")
        searched = min(SEARCHED, len(split))
        for sample in range(searched):
            record = split.record(sample)
            try:
                image = image_of(split.index, sample, record)
                array = self._make_array(image, Place(sample, (0, 0), 0, 0))
            except DataError as error:
                cause = error
            else:
                return Form(array.shape, array.dtype)
        raise DataError(
            f"none of the first {searched} samples of {split.store.url} can be read; "
            f"the last: {cause}"
        )


class ObjectTransform:
    """A `Transform` of samples as dictionaries: the bytes of their members by extension.

    Args:
        function: The user's function, which gets the dictionary. None returns it as it is.
        split: The split that the samples are of.
        seed: The seed of the function's generators.
        names: The extensions of the members that the dictionary has, and each sample must have.
            None: whatever a sample has.
    """

    largest = OBJECT

    def __init__(
        self,
        function: Function | None,
        split: SplitReader,
        seed: int,
        names: Collection[str] | None,
    ) -> None:
        self._call: CustomTransform | None = None
        if function:
            self._call = CustomTransform(function, split, seed)
        self._split = split
        self._names = names

    def form(self, step: int) -> Form:
        """Return the form of an object."""
        return OBJECT

    def draw(self, place: Place) -> None:
        """Draw nothing: the function draws from its own generator."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        """Put the object that is made of the sample's bytes `data` into `out`."""
        if self._call is None:
            out[0] = self._fields(data, place)
        else:
            out[0] = self._transform(self._call, data, place)

    def _transform(self, call: CustomTransform, data: memoryview, place: Place) -> Any:
        result = call(lambda: self._fields(data, place), place)
        # Here the message can name the sample.
        if torch.utils.data.get_worker_info():
            try:
                _try_sending(result)
            except Exception as error:
                raise UsageError(
                    f"the transform returned a {type(result).__name__} for {call.describe(place)}, "
                    f"which a worker cannot send ({error}); return arrays, numbers, texts, or "
                    "lists and dictionaries of them, or use workers=0"
                ) from error
        return result

    def _fields(self, data: memoryview, place: Place) -> dict[str, bytes]:
        fields = fields_of(data, self._split.index.key_of(place.sample))
        if self._names is None:
            return fields
        for name in self._names:
            if name not in fields:
                raise DataError(f"it has no member .{name}, only .{', .'.join(fields)}")
        return {name: fields[name] for name in self._names}


def _try_sending(result: Any) -> None:
    """Raise what the queue from a worker to the training process would meet with `result`.

    The queue drops what it cannot send, and the training process would wait for ever.
    """
    attempt = ForkingPickler(io.BytesIO())
    # Without PyTorch's reducers, which keep shared memory for every tensor.
    attempt.dispatch_table = copyreg.dispatch_table
    attempt.dump(result)
