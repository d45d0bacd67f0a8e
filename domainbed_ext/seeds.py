"""Seeds and job names, bit for bit those of DomainBed.

Every random choice of the protocol starts from `seed_hash`, and a job's folder is named by
`job_hash`, so that a sweep can be continued, compared with, or mixed with one made by DomainBed
itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping


def seed_hash(*args: object) -> int:
    """A seed below 2**31 from any arguments: the md5 of the text of their tuple.

    Pass Python values only. The text is `str(args)`, and NumPy 2 prints `np.int64(1)` where Python
    prints `1`.
    """
    digest = hashlib.md5(str(args).encode("utf-8"), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 2**31


def job_hash(train_args: Mapping[str, object]) -> str:
    """The name of a job's folder: the md5 of its arguments as JSON with sorted keys.

    Args:
        train_args: What the sweep passes to the job, `output_dir` excluded (it holds this name).
    """
    text = json.dumps(dict(train_args), sort_keys=True)
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def is_job_name(name: str) -> bool:
    """Whether it is of the form that `job_hash` gives."""
    return re.fullmatch(r"[0-9a-f]{32}", name) is not None
