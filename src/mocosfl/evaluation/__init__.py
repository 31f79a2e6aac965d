"""How good are the features of an encoder? kNN, linear probes, alignment and uniformity on frozen features; fine-tuning
(``mocosfl.evaluation.finetune``) where they may change."""

from mocosfl.evaluation.alignment import alignment, uniformity
from mocosfl.evaluation.features import extract
from mocosfl.evaluation.knn import knn_accuracy, knn_predict
from mocosfl.evaluation.linear_probe import ProbeResult, linear_probe
from mocosfl.evaluation.logistic_probe import LogisticResult, logistic_probe

__all__ = [
    "LogisticResult",
    "ProbeResult",
    "alignment",
    "extract",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "logistic_probe",
    "uniformity",
]
