"""What the tiny backbone reads: images of one size, the instruction, the state; answers are bytes.

The instruction is UTF-8 bytes, or the vector that a frozen sentence encoder makes of it.

Shape letters: B batch, N bytes, P prefix tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.inputs import Inputs, Processor, require_state, shown_views
from vlaflow.backbones.language import IGNORED
from vlaflow.backbones.pretrained_processor import FOLDER
from vlaflow.backbones.sentences import SentenceEncoder
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import SpecError
from vlaflow.text import shortened

PAD, END = 256, 256
"""The id after those of the 256 bytes: it pads an instruction, and ends an answer."""


class TinyProcessor(Processor):
    """See the module text.

    Args:
        cells: image tokens, by view.
        state_dim: length of the state, S.
        text_bytes: longest instruction in bytes.
        text_patch: bytes per text token.
        margin: pixels to cut off each side of the images.
        encoder: of sentences; None to read bytes.
        lengths: ascending lengths in bytes that instructions are padded to; one beyond them, and every one where there are
            none, is padded to whole text tokens.
    """

    def __init__(
        self,
        cells: Mapping[str, int],
        state_dim: int,
        *,
        text_bytes: int,
        text_patch: int,
        margin: int = 0,
        encoder: SentenceEncoder | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        self.lengths = tuple(lengths)
        self.cells, self.state_dim = dict(cells), state_dim
        self.text_bytes, self.text_patch, self.margin, self._encoder = text_bytes, text_patch, margin, encoder

    def __call__(self, observation: ObservationBatch) -> Inputs:
        """See the base class.

        Raises:
            SpecError: for an instruction that is too long or a state of another length.
        """
        require_state(observation, self.state_dim)
        images = {view: centre(observation.images[view], self.margin) for view in self.cells}
        if self._encoder is not None:
            none_B0 = torch.zeros((len(observation), 0), dtype=torch.int64)
            sentence_BE = self._encoder(observation.instructions)
            mask_BP = self._mask(torch.ones((len(observation), 1), dtype=torch.bool), observation)
            return Inputs(observation.state_BS, none_B0, mask_BP, images, sentence_BE=sentence_BE)
        byte_BN = self._bytes(observation.instructions)
        written_BT = (byte_BN < PAD).view(len(observation), -1, self.text_patch).any(-1)
        return Inputs(observation.state_BS, byte_BN, self._mask(written_BT, observation), images)

    def _mask(self, written_BT: Tensor, observation: ObservationBatch) -> Tensor | None:
        """False on text tokens that hold nothing and on views that are missing; None when there are neither."""
        shown_BV = shown_views(observation, tuple(self.cells))
        if shown_BV is None and bool(written_BT.all()):
            return None
        images_before, state_after = sum(self.cells.values()), 1
        mask_BP = functional.pad(written_BT, (images_before, state_after), value=True)
        if shown_BV is not None:
            mask_BP[:, :images_before] = shown_BV.repeat_interleave(torch.tensor(list(self.cells.values())), 1)
        return mask_BP

    def bucketed(self, lengths: Sequence[int]) -> TinyProcessor:
        """See ``Processor``; the lengths are bytes, in whole text tokens."""
        return TinyProcessor(
            self.cells,
            self.state_dim,
            text_bytes=self.text_bytes,
            text_patch=self.text_patch,
            margin=self.margin,
            encoder=self._encoder,
            lengths=sorted({min(self._whole(length), self.text_bytes) for length in lengths}),
        )

    def save(self, folder: Path) -> None:
        """The sentence encoder into ``folder/processor``."""
        if self._encoder is not None:
            self._encoder.save(folder / FOLDER)

    @property
    def end_id(self) -> int:
        """See ``Processor``."""
        return END

    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """UTF-8 bytes and the end."""
        rows = [torch.tensor([*answer.encode(), END]) for answer in answers]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def answer_texts(self, id_BT: Tensor) -> list[str]:
        """Bytes up to the end, wrong UTF-8 as the replacement character."""
        rows = ([number for number in row if number >= 0] for row in id_BT.tolist())
        return [bytes(row[: row.index(END)] if END in row else row).decode(errors="replace") for row in rows]

    def _bytes(self, instructions: Sequence[str]) -> Tensor:
        """Bytes (B, N) padded to the batch's longest sentence, in whole text tokens."""
        sentences = [sentence.encode() for sentence in instructions]
        for raw in sentences:
            if len(raw) > self.text_bytes:
                raise SpecError(
                    f"The instruction '{shortened(raw.decode())}' has {len(raw)} bytes, the policy reads at most "
                    f"{self.text_bytes}. Shorten it."
                )
        written = max(len(raw) for raw in sentences)
        length = next((length for length in self.lengths if written <= length), self._whole(written))
        byte_BN = np.full((len(sentences), length), PAD, np.int64)
        for row, raw in enumerate(sentences):
            byte_BN[row, : len(raw)] = np.frombuffer(raw, np.uint8)
        return torch.from_numpy(byte_BN)

    def _whole(self, count: int) -> int:
        """So many bytes, and those that fill up the last text token."""
        return -(-count // self.text_patch) * self.text_patch


def centre(image_BHWC: Tensor, margin: int) -> Tensor:
    """The images without ``margin`` pixels on each side, (B, H − 2 margin, W − 2 margin, C)."""
    if not margin:
        return image_BHWC
    return image_BHWC[:, margin:-margin, margin:-margin].contiguous()
