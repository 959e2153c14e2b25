"""The latent action model: the change between two frames as K codes of a small codebook, learned from video alone.

    model = LatentActionModel.from_pretrained("runs/iflybot/latent")
    id_BK = model.codes(earlier_BHW3, later_BHW3)              # int64 in 0 … book − 1
    image_BHW3 = model.apply_codes(another_BHW3, id_BK)        # the same change, applied to another frame

iFlyBot-VLA's first stage, after LAPA. Both frames are cut into patches. Spatial blocks mix the patches of one frame, then
causal temporal blocks let the later frame see the earlier one. The difference of the two frames' features, later minus
earlier, is projected to a few dimensions, pooled to K vectors and quantised (``nsvq``). The decoder gets the patches of
the earlier frame, without a gradient, attends to the codes as additional keys and values, and predicts the later frame.
Whatever the earlier frame does not show has to pass through the codes.

``data.pairs`` provides the frame pairs, ``policies.stages`` trains the model.

Shape letters: B batch, H, W height and width of an image, P patches, C channels of the network, K codes, V entries of the
codebook, E dimension of an entry, D action dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow import __version__
from vlaflow.actions.nsvq import Codebook
from vlaflow.config import from_versioned, to_json
from vlaflow.errors import ConfigError, SpecError
from vlaflow.io import load_weights, read_json, save_tensors
from vlaflow.nn.attention import KeyValues, causal_mask
from vlaflow.nn.block import Block, BlockConfig
from vlaflow.nn.drawn import drawn
from vlaflow.nn.meta import require_fits
from vlaflow.nn.patches import PatchStem, from_patches
from vlaflow.nn.resnet import ResidualMLP
from vlaflow.outputs import write_json, write_text
from vlaflow.ranges import Width


@dataclass(frozen=True)
class LatentConfig:
    """The networks of a latent action model.

    Args:
        image_size: side of the square frames in pixels; a multiple of ``patch``.
        patch: side of a patch in pixels.
        width, heads, ffn: of all blocks.
        spatial, temporal, decoder: number of blocks within each frame, between the two frames, and in the decoder.
        grid: rows and columns to which the difference is pooled, each at most half the patches along a side (rounded up);
            their product is the number of codes, K.
        code_dim: dimension of a codebook entry, E.
        book: number of codebook entries, V.
        action_dim: dimension of the mean action between the frames, which a head also predicts from the codes; 0 for no head.
    """

    image_size: Width = 56
    patch: Width = 8
    width: Width = 96
    heads: Width = 4
    ffn: Width = 384
    spatial: int = 3
    temporal: int = 1
    decoder: int = 3
    grid: tuple[int, int] = (4, 2)
    code_dim: int = 32
    book: int = 32
    action_dim: int = 0

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.image_size // self.patch < 2:
            raise ConfigError(f"image_size {self.image_size} must be a multiple of patch {self.patch}, at least two of them.")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}.")
        if min(self.spatial, self.temporal, self.decoder, self.code_dim, *self.grid) < 1 or self.action_dim < 0:
            raise ConfigError("spatial, temporal, decoder, code_dim and both numbers of the grid must be at least 1.")
        pooled = (self.side + 1) // 2  # after the convolution of stride 2
        if max(self.grid) > pooled:
            raise ConfigError(
                f"A grid of {self.grid[0]}x{self.grid[1]} is finer than the {pooled}x{pooled} positions that are pooled, so "
                "codes would be copies of each other. Use smaller patches or a smaller grid."
            )
        if not 2 <= self.book < 2**15:
            raise ConfigError(f"The codebook must have 2 to 32767 entries, got {self.book}.")

    @property
    def codes(self) -> int:
        """Number of codes of a frame pair, K."""
        return self.grid[0] * self.grid[1]

    @property
    def side(self) -> int:
        """Number of patches along a side of a frame."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class Origin:
    """The training data of a latent action model; its codes are meaningful for similar frame pairs.

    Args:
        dataset: fingerprint of the data set.
        view: the camera view.
        rate_hz: frames per second of the data set.
        gap_s: configured time between the frames of a pair in seconds.
        gap: the same in frames.
        held_out, seed: share of the episodes that was held out from training, and the seed of that split.
        others: fingerprints of further data sets.
        hold_out_tasks: instructions whose episodes were held out in place of that share.
    """

    dataset: str
    view: str
    rate_hz: float
    gap_s: float
    gap: int
    held_out: float = 0.0
    seed: int = 0
    others: tuple[str, ...] = ()
    hold_out_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class LatentFile:
    """The content of a checkpoint's config.json."""

    model: LatentConfig
    origin: Origin
    vlaflow: str = __version__


