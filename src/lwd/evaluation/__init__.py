"""Scores of generated images, from features of any network."""

from lwd.evaluation.distances import frechet_distance, inception_score
from lwd.evaluation.judge import Judge, train_judge
from lwd.evaluation.neighbours import PrecisionRecall, precision_recall
from lwd.evaluation.small_data import evaluate_files, evaluate_images, reference_features
from lwd.evaluation.statistics import FeatureStatistics

__all__ = [
    "FeatureStatistics",
    "Judge",
    "PrecisionRecall",
    "evaluate_files",
    "evaluate_images",
    "frechet_distance",
    "inception_score",
    "precision_recall",
    "reference_features",
    "train_judge",
]
