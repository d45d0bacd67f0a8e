"""Sharing a GPU: when another job fits, and what follows when one does not; made-up numbers."""

from __future__ import annotations

import pytest
import torch

from domainbed_ext.memory import (
    CONTEXT_BYTES,
    MemoryReport,
    has_room,
    is_out_of_memory,
    measure_memory,
)
from domainbed_ext.seats import Seated, Seats

GB = 10**9
CONTEXT = CONTEXT_BYTES / GB  # about 0.73


def report(free, *, total=80.0, held=4.0, peak=4.0, steps=50):
    """A measurement, in GB."""
    sizes = (int(number * GB) for number in (total, free, held, peak))
    total, free, held, peak = sizes
    return MemoryReport(total=total, free=free, held=held, peak=peak, steps=steps)


@pytest.mark.parametrize(
    ("reports", "largest", "expected"),
    [
        ([], 0, True),  # an empty device takes a job whatever it is
        ([], 100, True),
        # 8 GB of the 80 stay free; a job like the one there needs 4 and a context
        ([report(8 + 4 + CONTEXT + 0.01)], 0, True),
        ([report(8 + 4 + CONTEXT - 0.01)], 0, False),
        # a job of the sweep has needed 6
        ([report(8 + 4 + CONTEXT + 0.01)], 6, False),
        ([report(8 + 6 + CONTEXT + 0.01)], 6, True),
        # one that holds less than it has held will want it back
        ([report(30, held=1, peak=20)], 0, False),
        ([report(8 + 19 + 20 + CONTEXT + 0.01, held=1, peak=20)], 0, True),
        # the newest measurement counts, here of a device that others have filled since
        ([report(60), report(10)], 0, False),
        ([report(10), report(60)], 0, True),
        # not before those that run have settled
        ([report(60, steps=4)], 0, False),
        ([report(60, steps=5)], 0, True),
        ([report(60), None], 0, False),
    ],
)
def test_when_another_job_fits(reports, largest, expected):
    assert has_room(reports, largest=int(largest * GB)) is expected


class Device:
    """Jobs on a device of `total` GB: each takes what it needs and a context."""

    def __init__(self, seats, needs, total=80.0):
        self.seats, self.needs, self.total = seats, list(needs), total
        self.running = []

    def start(self):
        """Seats jobs as long as there are seats, each taking its steps before the next comes."""
        while self.needs and self.seats.are_free(self.running, None):
            seat = self.seats.take(self.running, None)
            self.running.append(seat)
            seat.need = self.needs.pop(0)
            free = self.total - sum(job.need + CONTEXT for job in self.running)
            assert free >= 0, "out of memory"
            self.seats.measured(seat, report(free, held=seat.need, peak=seat.need))
        return len(self.running)


@pytest.mark.parametrize(
    ("need", "expected"),
    # (80 - 8) / (need + 0.73): 72 / 4.73 = 15.2, 72 / 20.73 = 3.5, 72 / 40.73 = 1.8
    [(4, 15), (20, 3), (40, 1), (79, 1)],
)
def test_jobs_are_added_while_there_is_room(need, expected):
    assert Device(Seats({"0": None}), [need] * 99).start() == expected


def fill(seats):
    seated = []
    while seats.are_free(seated, None):
        seated.append(seats.take(seated, None))
    return seated


def test_a_fixed_number_needs_no_measurement():
    seats = Seats({"0": 2, "1": 2})
    seated = fill(seats)
    assert [seat.device for seat in seated] == ["0", "1", "0", "1"]  # the emptier one first
    assert [seat.most for seat in seated] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("num_jobs", "devices", "expected"),
    [(3, [], [None] * 3), (3, ["4", "7"], ["4", "7", "4"]), (1, ["4", "7"], ["4"])],
)
def test_jobs_are_dealt_to_devices(num_jobs, devices, expected):
    assert [seat.device for seat in fill(Seats.dealt(num_jobs, devices))] == expected


def test_a_job_that_ran_out_of_memory_gets_fewer_neighbours():
    seats = Seats({"0": 3, "1": 3})
    crowd = [Seated("0"), Seated("0")]
    third = seats.take([*crowd, *[Seated("1")] * 3], None)
    assert (third.device, third.most) == ("0", 3)
    assert [seat.most for seat in crowd] == [3, 3]
    # It ran out beside two: next time beside one at most. So it joins one, and keeps others away.
    assert seats.ran_out(third) == 2
    assert not seats.are_free([Seated("0"), Seated("0"), *[Seated("1")] * 2], 2)
    again = seats.take([Seated("0"), *[Seated("1")] * 3], 2)
    assert (again.device, again.limit, again.most) == ("0", 2, 2)
    assert not seats.are_free([Seated("0"), again, *[Seated("1")] * 3], None)
    assert seats.ran_out(again) == 1
    alone = seats.take([Seated("1")], 1)
    assert (alone.device, alone.most) == ("0", 1)
    # Alone there is nobody to do without.
    assert seats.ran_out(alone) is None


def test_memory_that_ran_out_is_remembered_of_a_measured_device():
    seats = Seats({"0": None})
    first = seats.take([], None)
    seats.measured(first, report(70))
    assert seats.are_free([first], None)
    second = seats.take([first], None)
    seats.measured(second, report(65))
    assert seats.ran_out(second) == 1
    assert not seats.are_free([first], None)  # though memory is free: it was then, too


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.gpu
def test_what_is_measured_on_a_gpu():
    before = measure_memory(0)
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    after = measure_memory(7)
    assert before is None or before.total == after.total
    assert after.steps == 7
    assert len(block) <= after.held <= after.peak < after.total - after.free
    del block
    torch.cuda.empty_cache()
    assert measure_memory(8).held < after.held
    assert measure_memory(8).peak == after.peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured():
    assert measure_memory(3) is None
