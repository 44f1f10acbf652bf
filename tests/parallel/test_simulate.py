import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.schedules import GENERATORS, Overlapped, Pass, make_schedule
from dsv3_jax.parallel.simulate import Costs, ScheduleError, simulate

# Whole numbers, so that sums of costs are exact in floating point.
COST = st.integers(1, 9).map(float)


@st.composite
def sizes(draw):
    half = draw(st.integers(1, 3))
    return 2 * half, 4 * half + 2 * draw(st.integers(0, 3))


@st.composite
def fine_costs(draw):
    """W <= I <= F, and overlapping that neither beats the longer pass nor loses to running both in turn."""
    W, BI, F = sorted(draw(st.tuples(COST, COST, COST)))
    return Costs(F, BI + W, W, float(draw(st.integers(int(max(F, BI + W)), int(F + BI + W)))))


def bubble(name, P, M, costs):
    return max(simulate(make_schedule(name, P, M), costs).bubbles)


@given(sizes(), COST, COST, COST)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_gpipe_and_1f1b_idle_for_the_passes_of_every_other_rank_whatever_they_cost(size, F, BI, W):
    (P, M), costs = size, Costs(F, BI + W, W)
    for name in ("gpipe", "1f1b"):
        assert set(simulate(make_schedule(name, P, M), costs).bubbles) == {(P - 1) * (F + costs.B)}


@given(sizes(), COST, COST, COST)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_zb1p_idles_as_published_while_weight_passes_fit_the_gaps_and_longer_otherwise(size, F, BI, W):
    (P, M), costs = size, Costs(F, BI + W, W)
    published = (P - 1) * (F + costs.B - 2 * W)
    if min(F, BI) >= W:
        assert bubble("zb1p", P, M, costs) == published
    else:
        assert bubble("zb1p", P, M, costs) > published


@given(sizes(), fine_costs())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_dualpipe_idles_as_published(size, costs):
    P, M = size
    assert bubble("dualpipe", P, M, costs) == (P / 2 - 1) * (costs.FB + costs.F - 2 * costs.W)
    paper = dataclasses.replace(costs, F=costs.B - costs.W)  # the paper's form takes F for as long as its backward for the input
    paper = dataclasses.replace(paper, FB=min(costs.FB, paper.F + paper.B))
    assert bubble("dualpipe", P, M, paper) == (P / 2 - 1) * (paper.FB + paper.B - 3 * paper.W)