@dataclass(frozen=True)
class LatentOutput:
    """The output of a forward pass over frame pairs.

    Args:
        later_BHW3: the predicted later frame, float in about [−1, 1].
        id_BK: ids of the codes.
        action_BD: predicted normalised mean action between the frames; None without an action head.
    """

    later_BHW3: Tensor
    id_BK: Tensor
    action_BD: Tensor | None


class Encoder(nn.Module):
    """Encodes a frame pair as K vectors."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = c = config
        self.place = drawn(c.side**2, c.width)
        self.time = drawn(2, c.width)
        self.spatial = nn.ModuleList(Block(_block(c)) for _ in range(c.spatial))
        self.temporal = nn.ModuleList(Block(_block(c)) for _ in range(c.temporal))
        self.norm = nn.LayerNorm(c.width)
        self.project = nn.Linear(c.width, c.code_dim)
        self.pool = nn.Conv2d(c.code_dim, c.code_dim, 3, stride=2, padding=1)

    def features(self, earlier_BPC: Tensor, later_BPC: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both frames from embedded patches (B, P, C); those of the earlier do not depend on the later frame."""
        b, c = len(earlier_BPC), self.config
        x_BPC = torch.cat((earlier_BPC, later_BPC)) + self.place
        for block in self.spatial:
            x_BPC, _ = block(x_BPC)
        x_B2C = x_BPC.view(2, b * c.side**2, c.width).transpose(0, 1) + self.time
        for block in self.temporal:
            x_B2C, _ = block(x_B2C, mask_TS=causal_mask(2, x_B2C.device))
        earlier_BPC, later_BPC = self.norm(x_B2C).view(b, c.side**2, 2, c.width).unbind(2)
        return earlier_BPC, later_BPC

    def forward(self, earlier_BPC: Tensor, later_BPC: Tensor) -> Tensor:
        """Embedded patches of both frames → (B, K, E), before quantisation."""
        c = self.config
        earlier_BPC, later_BPC = self.features(earlier_BPC, later_BPC)
        change_BPE = self.project(later_BPC - earlier_BPC)
        pooled = self.pool(change_BPE.mT.unflatten(2, (c.side, c.side)))
        return functional.adaptive_avg_pool2d(pooled, c.grid).flatten(2).mT


