import math

import pytest
import torch

from mocosfl.evaluation import knn_accuracy, knn_predict


def naive_predict(bank, labels, queries, k, temperature, classes):
    """One query and one neighbour at a time, in double precision."""
    predictions = []
    for query in queries.double():
        similarity = [(float(query @ key) / float(query.norm() * key.norm()), i) for i, key in enumerate(bank.double())]
        votes = [0.0] * classes
        for s, i in sorted(similarity, reverse=True)[:k]:
            votes[int(labels[i])] += math.exp(s / temperature)
        predictions.append(votes.index(max(votes)))
    return torch.tensor(predictions)


@pytest.mark.parametrize(
    ("bank_size", "queries_size", "dimensions", "classes", "k", "temperature", "chunk"),
    [
        (50, 20, 8, 4, 5, 0.1, 7),  # a chunk that does not divide the queries
        (50, 20, 8, 4, 50, 0.1, 20),  # k is the bank
        (13, 20, 8, 4, 200, 0.5, 6),  # k exceeds the bank
        (50, 20, 8, 1, 5, 0.1, 100),  # one class, a chunk larger than the queries
        (1, 3, 2, 3, 1, 0.1, 1),
        (60, 1, 1, 10, 60, 1.0, None),  # one query, one dimension
        (60, 30, 16, 10, 20, 0.07, None),
    ],
)
def test_equals_the_naive_loop(bank_size, queries_size, dimensions, classes, k, temperature, chunk):
    generator = torch.Generator().manual_seed(bank_size + k)
    bank = torch.randn(bank_size, dimensions, generator=generator) * 3
    queries = torch.randn(queries_size, dimensions, generator=generator) * 0.1
    labels = torch.randint(classes, (bank_size,), generator=generator)
    expected = naive_predict(bank, labels, queries, k, temperature, classes)
    assert torch.equal(knn_predict(bank, labels, queries, k, temperature, classes, chunk), expected)
    truth = torch.randint(classes, (queries_size,), generator=generator)
    accuracy = knn_accuracy(bank, labels, queries, truth, k, temperature, classes, chunk)
    assert accuracy == pytest.approx(100 * float((expected == truth).double().mean()))


def test_the_result_does_not_depend_on_the_chunk():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 8, generator=generator), torch.randn(11, 8, generator=generator)
    labels = torch.arange(40) % 3
    first, *others = [knn_predict(bank, labels, queries, k=9, chunk=chunk) for chunk in (None, 1, 4, 11, 500)]
    assert all(torch.equal(first, other) for other in others)


def test_perfect_separation_is_100_percent():
    centres = torch.eye(5)
    labels = torch.arange(100) % 5
    noise = 0.05 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    features = centres[labels] + noise
    assert knn_accuracy(features[:80], labels[:80], features[80:], labels[80:], k=200) == 100
    assert knn_accuracy(features[:80], labels[:80], features[80:], (labels[80:] + 1) % 5, k=200) == 0


def test_a_near_neighbour_outweighs_two_far_ones_only_at_low_temperature():
    # Similarity to the query: 1 for class 1, 0.8 twice for class 0. exp(1/T) = 2 exp(0.8/T) at T = 0.2 / ln 2
    bank = torch.tensor([[5.0, 0.0], [0.8, 0.6], [8.0, -6.0]])
    labels = torch.tensor([1, 0, 0])
    query = torch.tensor([[0.5, 0.0]])
    even = 0.2 / math.log(2)
    assert knn_predict(bank, labels, query, k=3, temperature=0.9 * even).tolist() == [1]
    assert knn_predict(bank, labels, query, k=3, temperature=1.1 * even).tolist() == [0]
    assert knn_predict(bank, labels, query, k=1, temperature=1.1 * even).tolist() == [1]


def test_a_very_low_temperature_does_not_overflow():
    bank = torch.eye(3)
    query = torch.tensor([[0.1, 0.2, 0.9]])
    assert knn_predict(bank, torch.tensor([0, 1, 2]), query, temperature=1e-4).tolist() == [2]


def test_takes_half_precision_and_small_label_types():
    bank, labels = torch.eye(4).bfloat16(), torch.arange(4, dtype=torch.uint8)
    prediction = knn_predict(bank, labels, bank, k=1)
    assert prediction.dtype == torch.int64
    assert prediction.tolist() == [0, 1, 2, 3]


def test_a_class_that_the_bank_lacks_is_an_error_of_the_prediction():
    bank = torch.eye(2)
    assert knn_accuracy(bank, torch.tensor([0, 1]), bank, torch.tensor([0, 7])) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bank": torch.zeros(0, 3), "bank_labels": torch.zeros(0, dtype=torch.long)},
            r"bank of shape \(0, 3\)",
        ),
        ({"bank_labels": torch.zeros(3, dtype=torch.long)}, "bank labels"),
        ({"bank_labels": torch.zeros(4)}, "bank labels"),
        (
            {"queries": torch.zeros(0, 3), "query_labels": torch.zeros(0, dtype=torch.long)},
            r"queries of shape \(0, 3\)",
        ),
        ({"queries": torch.zeros(2, 5)}, r"queries of shape \(2, 5\): expected \(Q, 3\)"),
        ({"query_labels": torch.zeros(1, dtype=torch.long)}, "queries labels"),
        ({"k": 0}, "k=0"),
        ({"classes": 0}, "classes=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_rejects(change, message):
    arguments = {
        "bank": torch.ones(4, 3),
        "bank_labels": torch.zeros(4, dtype=torch.long),
        "queries": torch.ones(2, 3),
        "query_labels": torch.zeros(2, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})
