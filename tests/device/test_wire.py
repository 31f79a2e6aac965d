"""Numbers survive the wire, and nothing else gets through."""

import numpy as np
import pytest
import zstandard

from mocosfl_device import wire
from mocosfl_device.codecs import NAMES, codec_of
from mocosfl_device.protocol_pb2 import ClientMessage, Goodbye, Hello, ServerMessage, Tensor
from mocosfl_device.wire import Coder, Violation, pack, pack_weights, unpack, unpack_latents, unpack_weights

FULL = Coder()


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (2, 1, 4), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_arrays_come_back_as_they_were(shape: tuple[int, ...], dtype: str) -> None:
    array = (np.random.default_rng(0).standard_normal(shape) * 100).astype(dtype)
    raw = pack(array).SerializeToString()
    back = unpack(Tensor.FromString(raw), shape, dtype, "it")
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert not back.flags.writeable


def test_arrays_in_another_order_of_bytes_or_dimensions() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(unpack(pack(array.T), (3, 2), "float32", "it"), array.T)
    assert pack(np.array([1, -2])).data == bytes([1, *7 * [0], 254, *7 * [255]])  # little-endian


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool", "complex64"])
def test_other_dtypes_do_not_travel(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"{dtype} does not travel; accepted are float32, int64"):
        pack(np.zeros(3, dtype))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Tensor(dtype="int64", shape=[2], data=bytes(16)), "it: dtype 'int64' instead of float32"),
        (Tensor(dtype="x" * 99, shape=[2], data=bytes(8)), f"it: dtype '{'x' * 20}' instead of float32"),
        (Tensor(shape=[2], data=bytes(8)), "it: dtype '' instead of float32"),
        (Tensor(dtype="float32", shape=[3], data=bytes(12)), r"it: shape \[3\] instead of \[2\]"),
        (Tensor(dtype="float32", shape=[2, 1], data=bytes(8)), r"it: shape \[2, 1\] instead of \[2\]"),
        (Tensor(dtype="float32", shape=[2**32 - 1] * 99, data=b""), "instead of"),
        (Tensor(dtype="float32", data=bytes(8)), r"it: shape \[\] instead of \[2\]"),
        (Tensor(dtype="float32", shape=[2], data=bytes(7)), "it: 7 bytes instead of 8"),
        (Tensor(dtype="float32", shape=[2], data=bytes(9)), "it: 9 bytes instead of 8"),
        (Tensor(dtype="float32", shape=[2]), "it: 0 bytes instead of 8"),
    ],
)
def test_a_tensor_that_is_not_as_expected(message: Tensor, reason: str) -> None:
    with pytest.raises(Violation, match=reason):
        unpack(message, (2,), "float32", "it")


def test_latents_up_to_the_bound_pass() -> None:
    latents = np.full((1, 2, 3), 5, np.float32)
    assert np.array_equal(unpack_latents(FULL.pack(latents), (1, 2, 3), 5.0, "latents", FULL), latents)
    latents[0, 1] = 5.01  # one image of two
    with pytest.raises(Violation, match=r"latents: the root mean square of an image's latent is 5\.01, and 5 is"):
        unpack_latents(FULL.pack(latents), (1, 2, 3), 5.0, "latents", FULL)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38, -1e30])
