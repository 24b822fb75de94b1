"""Statistics: all that metrics need of a set of images, from one pass, in memory that does not grow with it.

A fixed shuffle of the images' numbers decides what each is used for, so that a set in the order of its classes does no
harm: which tenth of the Inception Score it belongs to, which of the disjoint subsets that give a distance its spread,
and whether its features are kept, for KID, precision and recall, and coverage.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt.evaluation.moments import Moments, check_features
from jlt.evaluation.scores import InceptionScore

KEPT = 10_000  # as many as ADM keeps of the real ones
SUBSETS = 5
SPLITS = 10
MOMENTS = ("features", "spatial")  # views whose mean and covariance are wanted


class Statistics:
    """What has been seen of `count` images; call `update` with their views, in the order of their numbers."""

    def __init__(self, count: int, keep: int = KEPT) -> None:
        if count < 2:
            raise ValueError(f"statistics need at least 2 images, got {count}")
        if keep < 0:
            raise ValueError(f"the number of images whose features are kept must be at least 0, got {keep}")
        self.count = count
        self.seen = 0
        self.place: Int[Tensor, " n"] = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.keep = min(keep, count)
        self.score: InceptionScore | None = None
        self._parts: dict[str, list[Moments]] = {}
        self._kept: list[Tensor] = []

    def update(self, views: Mapping[str, Float[Tensor, "b _"]]) -> None:
        """Add the next images by their views; see `features.views`."""
        rows = len(views["features"])
        assert self.seen + rows <= self.count, f"{self.seen + rows} images, {self.count} were announced"
        place = self.place[self.seen : self.seen + rows]
        for name in MOMENTS:
            if name in views:
                view = views[name].detach().float().cpu()
                check_features(view, view.shape[1])
                parts = self._parts.setdefault(name, [Moments(view.shape[1]) for _ in range(SUBSETS)])
                for k, part in enumerate(parts):
                    part.update(view[place * SUBSETS // self.count == k])
        if "logits" in views:
            self.score = self.score or InceptionScore(views["logits"].shape[1], SPLITS)
            self.score.update(views["logits"], place * SPLITS // self.count)
        self._kept.append(views["features"].detach().float().cpu()[place < self.keep])
        self.seen += rows

    @property
    def kept(self) -> Float[Tensor, "k d"]:
        """The features of the images that are kept, by rising number."""
        return torch.cat(self._kept)

    @property
    def kept_numbers(self) -> list[int]:
        """The numbers of the images that are kept."""
        return [int(i) for i in torch.nonzero(self.place < self.keep)[:, 0]]

    def subsets(self, name: str = "features") -> list[Moments]:
        """Return the moments of disjoint subsets, equal in size to one image."""
        return self._parts[name]

    def moments(self, name: str = "features") -> Moments | None:
        """Return the moments of all images, or None for a view that the extractor does not give."""
        if name not in self._parts:
            return None
        total = Moments(self._parts[name][0].dimension)
        for part in self._parts[name]:
            total.merge(part)
        return total
