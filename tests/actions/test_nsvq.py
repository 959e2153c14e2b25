"""Noise substitution in closed form, and the care of unused entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlaflow.actions.nsvq import Codebook, Replacement, perplexity
from vlaflow.errors import ConfigError

ROUNDING = 1e-5  # of float32 norms of a few dozen numbers


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def book(seed=0, entries=16, dim=8):
    made = Codebook(entries, dim)
    made.entry_VE.data = drawn(seed, entries, dim)
    return made


@given(seed=st.integers(0, 1000), dim=st.integers(1, 40))
def test_in_training_the_error_is_as_long_as_that_of_the_nearest_entry(seed, dim):
    """|v − x| = |x − c*|, whatever the direction of the noise."""
    made, x_BKE = book(seed, dim=dim), drawn(seed + 1, 3, 4, dim)
    value_BKE, id_BK = made(x_BKE, drawn(seed + 2, *x_BKE.shape))
    wanted = (x_BKE - made.entry_VE[id_BK]).norm(dim=-1)
    assert torch.allclose((value_BKE - x_BKE).norm(dim=-1), wanted, rtol=ROUNDING * dim, atol=ROUNDING)
    assert torch.equal(wanted, (x_BKE[:, :, None] - made.entry_VE).norm(dim=-1).amin(-1)) or torch.allclose(
        wanted, (x_BKE[:, :, None] - made.entry_VE).norm(dim=-1).amin(-1), rtol=ROUNDING
    )


def test_outside_training_the_output_is_the_entry_itself_and_needs_no_noise():
    made, x_BKE = book().eval(), drawn(1, 3, 4, 8)
    value_BKE, id_BK = made(x_BKE)
    assert torch.equal(value_BKE, made.entry_VE[id_BK])
    assert torch.equal(id_BK, made.nearest(x_BKE))


def test_the_gradient_of_an_entry_goes_through_the_length_of_the_error_and_nowhere_else():
    """v = x + |x − c| u, so dL/dc = −(dL/dv · u) (x − c)/|x − c|; entries that are nearest to nothing get 0."""
    made, x_BKE = book(), drawn(1, 1, 1, 8)
    value_BKE, id_BK = made(x_BKE, drawn(3, *x_BKE.shape))
    pull = drawn(2, 8)
    (value_BKE[0, 0] @ pull).backward()
    away = x_BKE[0, 0] - made.entry_VE[id_BK[0, 0]].detach()
    unit = (value_BKE.detach()[0, 0] - x_BKE[0, 0]) / away.norm()
    wanted = torch.zeros(16, 8)
    wanted[id_BK[0, 0]] = -(pull @ unit) * away / away.norm()
    assert torch.allclose(made.entry_VE.grad, wanted, atol=ROUNDING)
    assert wanted.abs().sum() > 0.1


def test_a_vector_on_an_entry_gives_a_finite_gradient():
    made = book()
    x_BKE = made.entry_VE.detach()[None, :4].clone().requires_grad_()
    value_BKE, _ = made(x_BKE, drawn(3, *x_BKE.shape))
    value_BKE.sum().backward()
    assert made.entry_VE.grad.isfinite().all()
    assert torch.equal(x_BKE.grad, torch.ones_like(x_BKE))


def test_training_without_noise_is_refused():
    with pytest.raises(ConfigError, match="needs noise"):
        book()(drawn(0, 1, 1, 8))


def near(made, ids):
    """Vectors that fall on these entries."""
    return made.entry_VE.detach()[torch.tensor(ids)][:, None]


def learn(made, ids):
    """One training pass of these entries."""
    x_BKE = near(made, ids)
    made(x_BKE, drawn(0, *x_BKE.shape))


def replaced(made, ids, rule, step=9, steps=100, seed=0):
    learn(made, ids)
    return made.replace_unused(rule, step, steps, torch.Generator().manual_seed(seed))


RULE = Replacement(every=10, until=0.7, threshold=0.1, noise=0.02)


def test_unused_entries_move_next_to_used_ones_and_used_ones_stay():
    made = book()
    before = made.entry_VE.detach().clone()
    assert replaced(made, [2, 5, 5, 7], RULE) == 13
    used = [2, 5, 7]
    assert torch.equal(made.entry_VE[used], before[used])
    distance = torch.cdist(made.entry_VE, before[used])
    moved = [v for v in range(16) if v not in used]
    length = before[used].norm(dim=-1)
    assert (distance[moved].amin(-1) < 4 * RULE.noise * length.max()).all()
    assert (distance[moved].amin(-1) > 0).all()
    assert made.used_V.sum() == 0


@pytest.mark.parametrize("copies", [1, 1000])
def test_what_counts_as_unused_depends_on_shares_and_not_on_how_many_codes_were_seen(copies):
    """Of 64 codes an entry with 1 has a quarter of its fair share 1/16, which is above a tenth and below a half."""
    ids = ([0] * 63 + [3]) * copies
    for threshold, moved in ((0.1, 14), (0.5, 15)):
        assert replaced(book(), ids, Replacement(10, 0.7, threshold, 0.02)) == moved


@pytest.mark.parametrize(
    ("step", "due"), [(8, False), (9, True), (10, False), (19, True), (59, True), (69, False), (79, False), (99, False)]
)
def test_entries_move_at_whole_multiples_and_not_at_the_end(step, due):
    """Every 10 of 100 steps, and while less than 0.7 of the run is over."""
    assert RULE.due(step, 100) is due
    assert (replaced(book(), [0], RULE, step) > 0) is due


def test_uses_add_up_over_steps_and_parts_until_the_next_replacement():
    made = book()
    for ids in ([1, 1], [1, 2]):
        learn(made, ids)
    made.replace_unused(RULE, 0, 100, torch.Generator())
    assert replaced(made, [3], RULE, step=1) == 0
    assert made.used_V[:4].tolist() == [0, 3, 1, 1]


def test_uses_outside_training_do_not_count():
    made = book().eval()
    made(near(made, [1, 2]))
    made.train().replace_unused(RULE, 0, 100, torch.Generator())
    assert made.used_V.sum() == 0


def test_the_same_draws_give_the_same_book():
    a, b, c = book(), book(), book()
    for made, seed in ((a, 0), (b, 0), (c, 1)):
        replaced(made, [2, 5, 5, 7], RULE, seed=seed)
    assert torch.equal(a.entry_VE, b.entry_VE)
    assert not torch.equal(a.entry_VE, c.entry_VE)


def test_the_statistics_are_part_of_a_training_state_and_not_of_a_model():
    made = book()
    assert "used_V" in dict(made.named_buffers())
    assert "used_V" not in made.state_dict()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"until": 1.1}, {"threshold": 1.0}, {"noise": 0.0}])
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match="A replacement needs"):
        Replacement(**wrong)


def test_perplexity_is_the_number_of_equally_used_entries():
    assert perplexity(torch.tensor([[0, 1], [2, 3]]), 32) == pytest.approx(4, rel=1e-5)
    assert perplexity(torch.tensor([[7, 7], [7, 7]]), 32) == pytest.approx(1, rel=1e-5)
