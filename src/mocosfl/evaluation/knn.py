"""Weighted k-nearest-neighbour classification of features (Wu et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mocosfl.evaluation.features import check_labelled

CHUNK_NUMBERS = 2**26
"""Most numbers in the largest tensor of one chunk of queries: 256 MiB of float32."""


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    classes: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Let the k nearest features of a bank vote on the class of each query.

    Nearness is the cosine similarity s, and a neighbour's vote weighs exp(s / T): Wu, Xiong, Yu, Lin,
    *Unsupervised feature learning via non-parametric instance discrimination*, CVPR 2018, section 3.4.

    Args:
        bank: features of known class. Shape (M, D), floating point; normalised here.
        bank_labels: their classes, from 0 to classes - 1. Shape (M,), integer.
        queries: features to classify. Shape (Q, D), floating point; normalised here.
        k: neighbours that vote; the whole bank where it is smaller.
        temperature: T. The smaller, the more the nearest neighbours outweigh the others.
        classes: number of classes. Unset: the greatest label of the bank + 1, which makes the host wait for
            the device.
        chunk: queries classified at once. Unset: as many as keep the largest tensor of the computation at
            256 MiB.

    Returns:
        Classes. Shape (Q,), int64, on the device of the bank, where all tensors have to be. If classes is
        set, the host does not wait for them.

    Raises:
        ValueError: bank or queries are empty, shapes do not agree, or a number is out of its range.
    """
    check_labelled("bank", bank, bank_labels)
    if queries.ndim != 2 or not len(queries) or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries of shape {tuple(queries.shape)}: expected (Q, {bank.shape[1]}) with Q at least 1")
    for name, value in (("k", k), ("classes", classes), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")

    k = min(k, len(bank))
    classes = classes or int(bank_labels.max()) + 1
    chunk = chunk or max(1, CHUNK_NUMBERS // max(len(bank), k * classes))
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    every_class = torch.arange(classes, device=bank.device)
    predictions = []
    for part in torch.split(queries, chunk):
        similarity, neighbours = (part @ bank.T).topk(k, dim=1)  # (q, k)
        # softmax is exp(s / T) over a sum that all votes of a query share; unlike exp, it cannot overflow.
        weight = (similarity / temperature).softmax(dim=1)
        # Not scatter_add: a GPU adds in no fixed order there, and near-ties would change from run to run.
        votes_for = bank_labels[neighbours].unsqueeze(2) == every_class  # (q, k, classes)
        predictions.append(torch.where(votes_for, weight.unsqueeze(2), 0).sum(dim=1).argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    classes: int | None = None,
    chunk: int | None = None,
) -> float:
    """Share of the queries that the weighted kNN classifies correctly.

    Args:
        bank: see ``knn_predict``, as for the other arguments.
        bank_labels: shape (M,), integer.
        queries: shape (Q, D), floating point.
        query_labels: the queries' classes. Shape (Q,), integer. One that the bank lacks counts as an error.
        k: neighbours that vote.
        temperature: T of the votes' weights.
        classes: number of classes. If set, the host waits for the device once, for the result.
        chunk: queries classified at once.

    Returns:
        Accuracy in percent.

    Raises:
        ValueError: as ``knn_predict``, or queries and their labels differ in number.
    """
    check_labelled("queries", queries, query_labels)
    predictions = knn_predict(bank, bank_labels, queries, k, temperature, classes, chunk)
    return 100 * (predictions == query_labels).sum().item() / len(queries)
