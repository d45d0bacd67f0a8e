"""The engines of expert parallelism on a GPU; opt in with -m gpu."""

import pytest
import torch
import torch.distributed as dist

from gmoe_ltdr.dispatch.all_to_all import AllToAllDispatcher
from gmoe_ltdr.dispatch.tutel import TutelDispatcher, import_tutel
from tests.distributed import run_ranks
from tests.test_all_to_all import check_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# matrix products on a GPU add up in another order
CASES = (
    (torch.float64, range(40), 1e-10),
    (torch.float32, range(40, 80), 1e-4),
    (torch.bfloat16, range(80, 120), 8e-2),
)


def all_to_all(num_experts: int) -> AllToAllDispatcher:
    return AllToAllDispatcher(dist.group.WORLD)


def tutel(num_experts: int) -> TutelDispatcher | None:
    if num_experts % dist.get_world_size():
        return None
    return TutelDispatcher(dist.group.WORLD, num_experts=num_experts)


def check_on_gpu(make) -> int:
    return sum(
        check_plans(make, dtype, seeds, max(tolerance, 1e-4 if make is tutel else 0.0), "cuda")
        for dtype, seeds, tolerance in CASES
    )


@pytest.mark.parametrize(("backend", "num_ranks"), [("nccl", 1), ("gloo", 2)])
def test_all_to_all(backend, num_ranks):
    checked = run_ranks(check_on_gpu, num_ranks, all_to_all, backend=backend, limit_s=180)
    assert checked == [120] * num_ranks


@pytest.mark.tutel
@pytest.mark.parametrize(("backend", "num_ranks"), [("nccl", 1), ("gloo", 2)])
def test_tutel(backend, num_ranks):
    try:
        import_tutel()
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    checked = run_ranks(check_on_gpu, num_ranks, tutel, backend=backend, limit_s=180)
    assert min(checked) > (100 if num_ranks == 1 else 40)
