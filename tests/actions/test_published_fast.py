"""A published FAST tokenizer: the ids of the libraries that wrote it, any ids decoded, nothing in its folder executed."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.fft import dct

from tests import helpers
from vlaflow.actions.published_fast import PublishedFast, PublishedFastTokenizer
from vlaflow.config import from_json, to_json
from vlaflow.errors import ConfigError

transformers = pytest.importorskip("transformers")
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from tokenizers.trainers import BpeTrainer  # noqa: E402

TRAINED = helpers.chunks(200)
SCALE, LOW = 10, -120
SETTINGS = {"processor_class": "UniversalActionProcessor", "scale": SCALE, "vocab_size": 400, "min_token": LOW}
ROUNDING = 1e-5


def texts(chunks):
    return ["".join(chr(int(c) - LOW) for c in np.rint(SCALE * dct(x, axis=0, norm="ortho")).ravel()) for x in chunks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Byte-level merges over characters of two bytes and one, as the published code fits them, with code next to it."""
    out = tmp_path_factory.mktemp("fast")
    bpe = ByteLevelBPETokenizer()
    trainer = BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        initial_alphabet=[chr(i) for i in range(330)],
        show_progress=False,
        max_token_length=10000,
    )
    bpe._tokenizer.train_from_iterator(texts(TRAINED), trainer)
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    library.save_pretrained(out)
    stated = {**SETTINGS, "vocab_size": len(library), "action_dim": None, "time_horizon": None}
    (out / "processor_config.json").write_text(json.dumps(stated))
    (out / "processing_action_tokenizer.py").write_text("raise SystemExit('executed')\n")
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PublishedFast(str(folder)).fit(TRAINED)


def test_ids_are_those_of_the_library_that_wrote_it(folder, tokenizer):
    library = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for row, text in zip(tokenizer.encode(TRAINED), texts(TRAINED), strict=True):
        length = int(tokenizer.lengths(row[None])[0])
        assert row[:length].tolist() == library(text)["input_ids"]
        assert (row[length:] == tokenizer.end).all()
    assert tokenizer.slots == max(len(library(text)["input_ids"]) for text in texts(TRAINED)) + 1
    assert tokenizer.end == len(library)


def test_chunks_come_back_to_half_a_unit_per_coefficient(tokenizer):
    made = tokenizer.decode(tokenizer.encode(TRAINED))
    assert tokenizer.exact(TRAINED).all()
    assert not made.repaired_B.any()
    assert np.sqrt(np.square(made.action_BLD - TRAINED).mean(1)).max() <= tokenizer.error_bound + ROUNDING


@settings(max_examples=40)
@given(data=st.data())
def test_any_sequence_decodes_to_something_finite(tokenizer, data):
    ids = data.draw(hnp.arrays(np.int64, (1, tokenizer.slots), elements=st.integers(0, tokenizer.vocabulary - 1)))
    assert np.isfinite(tokenizer.decode(ids).action_BLD).all()


def test_ids_that_end_inside_a_coefficient_lose_that_one_and_are_counted(tokenizer):
    """'x' is a byte alone; the first of the two bytes of 'ā' is none."""
    first = tokenizer._pieces.index("ā".encode()[:1])
    whole = tokenizer._pieces.index(b"x")
    assert tokenizer.decoded([whole, first]) == tokenizer.decoded([whole]) == [ord("x")]
    assert tokenizer.decode(np.array([[whole, first, tokenizer.end]])).repaired_B[0]


def test_coefficients_below_the_first_character_are_clipped_and_said_to_be_inexact(tokenizer):
    wild = np.full((1, 6, 4), -9.0, np.float32)
    assert not tokenizer.exact(wild)[0]
    assert np.isfinite(tokenizer.decode(tokenizer.encode(wild)).action_BLD).all()


def test_a_checkpoint_holds_it_whole(tokenizer):
    again = from_json(PublishedFastTokenizer, json.loads(json.dumps(to_json(tokenizer))), "config.json")
    assert np.array_equal(again.encode(TRAINED), tokenizer.encode(TRAINED))
    assert again == tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 7}, "do not belong together"),
        ({"time_horizon": 5}, "time_horizon = 5, this policy needs 6"),
        ({"scale": None}, "no published FAST tokenizer"),
    ],
)
def test_other_settings_are_refused(folder, tmp_path, change, message):
    other = shutil.copytree(folder, tmp_path / "other")
    stated = json.loads((other / "processor_config.json").read_text()) | change
    (other / "processor_config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=message):
        PublishedFast(str(other)).fit(TRAINED)


def test_a_folder_without_merges_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(ConfigError, match="no byte-pair encoding"):
        PublishedFast(str(other)).fit(TRAINED)
    (other / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no published FAST tokenizer.*tokenizer\.json"):
        PublishedFast(str(other)).fit(TRAINED)
