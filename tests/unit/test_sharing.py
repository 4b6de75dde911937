"""Shared data without MPI: memory that other processes map, and who is told what."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jd_hpc.errors import PayloadError, ProtocolError
from jd_hpc.payload import pack, pack_into
from jd_hpc.sharing import ASKS, KEEPS, MAPPED_FROM_BYTES, REFUSES, Address, Holder, Memory, Sharing, put_back

SIZE = MAPPED_FROM_BYTES


@pytest.fixture
def memory():
    memory = Memory.create(SIZE)
    yield memory
    memory.close()


def test_what_is_written_is_seen(memory):
    memory.data[:] = np.arange(SIZE) % 251
    other = Memory.open(memory.address)
    assert (other.data == memory.data).all()
    assert not other.data.flags.writeable
    memory.data[5] = 7
    assert other.data[5] == 7  # the same bytes
    memory.close()
    assert other.data[5] == memory.data[5] == 7  # for those who have them
    with pytest.raises(OSError, match="No such file"):
        Memory.open(memory.address)


def test_what_is_small_is_nobody_elses():
    assert Memory.create(SIZE - 1).address is None


@pytest.mark.parametrize("change", [{"token": b"?" * 16}, {"size": SIZE + 1}, {"fd": 0}, {"fd": 999}, {"pid": 1 << 22}])
def test_another_file_is_not_believed(memory, change):
    with pytest.raises(OSError):
        Memory.open(memory.address._replace(**change))


def test_nothing_is_left_of_a_process_that_dies():
    code = "from jd_hpc.sharing import *; m = Memory.create(%d); print(*m.address[:3], m.address.token.hex(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code % SIZE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        pid, fd, size, token = process.stdout.readline().split()
        address = Address(int(pid), int(fd), int(size), bytes.fromhex(token))
        assert Memory.open(address).data.size == SIZE
        process.kill()
        process.wait(20)
    with pytest.raises(OSError):
        Memory.open(address)


def test_arrays_are_read_only_views(memory):
    frames, size = pack({"a": np.arange(1000.0), "b": [1, "two"]}, "a test's value")
    assert size <= SIZE
    pack_into(frames, memory.data)
    value = memory.value()
    assert (value["a"] == np.arange(1000.0)).all()
    assert value["b"] == [1, "two"]
    assert np.shares_memory(value["a"], memory.data)
    with pytest.raises(ValueError, match="read-only"):
        value["a"][0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        value["a"].flags.writeable = True


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_holder_lets_go():
    before = descriptors()
    with Holder() as holder:
        memory, size = holder.pack(np.zeros(SIZE), 1 << 30)
        assert size > 8 * SIZE
        assert memory.value().sum() == 0
        with pytest.raises(PayloadError, match=f"over payload_limit = {8 * SIZE}"):
            holder.pack(np.zeros(SIZE), 8 * SIZE)
    del memory
    assert descriptors() == before


def test_put_back():
    for before in ({}, {"shared": 1}):
        attributes = {"other": 2, **before}
        with pytest.raises(ZeroDivisionError), put_back(attributes):
            attributes["shared"] = 3
            raise ZeroDivisionError
        assert attributes == {"other": 2, **before}


# ---- who is told what ---------------------------------------------------------------------------------------------------

HERE, THERE = Address(1, 2, 3, b""), Address(4, 5, 6, b"")


@pytest.fixture
def sharing():
    return Sharing({"a": [0, 1, 2], "b": [3, 4, 5]})


def answers(sharing):
    return list(iter(sharing.next, None))


def test_those_of_the_masters_host_get_its_address(sharing):
    sharing.hear(1, {ASKS: {}})
    assert answers(sharing) == []
    sharing.offer(HERE)
    assert answers(sharing) == [(1, HERE, False)]
    sharing.hear(2, {ASKS: {}})
    assert answers(sharing) == [(2, HERE, False)]


def test_another_host_gets_a_keeper(sharing):
    sharing.offer(HERE)
    for rank in (4, 3, 5):
        sharing.hear(rank, {ASKS: {}})
    assert answers(sharing) == [(4, None, True)]
    sharing.hear(4, {KEEPS: THERE})
    assert answers(sharing) == [(3, THERE, False), (5, THERE, False)]


def test_what_is_small_goes_to_everybody(sharing):
    for rank in (1, 4, 3):
        sharing.hear(rank, {ASKS: {}})
    sharing.offer(None)
    assert sorted(answers(sharing)) == [(1, None, False), (3, None, False), (4, None, False)]


def test_one_that_cannot_open_it_is_sent_it(sharing):
    sharing.offer(HERE)
    sharing.hear(1, {ASKS: {}})
    assert answers(sharing) == [(1, HERE, False)]
    sharing.hear(1, {REFUSES: True})
    assert answers(sharing) == [(1, None, False)]
    with pytest.raises(ProtocolError, match="again and again"):
        sharing.hear(1, {REFUSES: True})


def test_one_that_has_no_memory_to_share_is_no_keeper(sharing):
    sharing.offer(HERE)
    sharing.hear(3, {ASKS: {}})
    sharing.hear(4, {ASKS: {}})
    assert answers(sharing) == [(3, None, True)]
    sharing.hear(3, {KEEPS: None})
    assert answers(sharing) == [(4, None, True)]


@pytest.mark.parametrize("how", ["dead", "missing"])
def test_a_keeper_that_is_lost_before_it_has_the_data(sharing, how):
    sharing.offer(HERE)
    for rank in (3, 4, 5):
        sharing.hear(rank, {ASKS: {}})
    assert answers(sharing) == [(3, None, True)]
    sharing.lose({3} if how == "dead" else set(), {3} if how == "missing" else set())
    assert answers(sharing) == [(4, None, True)]
    sharing.hear(3, {KEEPS: THERE})  # it has come back: too late
    assert answers(sharing) == []
    sharing.hear(4, {KEEPS: HERE})
    assert answers(sharing) == [(5, HERE, False)]


def test_a_keeper_that_dies_with_the_data(sharing):
    sharing.offer(HERE)
    sharing.hear(3, {ASKS: {}})
    assert answers(sharing) == [(3, None, True)]
    sharing.hear(3, {KEEPS: THERE})
    sharing.lose({3}, set())
    sharing.hear(4, {ASKS: {}})
    assert answers(sharing) == [(4, None, True)]


def test_nonsense(sharing):
    with pytest.raises(ProtocolError, match="what"):
        sharing.hear(1, {"what": 1})


def test_everybody_who_lives_gets_it_once():
    """Whatever the order of events: nobody waits when all is quiet, and each host has one keeper at a time."""
    seed = time.time_ns()
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(300):
        hosts = {"a": [0, 1, 2], "b": [3, 4, 5, 6], "c": [7], "d": [8, 9]}
        sharing, dead, missing = Sharing(hosts), {0}, set()
        dead.clear()
        host_of = {rank: host for host, ranks in hosts.items() for rank in ranks}
        has, fetching = set(), {}
        events = [("ask", rank) for rank in range(1, 10)] + [("offer", 0)]
        chance.shuffle(events)
        events += [(chance.choice(["dead", "missing"]), chance.randrange(1, 10)) for _ in range(chance.randrange(4))]
        while events or fetching:
            if fetching and (not events or chance.random() < 0.4):
                rank = chance.choice(list(fetching))
                del fetching[rank]
                if rank not in dead:
                    has.add(rank)
                    sharing.hear(rank, {KEEPS: chance.choice([Address(rank, 0, 0, b""), None])})
            else:
                what, rank = events.pop(0)
                if what == "ask" and rank not in dead:
                    sharing.hear(rank, {ASKS: {}})
                elif what == "offer":
                    sharing.offer(HERE)
                elif what in ("dead", "missing"):
                    (dead if what == "dead" else missing).add(rank)
                    sharing.lose(dead, missing)
            for rank, address, is_keeper in answers(sharing):
                assert rank not in has | set(fetching)
                if address is None:
                    assert is_keeper
                    assert all(host_of[other] != host_of[rank] or other in dead | missing for other in fetching)
                    fetching[rank] = True
                else:
                    assert address.pid not in dead
                    has.add(rank)
        assert has | dead >= set(range(1, 10))
