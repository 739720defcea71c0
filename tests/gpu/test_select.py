"""The selection by itself: the same set as the reference on the same scores."""

import pytest
import torch

from selfindex.backends.cuda.decode import select_keys
from selfindex.index.select import top_k

pytestmark = pytest.mark.gpu


def reference_slots(keys, budgets, width):
    scores = torch.where(keys > 0, keys.float(), -torch.inf)
    return top_k(scores.view(keys.shape[0], 1, 1, -1), budgets, width)[:, 0, 0]


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("cluster", [1, 2, 6, 8, 16])
@pytest.mark.parametrize("distinct", [1, 7, 300, 2047])
@pytest.mark.parametrize("n", [128, 4096, 33 * 128])
def test_exactly_the_reference_set_in_order(preset, cluster, distinct, n):
    if cluster > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("thread block clusters need compute capability 9.0")
    generator = torch.Generator("cuda").manual_seed(n + distinct)
    lowest, step = (16, 15) if preset == "paper" else (1, 1)  # 15 bits, or 11
    keys = lowest + torch.randint(distinct * step, (6, n), generator=generator, device="cuda")
    keys[1] = torch.where(torch.rand(n, generator=generator, device="cuda") < 0.7, 0, keys[1])
    keys[2, n // 2 :] = 0
    keys[3] = keys[3].sort(descending=True).values
    have = (keys > 0).sum(1)
    budgets = torch.stack((have[0] // 20, have[1], have[2] // 2, have[3] // 3, have[4] * 0, have[5])).int()
    width = int(budgets.max())
    got = select_keys(keys.to(torch.int16), budgets, width, cluster, preset)
    wanted = reference_slots(keys, budgets, width)
    for row, budget in enumerate(budgets.tolist()):
        assert torch.equal(got[row, :budget], wanted[row, :budget])
