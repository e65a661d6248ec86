"""Arrow arrays and tables from NumPy's, and back, without pandas.

pyarrow imports pandas, if it is installed, in all that takes values from Python or turns them into
NumPy's: .4 s in every process.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def to_array(values: Sequence[Any] | NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Return numbers, or text in UTF-8, as an Arrow array, which is made from buffers.

    Args:
        values: The numbers or texts, none of them None.
        kind: The Arrow type, a number's or `pa.string()`.
    """
    if kind != pa.string():
        # A NumPy type, whatever its name says.
        dtype = kind.to_pandas_dtype()
        numbers = np.ascontiguousarray(values, dtype)
        return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])
    # Texts: the bytes of all, one after the other, and where each ends.
    text = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, text)])
    assert ends[-1] < 1 << 31, "what an Arrow array of strings can hold"
    parts = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(text))]
    return pa.Array.from_buffers(kind, len(text), parts)


def to_batch(columns: Iterable[Sequence[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return a record batch.

    Args:
        columns: The columns in the order of `schema`, without empty cells.
        schema: The names and types of the columns: numbers or strings.
    """
    arrays = []
    for column, field in zip(columns, schema, strict=True):
        arrays.append(to_array(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def to_numpy(numbers: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of numbers without empty cells as an array, without pandas."""
    return np.from_dlpack(numbers.combine_chunks())
