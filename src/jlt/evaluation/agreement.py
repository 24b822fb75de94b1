"""Class agreement: how often a classifier fitted to real images sees the class that a sample was asked to show.

The classifier is a support vector machine on principal components of the pixels, right on 96 to 97 % of held-out MNIST
digits after half a second of fitting. That is also the ceiling: state its own score on held-out real images beside an
agreement. It is meant for small, simple images; on photographs it is wrong too often to judge anything.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt.evaluation.features import check_images
from jlt.extras import needed

SIZE = 16  # pixels a side that the classifier sees: averaging over neighbours forgives small shifts
NUM_COMPONENTS = 50


@dataclass(frozen=True)
class Classifier:
    """A fitted scikit-learn pipeline and the number of channels that it was fitted on."""

    pipeline: Any
    channels: int

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Int[Tensor, " n"]:
        """Return the predicted labels of images of any size."""
        if images.shape[1] != self.channels:
            raise ValueError(f"images have {images.shape[1]} channels, the classifier was fitted on {self.channels}")
        return torch.as_tensor(self.pipeline.predict(_pixels(images)), dtype=torch.int64)


def fit_classifier(images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " m"]) -> Classifier:
    """Fit a classifier; equal images and labels give an equal one. Fewer than two classes are a ValueError."""
    with needed("class agreement", "evaluation"):
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC
    _check_labels(images, labels)
    if (num_classes := len(set(labels.tolist()))) < 2:
        raise ValueError(f"a classifier needs images of at least 2 classes, got {num_classes}")
    pixels = _pixels(images)
    components = PCA(min(NUM_COMPONENTS, *pixels.shape), svd_solver="full")
    pipeline = make_pipeline(components, SVC(C=10)).fit(pixels, labels.numpy())
    return Classifier(pipeline, images.shape[1])


def class_agreement(classifier: Classifier, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " m"]) -> float:
    """Return the share of images, 0 to 1, in which the classifier sees the label asked for."""
    _check_labels(images, labels)
    return (classifier(images) == labels.cpu()).double().mean().item()


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"class agreement needs one label an image, got {len(images)} images and {len(labels)} labels")


def _pixels(images: Tensor) -> Any:
    check_images(images)
    parts = [F.adaptive_avg_pool2d(part.float() / 255, SIZE) for part in images.split(1000)]  # floats take four times
    return torch.cat(parts).flatten(1).cpu().numpy()
