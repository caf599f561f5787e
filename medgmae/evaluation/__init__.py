"""How good results are: of features and classifiers, of segmentations, and of reconstructed intensities."""

from medgmae.evaluation.classification import (
    FoldMetrics,
    Metrics,
    Probe,
    Values,
    classification_metrics,
    cross_validate_features,
    fold_metrics,
    knn_metrics,
    knn_shares,
    stratified_folds,
)
from medgmae.evaluation.segmentation import SegmentationMetrics, mean_metrics, region_masks, segmentation_metrics
from medgmae.losses import psnr, ssim3d

__all__ = [
    "FoldMetrics",
    "Metrics",
    "Probe",
    "SegmentationMetrics",
    "Values",
    "classification_metrics",
    "cross_validate_features",
    "fold_metrics",
    "knn_metrics",
    "knn_shares",
    "mean_metrics",
    "psnr",
    "region_masks",
    "segmentation_metrics",
    "ssim3d",
    "stratified_folds",
]
