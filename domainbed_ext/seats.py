"""Which device takes the next job: so many jobs on each, or as many as its memory allows, and fewer
after memory ran out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from domainbed_ext.memory import MemoryReport, has_room

Device = str | None  # a value of CUDA_VISIBLE_DEVICES; None: the CPU


@dataclass
class Seated:
    """A job that runs on a device.

    Attributes:
        device: Where.
        limit: How many jobs may share the device while it runs, itself included; None: any number.
        most: How many have shared it so far.
        report: The last measurement, and its number in the order of all measurements.
    """

    device: Device
    limit: int | None = None
    most: int = 1
    report: MemoryReport | None = None
    report_number: int = 0


class Seats:
    """The devices and how many jobs each takes at once.

    Args:
        numbers: Of jobs on each device; None: as its memory allows.
    """

    def __init__(self, numbers: Mapping[Device, int | None]) -> None:
        self._numbers = dict(numbers)
        self._measured = {device for device, number in numbers.items() if number is None}
        self._largest = 0
        self._num_reports = 0

    @classmethod
    def dealt(cls, num_jobs: int, devices: Sequence[str]) -> Seats:
        """So many jobs at once, dealt to the devices in turn; all on the CPU if there are none."""
        if not devices:
            return cls({None: num_jobs})
        return cls(
            {
                device: len(range(position, num_jobs, len(devices)))
                for position, device in enumerate(devices)
                if position < num_jobs
            }
        )

    def are_free(self, seated: Sequence[Seated], limit: int | None) -> bool:
        """Whether a job with that limit finds a seat beside those that run."""
        return any(self._fits(device, seated, limit) for device in self._numbers)

    def take(self, seated: Sequence[Seated], limit: int | None) -> Seated:
        """A free seat for a job with that limit: on the device with the fewest jobs."""
        fits = [device for device in self._numbers if self._fits(device, seated, limit)]
        device = min(fits, key=lambda name: sum(job.device == name for job in seated))
        beside = [job for job in seated if job.device == device]
        for job in beside:
            job.most = max(job.most, len(beside) + 1)
        return Seated(device, limit, most=len(beside) + 1)

    def _fits(self, device: Device, seated: Sequence[Seated], limit: int | None) -> bool:
        beside = [job for job in seated if job.device == device]
        limits = [self._numbers[device], limit, *(job.limit for job in beside)]
        if any(number is not None and len(beside) >= number for number in limits):
            return False
        if device not in self._measured:
            return True
        reports = [job.report for job in sorted(beside, key=lambda job: job.report_number)]
        return has_room(reports, largest=self._largest)

    def measured(self, job: Seated, report: MemoryReport) -> None:
        """A running job has measured its memory."""
        self._num_reports += 1
        job.report, job.report_number = report, self._num_reports
        self._largest = max(self._largest, report.peak)

    def ran_out(self, job: Seated) -> int | None:
        """A job ran out of memory. How many may share a device with it when it is tried again;
        None if it was alone, so that there is no use in trying.
        """
        if job.most == 1:
            return None
        fewer = job.most - 1
        if job.device in self._measured:  # what was measured has misled
            number = self._numbers[job.device]
            self._numbers[job.device] = fewer if number is None else min(fewer, number)
        return fewer
