"""What Flower's messages hold, and the checks that an answer passes before it is used."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from mocosfl.network.claims import Holding
from mocosfl_device.protocol_pb2 import Tensor
from mocosfl_device.wire import Coder, Specification, Violation, unpack_latents

JOIN, LATENTS, LEARN = "query.join", "query.latents", "train"
"""Types of messages: say who you are; send latents; learn for a round."""

CODED = "mocosfl.codec"
"""How latents are serialised: an ``Array`` whose dtype is the codec's name and whose data are its bytes."""
NATIVE = "numpy.ndarray"
"""How Flower serialises an array of numpy's."""

T = TypeVar("T")


def coded(coder: Coder, query: NDArray[np.float32], key: NDArray[np.float32]) -> ArrayRecord:
    """Latents, (V, n, ...) float32 each, as a record."""

    def pack(latents: NDArray[np.float32]) -> Array:
        tensor = coder.pack(latents)
        return Array(tensor.dtype, tuple(tensor.shape), CODED, tensor.data)

    return ArrayRecord({"query": pack(query), "key": pack(key)})


def decoded(
    record: ArrayRecord, shape: tuple[int, ...], bound: float, coder: Coder
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Query and key latents of a record, finite and not too large.

    Args:
        record: as it was received.
        shape: (V, n, ...), as it has to be.
        bound: greatest root mean square of one image's latent.
        coder: how latents travel.

    Raises:
        Violation: they are not like that.
    """
    if record.keys() != {"query", "key"}:
        raise Violation(f"latents: expected query and key, found {sorted(record)[:4]}")
    pieces = []
    for name in ("query", "key"):
        array = record[name]
        if array.stype != CODED:
            raise Violation(f"{name} latents: serialised as {array.stype[:20]!r} instead of {CODED}")
        tensor = Tensor(dtype=array.dtype, shape=array.shape, data=array.data)
        pieces.append(unpack_latents(tensor, shape, bound, f"{name} latents", coder))
    return pieces[0], pieces[1]


def natives(arrays: Mapping[str, NDArray]) -> ArrayRecord:
    """Arrays by name as Flower's strategies know them."""
    return ArrayRecord({name: Array(np.require(array, requirements="C")) for name, array in arrays.items()})


def weights_of(record: ArrayRecord, specification: Specification) -> dict[str, NDArray]:
    """Weights by name: exactly those that are expected, and finite.

    Args:
        record: as it was received, in Flower's own serialisation.
        specification: shape and dtype of each.

    Raises:
        Violation: a name is missing or unknown, an array is not as specified, or a number is not finite.
    """
    if record.keys() != specification.keys():
        wrong = sorted(record.keys() ^ specification.keys())
        raise Violation(f"weights: {len(wrong)} names are missing or unknown, such as {wrong[0][:60]!r}")
    return {name: _native(record[name], *expected, f"weights {name}") for name, expected in specification.items()}


def _native(array: Array, shape: tuple[int, ...], dtype: str, what: str) -> NDArray:
    """What ``numpy.load`` would read, with the header looked at before memory is taken for what it says."""
    if array.stype != NATIVE:
        raise Violation(f"{what}: serialised as {array.stype[:20]!r} instead of {NATIVE}")
    stream, kind = io.BytesIO(array.data), np.dtype(dtype)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another version of the format")
        found, fortran, found_kind = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError) as error:
        raise Violation(f"{what}: no array of numpy's ({str(error)[:100]})") from error
    if found != tuple(shape) or found_kind != kind or fortran:
        raise Violation(f"{what}: {found_kind} of shape {found} instead of {dtype} of shape {tuple(shape)}")
    if len(array.data) - stream.tell() != kind.itemsize * int(np.prod(shape)):
        raise Violation(f"{what}: {len(array.data)} bytes are too many or too few")
    numbers = np.frombuffer(array.data, kind, offset=stream.tell()).reshape(shape)
    if not np.isfinite(numbers).all():
        raise Violation(f"{what}: a number is not finite")
    return numbers


def joined(client: int | None, holding: Holding) -> RecordDict:
    """What a client tells of itself; without a number the server gives it one."""
    record = ConfigRecord({"images": holding.images, "sums": list(holding.sums), "squares": list(holding.squares)})
    if client is not None:
        record["client"] = client
    return RecordDict({"joined": record})


def who(content: RecordDict) -> tuple[int | None, Holding]:
    """``joined``'s arguments.

    Raises:
        Violation: the record holds something else.
    """
    record: Any = content["joined"]
    client, images, sums, squares = (record.get(name) for name in ("client", "images", "sums", "squares"))
    if not all(type(number) is int for number in (images, *sums, *squares, 0 if client is None else client)):
        raise Violation("whole numbers are expected of a client that joins")
    return client, Holding(images, sums, squares)


def understood(read: Callable[[], T]) -> T:
    """Call something that reads an answer.

    Raises:
        Violation: the answer cannot be read.
    """
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Violation(f"an answer that cannot be read: {error!r}"[:300]) from error


def text(content: RecordDict, record: str, name: str) -> str:
    """A text of a message."""
    value: Any = content[record]
    return str(value[name])
