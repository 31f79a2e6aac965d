"""Answers are looked at before they are used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from nodes import travelled

from mocosfl.flower.records import CODED, coded, decoded, joined, natives, understood, weights_of, who
from mocosfl.network.claims import Holding
from mocosfl_device.wire import Coder, Violation

SHAPE = (1, 3, 4, 2, 2)
PLAIN = Coder()


def latents(coder: Coder = PLAIN) -> tuple[np.ndarray, np.ndarray, ArrayRecord]:
    query, key = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    return query, key, coded(coder, query, key)


def test_latents_travel() -> None:
    query, key, record = latents()
    content = travelled(RecordDict({"latents": record}))
    found = decoded(content.array_records["latents"], SHAPE, 100.0, PLAIN)
    assert np.array_equal(found[0], query)
    assert np.array_equal(found[1], key)


@pytest.mark.parametrize("coder", [Coder("int8"), Coder("topk", 0.5, True), Coder("bf16", 0.1, True)], ids=str)
def test_latents_travel_in_fewer_bytes(coder: Coder) -> None:
    query, _, record = latents(coder)
    kept = coder.codec.decode(coder.codec.encode(query), SHAPE)
    assert np.array_equal(decoded(record, SHAPE, 100.0, coder)[0], kept)


def changed(**changes: Any) -> ArrayRecord:
    _, _, record = latents()
    facts = {name: getattr(record["query"], name) for name in ("dtype", "shape", "stype", "data")}
    record["query"] = Array(**(facts | changes))
    return record


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: changed(dtype="float32"), "codec 'float32' instead of fp32"),
    "shape": (lambda: changed(shape=(1, 3, 16)), r"shape \[1, 3, 16\] instead of"),
    "negative": (lambda: changed(shape=(-1, -3, 4, 2, 2)), "cannot be read|instead of"),
    "length": (lambda: changed(data=bytes(188)), "188 bytes instead of 192"),
    "nan": (lambda: changed(data=b"\xff" * 192), "not finite"),
    "large": (lambda: changed(data=np.full(48, 1e4, "<f4").tobytes()), r"1e\+04, and 100 is allowed"),
    "compressed": (lambda: changed(dtype="fp32+zstd", data=b"\x28\xb5\x2f\xfd\xff"), "query latents"),
    "pickled": (lambda: changed(stype="pickle"), "'pickle' instead of mocosfl.codec"),
    "missing": (lambda: ArrayRecord(), r"expected query and key, found \[\]"),
    "config": (lambda: ConfigRecord({"query": 1, "key": 2}), "cannot be read"),
    "nothing": (lambda: None, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_latents_that_are_not_used(name: str) -> None:
    make, reason = BAD[name]
    record = make()
    with pytest.raises(Violation, match=reason):
        understood(lambda: decoded(record, SHAPE, 100.0, PLAIN))


WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7)}
KNOWN = {"a": ((2, 3), "float32"), "b": ((), "int64")}


def test_weights_travel_as_flowers_own_arrays() -> None:
    record = travelled(RecordDict({"arrays": natives(WEIGHTS)})).array_records["arrays"]
    assert np.array_equal(record["a"].numpy(), WEIGHTS["a"])
    found = weights_of(record, KNOWN)
    assert all(np.array_equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def of_a(value: np.ndarray, data: bytes | None = None, **changes: Any) -> dict[str, Array]:
    array = Array(value)
    facts = {name: getattr(array, name) for name in ("dtype", "shape", "stype")} | {"data": data or array.data}
    return {"a": Array(**(facts | changes)), "b": Array(WEIGHTS["b"])}


GOOD = Array(WEIGHTS["a"]).data
POISON = GOOD.replace(b"(2, 3)", b"(2000000000, 3)")
BAD_WEIGHTS: dict[str, tuple[dict[str, Array], str]] = {
    "missing": ({"a": Array(WEIGHTS["a"])}, "1 names are missing or unknown, such as 'b'"),
    "shape": (of_a(WEIGHTS["a"].T), "of shape"),
    "dtype": (of_a(WEIGHTS["a"].astype(np.float64)), "float64 of shape"),
    "objects": (of_a(WEIGHTS["a"], GOOD.replace(b"'<f4'", b"'|O' ")), "object of shape"),
    "nan": (of_a(np.full((2, 3), np.nan, np.float32)), "not finite"),
    "short": (of_a(WEIGHTS["a"], GOOD[:-4]), "too many or too few"),
    "long": (of_a(WEIGHTS["a"], GOOD + b"more"), "too many or too few"),
    "huge": (of_a(WEIGHTS["a"], POISON), r"of shape \(2000000000, 3\)|no array of numpy's"),
    "nonsense": (of_a(WEIGHTS["a"], b"nonsense"), "no array of numpy's"),
    "stype": (of_a(WEIGHTS["a"], stype=CODED), "instead of numpy.ndarray"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_are_not_used(name: str) -> None:
    arrays, reason = BAD_WEIGHTS[name]
    with pytest.raises(Violation, match=reason):
        understood(lambda: weights_of(ArrayRecord(arrays), KNOWN))


@pytest.mark.parametrize("client", [None, 3])
def test_who_joins(client: int | None) -> None:
    holding = Holding(10, [640], [81920])
    assert who(travelled(joined(client, holding))) == (client, holding)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"images": 10.0, "sums": [1], "squares": [1]},
        {"images": 10, "sums": [1.0], "squares": [1]},
        {"images": 10, "sums": 1, "squares": 1},
        {"images": True, "sums": [1], "squares": [1]},
        {"images": 10, "sums": [1], "squares": [1], "client": "3"},
    ],
    ids=str,
)
def test_who_does_not(facts: dict) -> None:
    with pytest.raises(Violation):
        understood(lambda: who(RecordDict({"joined": ConfigRecord(facts)})))
