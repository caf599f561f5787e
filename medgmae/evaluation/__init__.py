"""How good results are: of features and classifiers, of segmentations, and of reconstructed intensities."""

from medgmae.evaluation.arguments import Values
from medgmae.evaluation.classification import (
    FoldMetrics,
    Metrics,
    Probe,
    classification_metrics,
    cross_validate_features,
    fold_metrics,
    knn_metrics,
    knn_shares,
)
from medgmae.evaluation.curves import Curves, classification_curves
from medgmae.evaluation.folds import check_folds, even_folds, stratified_folds
from medgmae.evaluation.intervals import Interval, bootstrap_interval
from medgmae.evaluation.probes import Probed, probe_features
from medgmae.evaluation.reports import (
    FoldReport,
    MultilabelReport,
    classification_report,
    fold_report,
    multilabel_report,
    regression_report,
)
from medgmae.evaluation.segmentation import SegmentationMetrics, mean_metrics, region_masks, segmentation_metrics
from medgmae.evaluation.survival import concordance_index, survival_report
from medgmae.losses import psnr, ssim3d

__all__ = [
    "Curves",
    "FoldMetrics",
    "FoldReport",
    "Interval",
    "Metrics",
    "MultilabelReport",
    "Probe",
    "Probed",
    "SegmentationMetrics",
    "Values",
    "bootstrap_interval",
    "check_folds",
    "classification_curves",
    "classification_metrics",
    "classification_report",
    "concordance_index",
    "cross_validate_features",
    "even_folds",
    "fold_metrics",
    "fold_report",
    "knn_metrics",
    "knn_shares",
    "mean_metrics",
    "multilabel_report",
    "probe_features",
    "psnr",
    "region_masks",
    "regression_report",
    "segmentation_metrics",
    "ssim3d",
    "stratified_folds",
    "survival_report",
]
