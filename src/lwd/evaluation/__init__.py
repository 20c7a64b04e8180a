"""Scores of generated images, from features of any network."""

from lwd.evaluation.distances import frechet_distance, inception_score
from lwd.evaluation.features import FeatureExtractor, FunctionExtractor, ImageFeatures, extract_features
from lwd.evaluation.images import ImageSet, open_images
from lwd.evaluation.inception import FIDInception, load_inception
from lwd.evaluation.judge import Judge, train_judge
from lwd.evaluation.judges import Judges
from lwd.evaluation.neighbours import PrecisionRecall, memorised_share, precision_recall
from lwd.evaluation.networks import NETWORKS, ClassToken, EmbeddedNetwork, feature_extractor
from lwd.evaluation.protocol import ADM, Evaluation, ProtocolSettings, score_images
from lwd.evaluation.reference import Reference, load_reference
from lwd.evaluation.small_data import evaluate_files, evaluate_images, reference_features
from lwd.evaluation.statistics import FeatureStatistics

__all__ = [
    "ADM",
    "NETWORKS",
    "ClassToken",
    "EmbeddedNetwork",
    "Evaluation",
    "FIDInception",
    "FeatureExtractor",
    "FeatureStatistics",
    "FunctionExtractor",
    "ImageFeatures",
    "ImageSet",
    "Judge",
    "Judges",
    "PrecisionRecall",
    "ProtocolSettings",
    "Reference",
    "evaluate_files",
    "evaluate_images",
    "extract_features",
    "feature_extractor",
    "frechet_distance",
    "inception_score",
    "load_inception",
    "load_reference",
    "memorised_share",
    "open_images",
    "precision_recall",
    "reference_features",
    "score_images",
    "train_judge",
]
