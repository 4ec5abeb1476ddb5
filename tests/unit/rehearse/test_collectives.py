from __future__ import annotations

from nemo_ampo.rehearse.collectives import Call, first_disagreement

SUM = Call("all_reduce", (0, 1), ("[4, 8] float32",), "sum")


def test_ranks_that_do_the_same_agree() -> None:
    alone = Call("all_reduce", (1, 3), ("[2] float32",), "sum")
    assert first_disagreement({0: [SUM, SUM], 1: [SUM, alone, SUM]}) is None, "the other member of {1, 3} was not rehearsed"


def test_a_collective_that_one_rank_does_not_enter_is_named() -> None:
    told = first_disagreement({0: [SUM, SUM], 1: [SUM]})
    assert told == "rank 0 enters all_reduce [4, 8] float32 sum of ranks 0, 1, rank 1 does not"
    assert first_disagreement({0: [], 1: [SUM]}) == told.replace("rank 0 e", "rank 1 e").replace(
        "rank 1 does", "rank 0 does"
    )


def test_other_shapes_types_and_operations_are_named_with_their_place() -> None:
    for other in (
        Call("all_reduce", (0, 1), ("[4, 9] float32",), "sum"),
        Call("all_reduce", (0, 1), ("[4, 8] bfloat16",), "sum"),
        Call("all_reduce", (0, 1), ("[4, 8] float32",), "max"),
        Call("broadcast", (0, 1), ("[4, 8] float32",), "src=0"),
    ):
        told = first_disagreement({0: [SUM, SUM], 1: [SUM, other]})
        assert told == f"call 2 of their group: rank 0 enters {SUM}, rank 1 enters {other}"


def test_what_is_sent_must_be_received() -> None:
    sent = Call("isend", (0, 1), ("[8, 4] bfloat16",), "dst=1")
    taken = Call("irecv", (0, 1), ("[8, 4] bfloat16",), "src=0")
    assert first_disagreement({0: [sent], 1: [taken]}) is None
    wrong = Call("irecv", (0, 1), ("[8, 2] bfloat16",), "src=0")
    told = first_disagreement({0: [sent], 1: [wrong]})
    assert told is not None and told.startswith("from rank 0 to rank 1: ")
    assert first_disagreement({0: [sent], 1: []}) is not None