@given(sizes(), COST, COST, COST, st.integers(0, 9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_bounds_that_hold_for_all_costs(size, F, BI, W, saved):
    P, M = size
    costs = Costs(F, BI + W, W, max(F, BI + W, F + BI + W - saved))
    timelines = {name: simulate(make_schedule(name, P, M), costs) for name in GENERATORS}
    for name, timeline in timelines.items():
        assert min(timeline.bubbles) >= 0
        assert timeline.makespan >= M * min(F + costs.B, costs.FB), name
        late = simulate(timeline.schedule, dataclasses.replace(costs, communication=1.0))
        assert late.makespan > timeline.makespan
    assert timelines["zb1p"].makespan <= timelines["1f1b"].makespan + (P - 1) * W
    assert max(timelines["dualpipe"].bubbles) >= (P / 2 - 1) * (costs.FB + F - 2 * W)


@given(sizes(), COST, COST, COST, st.integers(0, 9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_dualpipe_v_is_a_dualpipe_of_twice_the_ranks_folded(size, F, BI, W, saved):
    (P, M), costs = size, Costs(F, BI + W, W, max(F, BI + W, F + BI + W - saved))
    folded, whole = simulate(make_schedule("dualpipe_v", P, M), costs), simulate(make_schedule("dualpipe", 2 * P, 2 * M), costs)
    assert folded.makespan == whole.makespan
    assert folded.bubbles == whole.bubbles[:P]
    assert folded.peak_activations == whole.peak_activations[:P]


@given(sizes())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_activation_peaks_are_the_published_ones_and_do_not_grow_with_the_batch(size):
    P, M = size
    peaks = {name: max(simulate(make_schedule(name, P, M)).peak_activations) for name in GENERATORS}
    assert peaks == {"gpipe": M, "1f1b": P, "zb1p": P, "dualpipe": P + 1, "dualpipe_v": 2 * P + 1}


def test_one_operation_at_a_time_and_none_before_its_neighbours():
    timeline = simulate(make_schedule("1f1b", 4, 8), Costs(F=1.0, B=3.0, W=1.0, communication=0.5))
    for spans in timeline.ranks:
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    ends = {(rank, str(span.operation)): span.end for rank, spans in enumerate(timeline.ranks) for span in spans}
    starts = {(rank, str(span.operation)): span.start for rank, spans in enumerate(timeline.ranks) for span in spans}
    assert starts[1, "F0.0"] == ends[0, "F0.0"] + 0.5
    assert all(starts[rank, f"B0.{m}"] >= ends[rank + 1, f"B0.{m}"] + 0.5 for rank in range(3) for m in range(8))


def changed(name, rank, edit):
    schedule = make_schedule(name, 4, 8)
    operations = list(schedule.ranks[rank])
    edit(operations)
    return dataclasses.replace(schedule, ranks=(*schedule.ranks[:rank], tuple(operations), *schedule.ranks[rank + 1 :]))


@pytest.mark.parametrize("name", GENERATORS)
def test_an_operation_that_is_gone_or_there_twice_is_named(name):
    rng = random.Random(0)
    for rank in range(4):
        where = rng.randrange(len(make_schedule(name, 4, 8).ranks[rank]))
        victim = make_schedule(name, 4, 8).ranks[rank][where]
        first = sorted(victim.passes, key=lambda one: (one.direction, one.micro_batch))[0]
        with pytest.raises(ScheduleError, match=rf"rank {rank}: {first} is missing"):
            simulate(changed(name, rank, lambda ops, where=where: ops.pop(where)))
        with pytest.raises(ScheduleError, match=rf"rank {rank}: {victim.passes[0]} is there twice"):
            simulate(changed(name, rank, lambda ops, victim=victim: ops.append(victim)))


def test_an_order_that_cannot_run_names_the_ring_of_waits():
    def swap(ops):
        i, j = ops.index(Pass("I", 1, 0)), ops.index(Pass("W", 1, 0))
        ops[i], ops[j] = ops[j], ops[i]

    with pytest.raises(ScheduleError, match=r"^rank 0: W1\.0 comes before B or I 1\.0 of rank 0, which it needs"):
        simulate(changed("dualpipe", 0, swap))
    with pytest.raises(ScheduleError, match=r"rank 0: B0\.0 comes before B or I 0\.0 of rank 1; rank 1: .* comes before .* of rank 0"):
        simulate(changed("1f1b", 0, lambda ops: ops.insert(1, ops.pop(ops.index(Pass("B", 0, 0))))))


def test_other_faults_are_named():
    with pytest.raises(ScheduleError, match=r"rank 2: B0\.1 is there twice, the second time as I0\.1"):
        simulate(changed("1f1b", 2, lambda ops: ops.append(Pass("I", 0, 1))))
    with pytest.raises(ScheduleError, match=r"rank 1: F1\.0 is of no micro-batch"):
        simulate(changed("gpipe", 1, lambda ops: ops.append(Pass("F", 1, 0))))
    with pytest.raises(ConfigError, match=r"W = 3\.0: must not be above B = 2\.0"):
        Costs(W=3.0)
    with pytest.raises(ConfigError, match=r"F = -1\.0: .*negative"):
        Costs(F=-1.0)


def test_an_overlapped_pair_takes_its_own_time():
    timeline = simulate(make_schedule("dualpipe", 4, 8), Costs(FB=2.25))
    pairs = [span for spans in timeline.ranks for span in spans if isinstance(span.operation, Overlapped)]
    assert pairs
    assert {span.end - span.start for span in pairs} == {2.25}
