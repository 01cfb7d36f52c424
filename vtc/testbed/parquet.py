"""Questions with their pictures as parquet, as `datasets` reads them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vtc.errors import VtcError


def parquet_bytes(
    columns: Mapping[str, Sequence[Any]], features_of: Callable[[Any], Mapping[str, Any]]
) -> bytes:
    """A parquet file whose schema says which column is a picture.

    Args:
        columns: values by name; a picture is a dict of its bytes and its path.
        features_of: of the module `datasets`, what each column holds, in the order of the columns.

    Raises:
        VtcError: the `eval` extra is not installed.
    """
    try:
        import datasets
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise VtcError(
            f"{error.name} is not installed, expected the eval extra; "
            f"pip install 'visual-token-compression[eval]'"
        ) from None
    schema = datasets.Features(features_of(datasets)).arrow_schema
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pydict(columns, schema), buffer)
    return buffer.getvalue()
