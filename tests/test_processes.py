"""What the processes of a job tell each other."""

import pytest
import torch
from parallel import in_processes

from safe_lab.processes import ALONE, Processes


def test_alone_everything_comes_back_as_it_is():
    tensor = torch.arange(3)
    assert ALONE.sum(tensor) is tensor
    assert ALONE.broadcast("x") == "x"
    assert ALONE.gather("x") == ["x"]
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.on_node("here") is ALONE
    assert Processes.of_job(torch.device("cpu")) == ALONE


def test_sum_is_the_same_everywhere_and_leaves_its_argument():
    def exchange(processes):
        mine = torch.full((2, 3), float(processes.rank + 1)).T
        return processes.sum(mine), mine

    for total, mine in in_processes(exchange, count=3):
        assert torch.equal(total, torch.full((3, 2), 6.0))
        assert float(mine.max()) in (1, 2, 3)


def test_process_0_decides_and_all_are_heard():
    def exchange(processes):
        return processes.broadcast({"rank": processes.rank}), processes.gather(processes.rank * 10)

    assert in_processes(exchange, count=3) == [({"rank": 0}, [0, 10, 20])] * 3


@pytest.mark.parametrize("rank", [0, 1, None])
def test_one_of_them_is_enough_for_any(rank):
    assert in_processes(lambda processes: processes.any(processes.rank == rank)) == [rank is not None] * 2


def test_those_on_a_node_talk_among_themselves():
    """Two machines: processes 0 and 2, and process 1."""

    def exchange(processes):
        node = processes.on_node(["first", "second", "first"][processes.rank])
        return node.rank, node.count, node.gather(processes.rank), node.broadcast(processes.rank)

    assert in_processes(exchange, count=3) == [(0, 2, [0, 2], 0), (0, 1, [1], 1), (1, 2, [0, 2], 0)]


def test_what_one_process_raises_is_seen():
    def fail(processes):
        if processes.rank == 1:
            raise ValueError("here")

    with pytest.raises(AssertionError, match=r"process 1[\s\S]*ValueError: here"):
        in_processes(fail)
