"""The learning-rate schedule against its published values and timm's, and the cutting of a run into segments."""

import itertools

import pytest

from sovit.schedule import Segment, learning_rate_scale, segments, steps_trained

PUBLISHED = {"total_steps": 1_000_000, "warmup_steps": 10_000, "timescale": 10_000, "cooldown_steps": 50_000}


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (5_000, 4e-4),
        (10_000, 8e-4),
        (20_000, 5.657e-4),
        (40_000, 4e-4),
        (975_000, 4.051e-5),
        (1_000_000, 0.0),
    ],
)
def test_published_values(step, lr):
    """Base 8e-4, warm-up and timescale 10K, total 1M, cooldown 50K (worked by hand from the formula)."""
    assert 8e-4 * learning_rate_scale(step, **PUBLISHED) == pytest.approx(lr, rel=2e-4, abs=0)


@pytest.mark.parametrize("kind", ["rsqrt", "constant"])
@pytest.mark.parametrize("warmup", [10, 0])
def test_equals_timms_warmup_stable_decay(kind, warmup):
    import torch
    from timm.scheduler.wsd_lr import WSDLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = WSDLRScheduler(
        optimizer,
        t_initial=100 - warmup,
        decay_t=20,
        stable_fn=kind,
        stable_timescale=13,
        decay_fn="linear",
        warmup_t=warmup,
        t_in_epochs=False,
    )
    for step in range(101):
        ours = learning_rate_scale(
            step, kind=kind, total_steps=100, warmup_steps=warmup, timescale=13, cooldown_steps=20
        )
        assert ours == pytest.approx(theirs._get_lr(step)[0], abs=1e-15), step


@pytest.mark.parametrize("kind", ["rsqrt", "constant"])
def test_trunk_does_not_know_the_total(kind):
    """Before its cooldown every duration has the learning rate of the trunk, bit for bit: branches may leave it."""
    common = {"kind": kind, "warmup_steps": 30, "timescale": 40}
    for total in (100, 300, 1000):
        for step in range(total - 50 + 1):
            trunk = learning_rate_scale(step, total_steps=10**6, cooldown_steps=0, **common)
            assert learning_rate_scale(step, total_steps=total, cooldown_steps=50, **common) == trunk


def test_shift_moves_the_decay_and_lowers_the_warmup():
    """shift counts as time already spent decaying: m(W + n, shift) = m(W + n + shift, 0), and the warm-up is scaled."""
    common = {"total_steps": 1000, "warmup_steps": 10, "timescale": 50, "cooldown_steps": 0}
    for n in (0, 7, 200):
        shifted = learning_rate_scale(10 + n, shift=150, **common)
        assert shifted == learning_rate_scale(10 + n + 150, **common)
    assert learning_rate_scale(5, shift=150, **common) == pytest.approx(0.5 / 2)  # 1 / sqrt(1 + 150 / 50) = 1/2


def test_cosine_runs_from_one_after_warmup_to_zero_at_the_end():
    common = {"kind": "cosine", "total_steps": 110, "warmup_steps": 10, "timescale": 1, "cooldown_steps": 0}
    values = {
        5: 0.5,
        10: 1.0,
        35: 0.8535533905932737,
        60: 0.5,
        110: 0.0,
        130: 0.0,
    }  # (1 + cos(pi / 4)) / 2 at a quarter
    for step, value in values.items():
        assert learning_rate_scale(step, **common) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("kind", ["rsqrt", "constant", "cosine"])
def test_warmup_and_cooldown_multiply_every_kind(kind):
    bare = {"kind": kind, "total_steps": 200, "timescale": 20}
    for step in (5, 20, 100, 170, 199, 200, 500):
        # Same decay with and without the cooldown: only the factor may differ.
        with_both = learning_rate_scale(step, warmup_steps=20, cooldown_steps=40, **bare)
        without = learning_rate_scale(step, warmup_steps=20, cooldown_steps=0, **bare)
        assert with_both == pytest.approx(without * max(0.0, min(1.0, (200 - step) / 40)))
    assert learning_rate_scale(10, warmup_steps=20, cooldown_steps=0, **bare) == 0.5
    assert learning_rate_scale(0, warmup_steps=0, cooldown_steps=0, **bare) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "step"}, "'step' is unknown"),
        ({"timescale": 0}, "timescale=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"shift": -5}, "shift=-5"),
        ({"step": -1}, "step=-1"),
        ({"cooldown_steps": 11}, "cooldown_steps=11 is more than total_steps=10"),
    ],
)
def test_bad_schedules_are_named(change, words):
    arguments = {"step": 0, "total_steps": 10, "warmup_steps": 0, "timescale": 1, "cooldown_steps": 0} | change
    with pytest.raises(ValueError, match=words):
        learning_rate_scale(**arguments)