@pytest.mark.parametrize("place", [0, 7, 11])
@pytest.mark.parametrize("coder", [Coder("fp32"), Coder("bf16"), Coder("int8"), Coder("int4"), Coder("topk", 0.5)])
def test_numbers_that_are_not_finite_or_far_too_large(number: float, place: int, coder: Coder) -> None:
    latents = np.ones(12, np.float32)
    latents[place] = number
    with pytest.raises(Violation, match="latents: a number is not finite, or far too large"):
        unpack_latents(coder.pack(latents.reshape(2, 2, 3)), (2, 2, 3), 100.0, "latents", coder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zstd", [False, True])
def test_latents_travel_by_any_codec(name: str, zstd: bool) -> None:
    shape = (2, 3, 4, 8, 8)
    sent = np.maximum(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 0)
    codec, coder = codec_of(name, 0.2), Coder(name, 0.2, zstd)
    message = Tensor.FromString(coder.pack(sent).SerializeToString())
    expected = codec.decode(codec.encode(sent), shape)
    for other in (Coder(name, 0.2), Coder(name, 0.2, True)):  # whether it is compressed is the sender's choice
        assert np.array_equal(unpack_latents(message, shape, 100.0, "latents", other), expected)
    assert (len(message.data) < coder.size(shape)) == zstd


def test_what_cannot_be_compressed_travels_as_it_is() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(4096), np.float32).reshape(1, 1, 1024)
    assert Coder(zstd=True).pack(noise).data == noise.tobytes()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Tensor(dtype="int4", shape=[1, 1, 4], data=bytes(8)), "latents: codec 'int4' instead of int8"),
        (Tensor(dtype="float32", shape=[1, 1, 4], data=bytes(16)), "latents: codec 'float32' instead of int8"),
        (Tensor(dtype="int8", shape=[1, 4, 1], data=bytes(8)), r"latents: shape \[1, 4, 1\] instead of \[1, 1, 4\]"),
        (Tensor(dtype="int8", shape=[1, 1, 4], data=bytes(9)), "latents: 9 bytes instead of 8"),
        (Tensor(dtype="int8+zstd", shape=[1, 1, 4], data=bytes(8)), "latents: .*"),
        (
            Tensor(dtype="int8+zstd", shape=[1, 1, 4], data=zstandard.compress(bytes(2**30 // 64))),
            "latents: compressed bytes of another size than 8",
        ),
    ],
)
def test_numbers_that_are_not_what_was_agreed_on(message: Tensor, reason: str) -> None:
    with pytest.raises(Violation, match=reason):
        unpack_latents(message, (1, 1, 4), 100.0, "latents", Coder("int8"))


def test_a_frame_that_lies_about_its_size_makes_no_more_than_it_said() -> None:
    frame = bytearray(zstandard.compress(bytes(200)))
    frame[5] = 8  # the content's size, in a byte of its own
    assert zstandard.frame_content_size(bytes(frame)) == 8
    message = Tensor(dtype="int8+zstd", shape=[1, 1, 4], data=bytes(frame))
    with pytest.raises(Violation, match="latents: "):
        unpack_latents(message, (1, 1, 4), 100.0, "latents", Coder("int8"))


HALF = {"online.weight": np.ones((2, 3), np.float32), "online.batches": np.array(7)}
SPECIFICATION = {"online.weight": ((2, 3), "float32"), "online.batches": ((), "int64")}


def test_weights_come_back_as_they_were() -> None:
    message = pack_weights(HALF, number=3, restart=True)
    back = unpack_weights(message, SPECIFICATION)
    assert back.keys() == HALF.keys()
    assert all(np.array_equal(back[name], HALF[name]) for name in HALF)
    assert (message.number, message.restart) == (3, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"online.weight": None}, "1 names are missing or unknown, such as 'online.weight'"),
        ({"more": np.ones(1, np.float32)}, "1 names are missing or unknown, such as 'more'"),
        ({"y" * 99: np.ones(1, np.float32), "z": np.array(1)}, f"2 names .* such as '{'y' * 60}'"),
        ({"online.weight": np.full((2, 3), np.nan, np.float32)}, r"weights online\.weight: a number is not finite"),
        ({"online.weight": np.full((2, 3), np.inf, np.float32)}, r"weights online\.weight: a number is not finite"),
        ({"online.weight": np.ones((3, 2), np.float32)}, r"weights online\.weight: shape \[3, 2\] instead of \[2, 3\]"),
        ({"online.batches": np.float32(7)}, r"weights online\.batches: dtype 'float32' instead of int64"),
    ],
)
def test_weights_that_are_not_as_expected(changes: dict, reason: str) -> None:
    tensors = {name: np.asarray(array) for name, array in (HALF | changes).items() if array is not None}
    with pytest.raises(Violation, match=reason):
        unpack_weights(pack_weights(tensors), SPECIFICATION)


def test_messages_of_no_kind() -> None:
    for read in (wire.from_client, wire.from_server):
        with pytest.raises(Violation, match="of no known kind"):
            read(b"")
        with pytest.raises(Violation, match="4 bytes that cannot be read"):
            read(b"\xff\xff\xff\xff")
    of_tomorrow = bytes([0xFA, 0x06, 0x00])  # field 111
    with pytest.raises(Violation, match="of no known kind"):
        wire.from_client(of_tomorrow)


def test_either_side_reads_what_the_other_sends() -> None:
    goodbye = wire.goodbye(Goodbye.BUSY, "x" * 1000)
    assert len(goodbye.reason) == 500
    assert wire.from_client(ClientMessage(goodbye=goodbye).SerializeToString()).goodbye == goodbye
    hello = ServerMessage(hello=Hello(protocol=1, nonce=b"n"))
    assert wire.from_server(hello.SerializeToString()) == hello


def test_half_open_connections_are_looked_for() -> None:
    """gRPC sends no second ping while an answer is outstanding: all pings must be given up early."""
    options = dict(wire.channel_options(1000))
    assert options["grpc.max_receive_message_length"] == 1000
    for answer in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        assert options["grpc.keepalive_time_ms"] + options[answer] <= 30_000
    allowed = options["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert allowed < options["grpc.keepalive_time_ms"]  # else the pings would be taken for an attack
