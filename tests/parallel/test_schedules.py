import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.schedules import GENERATORS, Seat, make_schedule


def test_dualpipe_has_the_eight_published_phases():
    """The outermost rank of eight with 20 micro-batches, as the paper's figure 5 draws it."""
    schedule = make_schedule("dualpipe", P=8, M=20)
    phases = [
        "F0.0 F0.1 F0.2 F0.3 F0.4 F0.5",
        "F0.6 F1.0",
        "I1.0 W1.0 F1.1 I1.1 W1.1 F1.2 I1.2 W1.2 F1.3",
        "FB(F0.7,B1.3) FB(F1.4,B0.0) FB(F0.8,B1.4) FB(F1.5,B0.1) FB(F0.9,B1.5) FB(F1.6,B0.2)",
        "B1.6 FB(F1.7,B0.3) B1.7 FB(F1.8,B0.4) B1.8 FB(F1.9,B0.5)",
        "B1.9 I0.6",
        "W0.6 I0.7 W0.7 I0.8 W0.8 I0.9",
        "W0.9",
    ]
    assert " ".join(map(str, schedule.ranks[0])) == " ".join(phases)
    middle = " ".join(map(str, schedule.ranks[3]))
    assert middle.startswith("F0.0 F1.0 F0.1 F1.1 F0.2 F1.2 F0.3 F1.3 F0.4 B1.0 FB(F1.4,B0.0) FB(F0.5,B1.1)")  # the first pair is split
    assert middle.endswith("B1.6 B0.6 B1.7 B0.7 I1.8 I0.8 I1.9 I0.9 W1.8 W0.8 W1.9 W0.9")


def test_the_second_half_of_dualpipe_mirrors_the_first():
    schedule = make_schedule("dualpipe", P=6, M=14)
    swap = str.maketrans("01", "10")
    for rank in range(3):
        text = [str(op) for op in schedule.ranks[rank]]
        mirrored = [str(op) for op in schedule.ranks[5 - rank]]
        assert [part.split(".")[0].translate(swap) for part in text] == [part.split(".")[0] for part in mirrored]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_micro_batch_meets_the_stages_in_order(name):
    schedule = make_schedule(name, P=4, M=8)
    entered = set()
    for seat in (Seat(rank, d) for rank in range(4) for d in schedule.directions):
        if schedule.before(seat) is not None:
            continue
        entered |= {schedule.batch_index(seat.direction, m) for m in schedule.micro_batches()}
        path = [seat]
        while (following := schedule.after(path[-1])) is not None:
            assert schedule.before(following) == path[-1]
            path.append(following)
        assert [schedule.stage(step) for step in path] == list(range(schedule.n_stages))
    assert entered == set(range(8))


def test_a_rank_holds_both_ends_where_the_embedding_meets_the_head():
    for name, ranks in (("dualpipe", (0, 3)), ("dualpipe_v", (0,))):
        schedule = make_schedule(name, P=4, M=8)
        for rank in ranks:
            assert {schedule.stage(Seat(rank, d)) for d in (0, 1)} == {0, schedule.n_stages - 1}


@pytest.mark.parametrize(
    ("name", "P", "M", "message"),
    [
        ("dualpipe", 3, 8, r"P = 3: .*even"),
        ("dualpipe", 0, 8, r"P = 0: .*at least 2"),
        ("dualpipe", 4, 9, r"M = 9: .*even.*at least 2 P = 8"),
        ("1f1b", 4, 6, r"M = 6: .*at least 2 P = 8"),
        ("dualpip", 4, 8, r"schedule = 'dualpip': did you mean 'dualpipe'"),
    ],
)
def test_what_cannot_be_scheduled_is_named(name, P, M, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(name, P, M)