@pytest.mark.parametrize("weights", ["ema", "trunk"])
def test_uncooled_run_is_one_trunk(weights):
    """Its cooldown is not read, and evaluation steps may come in any order."""
    assert segments([30, 10, 20], weights, 5) == [Segment("trunk", 0, 30, 30, 0, (10, 20, 30))]


def test_cooled_run_alternates_trunk_and_branch():
    assert segments([100, 200, 400], "cooled", 50) == [
        Segment("trunk", 0, 50, 400, 0, ()),
        Segment("branch", 50, 100, 100, 50, (100,)),
        Segment("trunk", 50, 150, 400, 0, ()),
        Segment("branch", 150, 200, 200, 50, (200,)),
        Segment("trunk", 150, 350, 400, 0, ()),
        Segment("branch", 350, 400, 400, 50, (400,)),
    ]


def test_fractional_cooldown_is_rounded_and_empty_trunks_are_left_out():
    assert segments([1, 2, 12], "cooled", 0.2) == [
        Segment("branch", 0, 1, 1, 1, (1,)),
        Segment("trunk", 0, 1, 12, 0, ()),
        Segment("branch", 1, 2, 2, 1, (2,)),
        Segment("trunk", 1, 10, 12, 0, ()),
        Segment("branch", 10, 12, 12, 2, (12,)),
    ]
    assert [s.kind for s in segments([10], "cooled", 10)] == ["branch"]


@pytest.mark.parametrize("cooldown", [1, 7, 7.0, 0.01, 0.3, 0.5, 0.999])
def test_every_segment_starts_where_the_trunk_stands(cooldown):
    """Over dense durations: trunks tile from 0 without a gap, a branch leaves the trunk's end, the rate ends at 0."""
    durations = [*range(7, 60), 1000, 1001]
    position, evaluated = 0, []
    for segment in segments(durations, "cooled", cooldown):
        assert segment.start == position < segment.stop
        if segment.kind == "trunk":
            position = segment.stop
        else:
            evaluated += segment.evaluate_at
            assert segment.stop == segment.total_steps == segment.start + segment.cooldown_steps
    assert evaluated == durations


def test_a_segment_has_the_learning_rate_of_the_run_it_belongs_to():
    """Step by step, trunk plus branch equals training that duration alone."""
    plan = segments([100, 200, 400], "cooled", 0.25)
    rates = {"trunk": {}, "branch": {}}
    for segment in plan:
        for step in range(segment.start, segment.stop):
            rates[segment.kind][segment.total_steps, step] = learning_rate_scale(
                step,
                total_steps=segment.total_steps,
                warmup_steps=20,
                timescale=30,
                cooldown_steps=segment.cooldown_steps,
            )
    for total in (100, 200, 400):
        for step in range(total):
            alone = learning_rate_scale(
                step, total_steps=total, warmup_steps=20, timescale=30, cooldown_steps=total // 4
            )
            joined = rates["branch"].get((total, step), rates["trunk"].get((400, step)))
            assert joined == alone


def test_branching_saves_the_shared_trunk():
    """SoViT's durations, 500K, 1M, 2M with 50K of cooldown: 1.95M of trunk and three branches instead of 3.5M."""
    durations = [500_000, 1_000_000, 2_000_000]
    assert steps_trained(segments(durations, "cooled", 50_000)) == 2_100_000
    assert steps_trained(segments(durations, "ema")) == 2_000_000


@pytest.mark.parametrize(
    ("steps", "weights", "cooldown", "words"),
    [
        ([], "ema", 0, "at least one"),
        ([0, 5], "ema", 0, "step 0 is below 1"),
        ([5, 9, 5], "ema", 0, "step 5 is given twice"),
        ([5], "swa", 0, "'swa' is unknown"),
        ([5], "cooled", 0, "cooldown=0 "),
        ([5], "cooled", -0.5, "cooldown=-0.5"),
        ([50], "cooled", 1.5, "cooldown=1.5"),
        ([5, 50], "cooled", 6, "6 steps is longer than the duration of 5"),
    ],
)
def test_impossible_plans_are_named(steps, weights, cooldown, words):
    with pytest.raises(ValueError, match=words):
        segments(steps, weights, cooldown)


def test_branches_never_leave_before_an_earlier_one():
    """For any fraction, T - round(cT) does not fall as T grows, so the trunk never has to go back."""
    for percent in itertools.chain(range(1, 100), (0.1, 99.9)):
        segments(range(1, 120), "cooled", percent / 100)
