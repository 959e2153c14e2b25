"""FAST and bins: round trips within their bounds, the same ids always, and sequences that no chunk encodes to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.fft import dct

from tests import helpers
from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FIRST, FastFit, FastTokenizer
from vlaflow.actions.io import TokenizerFile, load_tokenizer, open_tokenizer, save_tokenizer
from vlaflow.data import stats
from vlaflow.data.lerobot import Dataset
from vlaflow.data.transforms import Normalizer
from vlaflow.data.windows import action_chunks
from vlaflow.errors import ConfigError

TRAINED = helpers.chunks(200)
FAST = FastFit(scale=10.0, vocabulary=256).fit(TRAINED)
any_chunk = hnp.arrays(np.float32, (1, 6, 4), elements=st.floats(-1, 1, width=32))
RECORDED = Path(__file__).parents[1] / "fixtures/lerobot_v3_tiny"
ROUNDING = 1e-5  # float32 actions around a float64 transform


@given(chunk=any_chunk)
def test_a_fast_round_trip_of_any_exact_chunk_keeps_its_bound(chunk):
    """Half a unit of error in each of L orthonormal coefficients is a root mean square of at most half a unit in time."""
    made = FAST.decode(FAST.encode(chunk))
    assert np.isfinite(made.action_BLD).all()
    if FAST.exact(chunk)[0]:
        error_D = np.sqrt(np.square(made.action_BLD - chunk).mean(1))[0]
        assert error_D.max() <= FAST.error_bound + ROUNDING
        assert not made.repaired_B[0]


def test_fast_is_exact_on_what_it_was_fitted_on_and_shorter_than_the_numbers():
    ids = FAST.encode(TRAINED)
    made = FAST.decode(ids)
    assert FAST.exact(TRAINED).all()
    assert not made.repaired_B.any()
    assert np.sqrt(np.square(made.action_BLD - TRAINED).mean(1)).max() <= FAST.error_bound + ROUNDING
    assert FAST.lengths(ids).mean() < 24, "fewer tokens than numbers"


@pytest.mark.parametrize("fit", [FastFit(10.0, 256), FastFit(10.0, None), BinsFit(32), BinsFit(32, "quantile")])
def test_recorded_actions_keep_the_bounds(fit):
    """Chunks of a recorded data set, normalised as a policy does, cut short at the end of the episode."""
    dataset = Dataset.open(RECORDED)
    action = Normalizer.from_stats(stats.compute(dataset)["action"], "min_max").forward(
        torch.from_numpy(action_chunks(dataset, 8, range(len(dataset.episodes))))
    )
    chunks = action.numpy()
    tokenizer = fit.fit(chunks)
    error = tokenizer.decode(tokenizer.encode(chunks)).action_BLD - chunks
    if isinstance(fit, FastFit):
        assert tokenizer.exact(chunks).all()
        assert np.sqrt(np.square(error).mean(1)).max() <= tokenizer.error_bound + ROUNDING
    else:
        assert (np.abs(error).max((0, 1)) <= np.array(tokenizer.error_bound) + ROUNDING).all()


def test_the_coefficients_are_those_of_scipy_low_frequencies_first():
    """Merges aside, the symbols of a chunk are round(scale · DCT), frequency by frequency."""
    chunk = TRAINED[:1]
    symbols = [s for i in FAST.encode(chunk)[0][: FAST.lengths(FAST.encode(chunk))[0]] for s in FAST._pieces[i]]
    expected = np.rint(10 * dct(chunk[0].astype(np.float64), axis=0, norm="ortho")).reshape(-1)
    assert (np.array(symbols) + FAST.low).tolist() == expected.tolist()


def test_ids_are_those_that_the_tokenizers_library_itself_gives():
    """The rebuilt encoder against one the library trained and never left: same strings, token by token."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    symbols = (
        np.rint(10 * dct(TRAINED.astype(np.float64), axis=1, norm="ortho")).astype(int).reshape(len(TRAINED), -1) - FAST.low
    )
    texts = ["".join(chr(FIRST + s) for s in row) for row in symbols]
    library = Tokenizer(BPE())
    alphabet = [chr(FIRST + s) for s in range(FAST.symbols)]
    library.train_from_iterator(texts, BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    ours = FAST.encode(TRAINED)
    for row, encoded in zip(ours, library.encode_batch(texts), strict=True):
        length = int(FAST.lengths(row[None])[0])
        assert ["".join(chr(FIRST + s) for s in FAST._pieces[i]) for i in row[:length]] == encoded.tokens


def test_fitting_twice_gives_the_same_tokenizer_and_ids():
    again = FastFit(scale=10.0, vocabulary=256).fit(TRAINED)
    assert again == FAST
    assert np.array_equal(again.encode(TRAINED), FAST.encode(TRAINED))


@settings(max_examples=60)
@given(ids=hnp.arrays(np.int64, (2, FAST.slots), elements=st.integers(0, FAST.vocabulary - 1)))
def test_any_sequence_decodes_to_something_finite_and_wrong_ones_are_counted(ids):
    made = FAST.decode(ids)
    assert made.action_BLD.shape == (2, 6, 4)
    assert np.isfinite(made.action_BLD).all()
    for row in range(2):
        length = sum(len(FAST._pieces[i]) for i in ids[row][: FAST.lengths(ids)[row]])
        assert made.repaired_B[row] == (length != 24)


def test_missing_coefficients_are_zero_and_those_in_excess_are_dropped():
    whole = FAST.encode(TRAINED[:1])
    short = whole.copy()
    last = int(FAST.lengths(whole)[0]) - 1
    short[0, last] = FAST.end
    lost = len(FAST._pieces[whole[0, last]])
    made = FAST.decode(short)
    spectrum = dct(made.action_BLD[0].astype(np.float64), axis=0, norm="ortho").reshape(-1)
    assert made.repaired_B[0]
    assert np.abs(spectrum[-lost:]).max() < ROUNDING
    long = whole.copy()
    long[0, last + 1 :] = 0
    assert FAST.decode(long).repaired_B[0]
    np.testing.assert_array_equal(FAST.decode(long).action_BLD, FAST.decode(whole).action_BLD)


def test_what_follows_the_end_token_is_not_read():
    whole = FAST.encode(TRAINED[:1])
    after = whole.copy()
    after[0, int(FAST.lengths(whole)[0]) + 1 :] = 3
    np.testing.assert_array_equal(FAST.decode(after).action_BLD, FAST.decode(whole).action_BLD)


def test_a_chunk_outside_the_fitted_range_is_clipped_and_said_to_be_inexact():
    wild = np.full((1, 6, 4), 9.0, np.float32)
    assert not FAST.exact(wild)[0]
    assert np.isfinite(FAST.decode(FAST.encode(wild)).action_BLD).all()


def test_a_vocabulary_too_small_for_the_coefficients_is_refused():
    with pytest.raises(ConfigError, match="Lower the scale"):
        FastFit(scale=100.0, vocabulary=50).fit(TRAINED)


def test_without_merges_every_coefficient_is_a_token_and_nothing_needs_repair():
    plain = FastFit(scale=10.0, vocabulary=None).fit(TRAINED)
    assert (plain.slots, plain.vocabulary, plain.end, plain.ordered) == (24, FAST.symbols, None, True)
    np.testing.assert_array_equal(plain.decode(plain.encode(TRAINED)).action_BLD, FAST.decode(FAST.encode(TRAINED)).action_BLD)
    ids = np.random.default_rng(0).integers(0, plain.vocabulary, (50, 24))
    assert not plain.decode(ids).repaired_B.any()
    np.testing.assert_array_equal(
        plain.encode(TRAINED)[0] + plain.low, np.rint(10 * dct(TRAINED[0], axis=0, norm="ortho")).ravel()
    )


@pytest.mark.parametrize("spacing", ["uniform", "quantile"])
@given(chunk=any_chunk)
def test_a_bins_round_trip_keeps_its_bound(spacing, chunk):
    bins = BinsFit(16, spacing).fit(TRAINED)
    low, high = (np.array([edge[side] for edge in bins.edges]) for side in (0, -1))
    inside = np.clip(chunk, low, high).astype(np.float32)
    error_D = np.abs(bins.decode(bins.encode(inside)).action_BLD - inside).max((0, 1))
    assert (error_D <= np.array(bins.error_bound) + ROUNDING).all()


def test_ids_of_bins_ascend_with_the_value_and_ids_of_centres_are_their_own():
    bins = BinsFit(16).fit(TRAINED)
    line = np.broadcast_to(np.linspace(-1, 1, 50)[:, None, None], (50, 6, 4)).astype(np.float32)
    assert (np.diff(bins.encode(line), axis=0) >= 0).all()
    ids = np.broadcast_to(np.arange(16)[:, None], (16, 24)).copy()
    np.testing.assert_array_equal(bins.encode(bins.decode(ids).action_BLD), ids)


def test_quantile_bins_hold_as_many_values_each():
    counts = np.bincount(BinsFit(8, "quantile").fit(TRAINED).encode(TRAINED).reshape(-1, 24)[:, ::4].ravel(), minlength=8)
    assert counts.max() - counts.min() <= 2


def test_quantile_bins_keep_a_value_that_most_of_the_data_has():
    """A gripper that is closed in nine of ten frames must decode to closed, not to the middle of a wide interval."""
    grip = np.where(np.random.default_rng(0).uniform(size=(300, 6, 1)) < 0.9, -1.0, 1.0).astype(np.float32)
    bins = BinsFit(8, "quantile").fit(grip)
    np.testing.assert_allclose(bins.decode(bins.encode(grip)).action_BLD, grip, atol=1e-6)


@pytest.mark.parametrize("tokenizer", [FAST, BinsFit(16).fit(TRAINED)], ids=["fast", "bins"])
def test_files_give_back_the_same_tokenizer_and_refuse_another_normalisation(tokenizer, tmp_path):
    save_tokenizer(tmp_path / "t.json", TokenizerFile(tokenizer, "quantile", "abc"))
    assert open_tokenizer(tmp_path / "t.json").tokenizer == tokenizer
    with pytest.raises(ConfigError, match="Fit it again: vlaflow data fit-tokenizer --normalisation mean_std"):
        load_tokenizer(tmp_path / "t.json", "mean_std")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_tokenizer(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="There is no tokenizer file"):
        open_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("tokenizer", [FAST, BinsFit(16).fit(TRAINED)], ids=["fast", "bins"])
def test_chunks_of_another_shape_or_with_holes_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="chunks of 6 actions of 4"):
        tokenizer.encode(np.zeros((1, 5, 4), np.float32))
    with pytest.raises(ConfigError, match="not finite"):
        tokenizer.encode(np.full((1, 6, 4), np.nan, np.float32))


def test_a_merge_that_spells_an_earlier_token_again_shares_its_id():
    """ab·c and a·bc are one string; the library gives it one id, and so do the rebuilt pieces."""
    tokenizer = FastTokenizer(1, 3, 1.0, 0, 3, ((0, 1), (1, 2), (3, 2), (0, 4)), slots=4)
    assert tokenizer.vocabulary == 3 + 3 + 1
    assert tokenizer.encode(np.array([[[0.0, 1.0, 2.0]]])).tolist() == [[5, 6, 6, 6]]
