"""How good are the features of an encoder? Weighted kNN and a linear probe, both on frozen features."""

from mocosfl.evaluation.features import extract
from mocosfl.evaluation.knn import knn_accuracy, knn_predict
from mocosfl.evaluation.linear_probe import ProbeResult, linear_probe

__all__ = ["ProbeResult", "extract", "knn_accuracy", "knn_predict", "linear_probe"]
