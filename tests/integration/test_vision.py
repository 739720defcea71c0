"""Vision-language models: an image in the prompt, compressed with the text around it."""

import pytest
import torch
import vision_families
from decoded_cache import decoded_cache, full_cache, small_cache
from tiny_models import forward, generate, prompt

from selfindex.integrations.transformers.families import TESTED


@pytest.fixture(params=sorted(vision_families.SPECS))
def family(request):
    if not vision_families.available(request.param):
        pytest.skip("this transformers does not have the family")
    return request.param


def test_an_image_in_the_prompt(family):
    dense, ours = vision_families.pair(family)
    assert family in TESTED
    ids, image = vision_families.image_prompt(family)
    cache, mask = full_cache(ours), torch.ones_like(ids)
    wanted = forward(dense, ids, mask=mask, **image)
    assert torch.equal(forward(ours, ids, cache, mask, **image), wanted)
    other = vision_families.image_prompt(family, seed=1)[1]
    assert not torch.equal(forward(dense, ids, mask=mask, **other), wanted)
    for new in (1, 3):
        step = prompt(new, seed=new)
        wanted = forward(dense, step, decoded_cache(cache, dense))
        torch.testing.assert_close(forward(ours, step, cache), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.wide)])
def test_generate_from_an_image(family, beams):
    dense, ours = vision_families.pair(family)
    ids, image = vision_families.image_prompt(family)
    wanted = generate(dense, ids, num_beams=beams, **image)
    assert torch.equal(generate(ours, ids, small_cache(ours, recent=100), num_beams=beams, **image), wanted)