class ImageDecoder(nn.Module):
    """Predicts the later frame from the patches of the earlier frame and K codes."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = c = config
        self.place = drawn(c.side**2, c.width)
        self.slot = drawn(c.codes, c.width)
        self.enter = nn.Linear(c.code_dim, c.width)
        self.norm_code = nn.LayerNorm(c.width)
        self.read = nn.ModuleList(nn.Linear(c.width, 2 * c.width) for _ in range(c.decoder))
        self.blocks = nn.ModuleList(Block(_block(c)) for _ in range(c.decoder))
        self.norm = nn.LayerNorm(c.width)
        self.leave = nn.Linear(c.width, 3 * c.patch**2)

    def forward(self, patch_BPC: Tensor, code_BKE: Tensor) -> Tensor:
        """(B, P, C) without a gradient and (B, K, E) → (B, H, W, 3)."""
        c, b = self.config, len(code_BKE)
        code_BKC = self.norm_code(self.enter(code_BKE) + self.slot)
        x_BPC = patch_BPC + self.place
        for read, block in zip(self.read, self.blocks, strict=True):
            # to (B, keys and values, heads, K, head dimension)
            both = read(code_BKC).view(b, c.codes, 2, c.heads, c.width // c.heads).permute(0, 2, 3, 1, 4)
            x_BPC, _ = block(x_BPC, KeyValues(both[:, 0], both[:, 1]))
        return from_patches(self.leave(self.norm(x_BPC)), c.patch, c.image_size)


class LatentActionModel(nn.Module):
    """Encoder, codebook and decoder; see the module docstring.

    Attributes:
        config, origin: the arguments.
        book: the codebook.
    """

    def __init__(self, config: LatentConfig, origin: Origin) -> None:
        super().__init__()
        self.config, self.origin = config, origin
        self.patches = PatchStem(config.patch, config.width)
        self.encoder = Encoder(config)
        self.book = Codebook(config.book, config.code_dim)
        self.decoder = ImageDecoder(config)
        self.act: ResidualMLP | None = None
        if config.action_dim:
            self.act = ResidualMLP(config.codes * config.code_dim, config.width, config.action_dim)

    @staticmethod
    def create(config: LatentConfig, origin: Origin, seed: int) -> LatentActionModel:
        """A new model with weights drawn from ``seed``; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LatentActionModel(config, origin)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.patches.project.weight.device

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """The noise of the quantisation of so many pairs, (B, K, E)."""
        return torch.randn((batch, self.config.codes, self.config.code_dim), generator=generator)

    def forward(self, earlier_BHW3: Tensor, later_BHW3: Tensor, noise_BKE: Tensor | None = None) -> LatentOutput:
        """Encode, quantise, decode.

        Args:
            earlier_BHW3, later_BHW3: uint8 frames of the model's size.
            noise_BKE: as ``draw`` draws it; needed in training.
        """
        earlier_BHW3, later_BHW3 = self._prepare(earlier_BHW3), self._prepare(later_BHW3)
        earlier_BPC, later_BPC = self.patches(earlier_BHW3), self.patches(later_BHW3)
        value_BKE, id_BK = self.book(self.encoder(earlier_BPC, later_BPC), noise_BKE)
        action_BD = None if self.act is None else self.act(value_BKE.flatten(1))
        return LatentOutput(self.decoder(earlier_BPC.detach(), value_BKE), id_BK, action_BD)

    @torch.no_grad()
    def vectors(self, earlier_BHW3: Tensor, later_BHW3: Tensor) -> Tensor:
        """The vectors before quantisation, float32 (B, K, E), of uint8 frames of the model's size."""
        earlier_BHW3, later_BHW3 = self._prepare(earlier_BHW3), self._prepare(later_BHW3)
        return self.encoder(self.patches(earlier_BHW3), self.patches(later_BHW3))

    @torch.no_grad()
    def codes(self, earlier_BHW3: Tensor, later_BHW3: Tensor) -> Tensor:
        """The latent action of frame pairs.

        Args:
            earlier_BHW3, later_BHW3: uint8 frames of the model's size, ``origin.gap_s`` apart.

        Returns:
            Ids, int64 (B, K), each in [0, book), on the model's device.
        """
        return self.book.nearest(self.vectors(earlier_BHW3, later_BHW3))

    @torch.no_grad()
    def apply_codes(self, earlier_BHW3: Tensor, id_BK: Tensor) -> Tensor:
        """Apply a latent action to a frame.

        Args:
            earlier_BHW3: uint8 frames of the model's size.
            id_BK: int64, each in [0, book).

        Returns:
            uint8 (B, H, W, 3).
        """
        patch_BPC = self.patches(self._prepare(earlier_BHW3))
        later_BHW3 = self.decoder(patch_BPC, self.book.entry_VE[id_BK.to(self.device)])
        return ((later_BHW3.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _prepare(self, image_BHW3: Tensor) -> Tensor:
        size = self.config.image_size
        if image_BHW3.shape[1:] != (size, size, 3):
            found = "x".join(map(str, image_BHW3.shape[1:3]))
            raise SpecError(
                f"The latent action model needs frames of {size}x{size} pixels, got {found}; use data.frames.resize."
            )
        return image_BHW3.to(self.device).float() / 127.5 - 1

    # -- files -------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """16 hex digits of config, origin and weights: two models with the same fingerprint give the same codes."""
        return latent_fingerprint(self.config, self.origin, self.state_dict())

    def save_pretrained(self, folder: Path | str, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``.

        Args:
            folder: folder of the checkpoint.
            weights: tensors to save instead of the model's own with the same names, e.g. averaged ones.
            card: content of README.md.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", to_json(LatentFile(self.config, self.origin)))
        write_text(folder / "README.md", card or f"# Latent action model, vlaflow {__version__}\n")
        save_tensors(folder / "model.safetensors", weights or {}, like=self.state_dict())

    @staticmethod
    def from_pretrained(folder: Path | str, device: str = "cpu") -> LatentActionModel:
        """Open what ``save_pretrained`` wrote, ready for inference.

        Raises:
            CheckpointError: for missing or damaged files, or weights that do not fit the config.
            ConfigError: config.json describes something else, such as a policy.
        """
        folder = Path(folder)
        found = from_versioned(LatentFile, read_json(folder / "config.json"), str(folder / "config.json"))
        weights = folder / "model.safetensors"
        require_fits(lambda: LatentActionModel.create(found.model, found.origin, 0), weights)
        model = LatentActionModel.create(found.model, found.origin, 0)
        load_weights(model, weights)
        return model.to(device).eval()


def latent_fingerprint(config: LatentConfig, origin: Origin, weights: Mapping[str, Tensor]) -> str:
    """See ``LatentActionModel.fingerprint``."""
    digest = hashlib.sha256(json.dumps(to_json(LatentFile(config, origin, ""))).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _block(config: LatentConfig) -> BlockConfig:
    return BlockConfig(config.width, config.heads, config.heads, config.width // config.heads, config.ffn)
