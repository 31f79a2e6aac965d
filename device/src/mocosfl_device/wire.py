"""Numbers on the wire, and the checks that every message passes before it is used. Needs numpy, not torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from mocosfl_device.codecs import Codec, codec_of
from mocosfl_device.protocol_pb2 import ClientMessage, Goodbye, ServerMessage, Tensor, Weights

PROTOCOL = 2
"""Version of the protocol. Peers of another version are refused."""

METHOD = "/mocosfl.v1.Federation/Session"

SLACK = 64 * 2**10
"""Bytes of a message that are not numbers of latents, gradients or weights, at most."""

ZSTD, ZSTD_LEVEL = "+zstd", 9
"""What a compressed codec's name ends in; effort of the compression."""
MOST_WINDOW = 8 * 2**20
"""Bytes of memory that a compressed message may ask for."""

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}

_NAMES = {kind: name for name, kind in DTYPES.items()}

Specification = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of every tensor by name."""


class Violation(Exception):
    """A peer broke a rule of the protocol; the message says which."""


def pack(array: NDArray) -> Tensor:
    """Weights as a message.

    Args:
        array: float32 or int64, of any shape.

    Raises:
        TypeError: another dtype.
    """
    name = _NAMES.get(array.dtype)
    if name is None:
        raise TypeError(f"{array.dtype} does not travel; accepted are {', '.join(DTYPES)}")
    return Tensor(dtype=name, shape=array.shape, data=array.tobytes())


def unpack(message: Tensor, shape: Sequence[int], dtype: str, what: str) -> NDArray:
    """A message as an array of the shape and dtype that are expected.

    Args:
        message: as it was received.
        shape, dtype: as it has to be.
        what: names it in the error.

    Returns:
        A read-only array over the message's bytes.

    Raises:
        Violation: shape, dtype or length is another.
    """
    kind = DTYPES[dtype]
    if message.dtype != dtype:
        raise Violation(f"{what}: dtype {message.dtype[:20]!r} instead of {dtype}")
    if list(message.shape) != list(shape):
        raise Violation(f"{what}: shape {list(message.shape)[:8]} instead of {list(shape)}")
    expected = math.prod(shape) * kind.itemsize
    if len(message.data) != expected:
        raise Violation(f"{what}: {len(message.data)} bytes instead of {expected}")
    return np.frombuffer(message.data, kind).reshape(shape)


@dataclass(frozen=True)
class Coder:
    """How latents or gradients travel.

    Attributes:
        name: of the codec.
        share: of the numbers that ``topk`` keeps.
        zstd: whether the bytes are compressed too, without loss. Both kinds are understood in any case.
    """

    name: str = "fp32"
    share: float = 0.1
    zstd: bool = False

    @cached_property
    def codec(self) -> Codec:
        """What loses something, if anything does."""
        return codec_of(self.name, self.share)

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of numbers of this shape, before they are compressed."""
        return self.codec.size(shape)

    def pack(self, array: NDArray[np.float32]) -> Tensor:
        """Numbers of images, (V, B, ...) float32, as a message."""
        message = Tensor()
        self.pack_into(message, array)
        return message

    def pack_into(self, message: Tensor, array: NDArray[np.float32]) -> None:
        """Put numbers of images, (V, B, ...) float32, into an empty message that is there: one copy fewer than to put a
        message into another."""
        data = self.codec.encode(array)
        message.dtype, message.data = self.name, data
        message.shape.extend(array.shape)
        if self.zstd and len(packed := zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)) < len(data):
            message.dtype, message.data = self.name + ZSTD, packed

    def unpack(self, message: Tensor, shape: Sequence[int], what: str) -> NDArray[np.float32]:
        """Numbers of images, (V, B, ...) float32, read-only or not.

        Args:
            message: as it was received.
            shape: as it has to be.
            what: names it in the error.

        Raises:
            Violation: codec, shape or length is another, or the bytes do not describe such numbers.
        """
        data = message.data
        if message.dtype not in (self.name, self.name + ZSTD):
            raise Violation(f"{what}: codec {message.dtype[:20]!r} instead of {self.name}")
        if list(message.shape) != list(shape):
            raise Violation(f"{what}: shape {list(message.shape)[:8]} instead of {list(shape)}")
        try:
            if message.dtype != self.name:
                data = _decompressed(data, self.size(shape))
            return self.codec.decode(data, shape)
        except (ValueError, zstandard.ZstdError) as error:
            raise Violation(f"{what}: {error}") from error


def _decompressed(data: bytes, size: int) -> bytes:
    """Undo the compression; never makes more than ``size`` bytes of it."""
    if zstandard.frame_content_size(data) != size:  # -1 if it does not say
        raise ValueError(f"compressed bytes of another size than {size}")
    return zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompress(data, max_output_size=size)


