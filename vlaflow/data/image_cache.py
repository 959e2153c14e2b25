"""The images of a VQA data set, decoded once, and batches of its questions.

    cache = ImageCache.open(questions, size=96)
    source = VqaSource(questions, cache, views=("image",), state_dim=4, indices=train)
    batch = source.batch(np.array([0, 5, 9]))

A question's images fill the policy's views in order; the remaining views are black. A question has no proprioceptive state:
every dimension of it is unknown. Building the cache decodes every image, so a damaged one is reported before training
begins. ``mixture.Order`` decides the order of the samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vlaflow.data.batch import ObservationBatch, VqaBatch
from vlaflow.data.blocks import BlockStore, Frame, cut
from vlaflow.data.frames import LAYOUT, RAW, building, cache_home, writing
from vlaflow.data.resize import resize
from vlaflow.data.vqa import Question, VqaDataset
from vlaflow.errors import ConfigError, DataError, SpecError

VIEW = "image"


class ImageCache:
    """All images of a VQA data set as squares of one size, by path.

    Attributes:
        size: side in pixels; images that are not square are padded with black bars (``resize.resize``).
    """

    def __init__(self, store: BlockStore, images: Sequence[str], size: int) -> None:
        self.size, self._store = size, store
        self._row = {image: row for row, image in enumerate(images)}

    @staticmethod
    def open(questions: VqaDataset, size: int, progress: Callable[[int, int], None] | None = None) -> ImageCache:
        """Open the cache of this data set, and build what is missing of it first.

        Args:
            questions: the VQA data set.
            size: side in pixels.
            progress: called with (images done, total images) while building.

        Raises:
            DataError: an image that cannot be decoded, no space left, or no permission to write the cache.
        """
        images, nbytes = questions.images, size * size * 3
        key = hashlib.blake2b(json.dumps([LAYOUT, questions.fingerprint, size]).encode(), digest_size=8).hexdigest()
        slices = cut([nbytes] * len(images))
        folder, about = cache_home(questions.root) / f"images-{key}", {"data": questions.fingerprint}
        store = BlockStore(folder, [*(s.start for s in slices), len(images)], [VIEW], about)

        def frames(rows: slice) -> Iterator[Frame]:
            for row in range(rows.start, rows.stop):
                yield 0, row - rows.start, RAW.encode(resize(decode(questions.root / images[row]), size))
                if progress:
                    progress(row + 1, len(images))

        if store.missing():
            with building(questions.root, folder), writing(questions.root, folder, len(images) * nbytes):
                for number in store.missing():
                    store.write(number, frames(slices[number]))
        return ImageCache(store, images, size)

    def read(self, image: str) -> np.ndarray:
        """The cached image, uint8 (size, size, 3); a view, not a copy.

        Raises:
            DataError: its block is damaged.
        """
        (content,) = self._store.read(VIEW, np.array([self._row[image]]))
        return content.reshape(self.size, self.size, 3)


def decode(file: Path) -> np.ndarray:
    """Decode a PNG, JPEG, ... to uint8 (H, W, 3), rotated by its EXIF data, with transparency on black.

    Raises:
        DataError: the image cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"The image {file} cannot be decoded ({error}). Replace it, or remove its questions.") from error


def require_shown(question: Question, questions: VqaDataset, views: Sequence[str]) -> None:
    """Refuse a question with more images than the policy has views.

    Raises:
        SpecError: naming both numbers.
    """
    if len(question.images) > len(views):
        raise SpecError(
            f"Question '{question.name}' of {questions.file} has {len(question.images)} images, but the policy has "
            f"{len(views)} view(s). Remove it, or use a policy with more views."
        )


class VqaSource:
    """Questions of a VQA data set as training or evaluation samples.

    Args:
        questions: the VQA data set.
        image_cache: the cache of its images.
        views: views of the policy, in order.
        state_dim: length of the policy's state, S.
        indices: which questions; all by default.

    Raises:
        SpecError: a question has more images than the policy has views.
        ConfigError: no question was chosen.
    """

    def __init__(
        self,
        questions: VqaDataset,
        image_cache: ImageCache,
        views: Sequence[str],
        state_dim: int,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.questions, self.image_cache, self.views, self.state_dim = questions, image_cache, tuple(views), state_dim
        self.indices = np.array(range(len(questions)) if indices is None else indices, np.int64)
        if not len(self.indices):
            raise ConfigError(f"No question of {questions.file} was chosen. Give at least one.")
        for index in self.indices:
            require_shown(questions.questions[index], questions, self.views)

    def __len__(self) -> int:
        """Number of samples, M."""
        return len(self.indices)

    def batch(self, indices: np.ndarray) -> VqaBatch:
        """The samples at ``indices`` (B,), each in 0 .. M-1."""
        chosen = [self.questions.questions[self.indices[i]] for i in indices]
        side = self.image_cache.size
        images = {view: np.zeros((len(chosen), side, side, 3), np.uint8) for view in self.views}
        for row, question in enumerate(chosen):
            for view, image in zip(self.views, question.images, strict=False):
                images[view][row] = self.image_cache.read(image)
        shape = (len(chosen), self.state_dim)
        observation = ObservationBatch(
            {view: torch.from_numpy(image) for view, image in images.items()},
            torch.zeros(shape),
            [question.question for question in chosen],
            known_BS=torch.zeros(shape, dtype=torch.bool),
        )
        return VqaBatch(observation, [q.answer for q in chosen], [q.name for q in chosen])