def unpack_latents(message: Tensor, shape: Sequence[int], bound: float, what: str, coder: Coder) -> NDArray[np.float32]:
    """Latents of some images, finite and not too large.

    Args:
        message: as it was received.
        shape: (V, B, ...).
        coder: how they travel.
        bound: greatest root mean square of one image's latent.
        what: names it in the error.

    Returns:
        float32 of that shape, not to be written to.

    Raises:
        Violation: as ``Coder.unpack``; or a number is not finite, or the latents of an image exceed the bound.
    """
    array = coder.unpack(message, shape, what)
    rows = array.reshape(shape[0] * shape[1], -1)
    squares = np.einsum("ij,ij->i", rows, rows).tolist()  # a number that is not finite, or overflows, shows in its sum
    most = bound**2 * rows.shape[1]
    if not all(square <= most for square in squares):  # also if one is not a number
        if not all(map(math.isfinite, squares)):
            raise Violation(f"{what}: a number is not finite, or far too large")
        largest = math.sqrt(max(squares) / rows.shape[1])
        raise Violation(f"{what}: the root mean square of an image's latent is {largest:.3g}, and {bound:g} is allowed")
    return array


def pack_weights(tensors: Mapping[str, NDArray], number: int = 0, restart: bool = False) -> Weights:
    """Weights by name as a message."""
    return Weights(number=number, tensors={name: pack(array) for name, array in tensors.items()}, restart=restart)


def unpack_weights(message: Weights, specification: Specification) -> dict[str, NDArray]:
    """Weights by name, finite, and exactly those that are expected.

    Raises:
        Violation: names are missing or unknown, a tensor is not as specified, or a number is not finite.
    """
    if message.tensors.keys() != specification.keys():
        wrong = sorted(message.tensors.keys() ^ specification.keys())
        raise Violation(f"weights: {len(wrong)} names are missing or unknown, such as {wrong[0][:60]!r}")
    arrays = {}
    for name, (shape, dtype) in specification.items():
        arrays[name] = unpack(message.tensors[name], shape, dtype, f"weights {name}")
        if not np.isfinite(arrays[name]).all():
            raise Violation(f"weights {name}: a number is not finite")
    return arrays


def weights_of(names: frozenset[str], known: Specification) -> Specification:
    """What weights of these names have to be: all that a client knows, but the momentum half may be missing.

    Raises:
        Violation: a name is missing or unknown.
    """
    needed = {name for name in known if not name.startswith("momentum.")}
    if not needed <= names <= known.keys():
        wrong = sorted((needed - names) | (names - known.keys()))
        raise Violation(f"weights: names are missing or unknown, such as {wrong[0][:60]!r}")
    return {name: known[name] for name in names}


def fingerprint(description: Mapping[str, Any], weights: Mapping[str, NDArray]) -> str:
    """What the server gets to see of an image from a frozen half, as a SHA-256: who has checked one half can tell it
    from every other.

    Args:
        description: ready for JSON: the size of the images, the augmentation, the half's layers, and the defence and
            codec after them.
        weights: by name, as the server hands them out, mean and std of the normalisation included.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, array in sorted(weights.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def from_client(raw: bytes) -> ClientMessage:
    """Read what a client sent.

    Raises:
        Violation: it is none of the protocol's messages.
    """
    try:
        message = ClientMessage.FromString(raw)
    except DecodeError as error:
        raise Violation(f"a message of {len(raw)} bytes that cannot be read") from error
    if message.WhichOneof("kind") is None:
        raise Violation("a message of no known kind")
    return message


def from_server(raw: bytes) -> ServerMessage:
    """Read what the server sent.

    Raises:
        Violation: it is none of the protocol's messages.
    """
    try:
        message = ServerMessage.FromString(raw)
    except DecodeError as error:
        raise Violation(f"the server sent {len(raw)} bytes that cannot be read") from error
    if message.WhichOneof("kind") is None:
        raise Violation("the server sent a message of no known kind")
    return message


def goodbye(code: Goodbye.Code, reason: str) -> Goodbye:
    """A goodbye; long reasons are cut."""
    return Goodbye(code=code, reason=reason[:500])


def channel_options(largest: int) -> list[tuple[str, int]]:
    """Options of both ends of a connection.

    Args:
        largest: bytes of the largest message that may be received.

    Returns:
        For gRPC. A peer that does not answer a ping within 10 s is gone: without that a half-open connection would
        stay until the system's own time-out, hours later.
    """
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", -1),
        ("grpc.per_message_decompression", 0),  # the limit counts compressed bytes: a small message could be made huge
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # of pings that measure the bandwidth: they hold back the others
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class Refused(Exception):
    """A peer is not let in, or is sent away.

    Attributes:
        goodbye: what it is told.
    """

    def __init__(self, code: Goodbye.Code, reason: str) -> None:
        super().__init__(reason)
        self.goodbye = goodbye(code, reason)


def describe(error: Exception) -> str:
    """What went wrong with a connection, in a few words."""
    details = error.details() if hasattr(error, "details") else str(error)
    code = error.code().name if hasattr(error, "code") else type(error).__name__
    return f"{code}: {details}"
