"""A vision-language model whose image tokens see each other: the first chunk keeps its own mask."""

import pytest
import torch
import transformers
from decoded_cache import decoded_cache
from stores import small_options
from tiny_models import VOCAB, cache_argument, generate, make_config, prompt
from transformers import DynamicCache

from selfindex import InputError, SelfIndexCache

IMAGE = VOCAB + 1


def make_models(attention="sdpa"):
    """(untouched model, equal model) of Gemma 3 with its vision tower."""
    text = make_config("gemma3", vocab_size=VOCAB + 4).to_dict()
    text.pop("model_type")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VOCAB + 2,
        eoi_token_index=VOCAB + 3,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.Gemma3ForConditionalGeneration._from_config(
            config, attn_implementation=attention
        )
        with torch.no_grad():
            model.model.multi_modal_projector.mm_input_projection_weight.normal_()  # zeros without this
        models.append(model.eval())
    return models


def request(batch):
    """Token ids and what belongs to them; row 1 of two is padded on the left."""
    image = torch.full((batch, 4), IMAGE)
    ids = torch.cat((prompt(10, batch), image, prompt(6, batch, seed=1), image, prompt(10, batch, seed=2)), 1)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :5] = 0
    pixels = torch.randn(2 * batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ids, {
        "attention_mask": mask,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": pixels,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_images_in_the_first_chunk(attention, batch):
    dense, ours = make_models(attention)
    ids, given = request(batch)
    wanted = generate(dense, ids, DynamicCache(config=dense.config), **given)
    cache = SelfIndexCache(ours, **small_options(recent=100))
    assert torch.equal(generate(ours, ids, cache, **given), wanted)
    name = cache_argument(ours)
    with torch.no_grad():
        exact = dense(ids, **given, **{name: DynamicCache(config=dense.config)}).logits
        cache.reset()
        real = given["attention_mask"].bool()
        assert torch.equal(ours(ids, **given, **{name: cache}).logits[real], exact[real])
        # That the tokens of an image see each other does matter.
        blind = dense(ids, **(given | {"token_type_ids": torch.zeros_like(ids)})).logits
        assert (blind - exact)[real].abs().max() > 1e-3


@torch.no_grad()
def test_steps_over_pages_with_images():
    dense, ours = make_models()
    ids, given = request(2)
    cache, name = SelfIndexCache(ours, **small_options(budget=1.0)), cache_argument(ours)
    ours(ids, **given, **{name: cache})
    assert cache.report().memory.payload
    more = torch.cat((given["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    step = {"input_ids": prompt(1, 2, seed=5), "attention_mask": more}
    wanted = dense(**step, **{name: decoded_cache(cache, dense)}).logits
    torch.testing.assert_close(ours(**step, **{name: cache}).logits, wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_an_image_in_a_later_chunk_is_refused():
    _, ours = make_models()
    ids, given = request(1)
    cache, name = SelfIndexCache(ours, **small_options()), cache_argument(ours)
    ours(prompt(40), **{name: cache})
    types = torch.cat((torch.zeros(1, 40, dtype=torch.long), given["token_type_ids"]), 1)
    with pytest.raises(InputError, match="after the first chunk"):
        ours(
            ids,
            attention_mask=torch.ones_like(types),
            token_type_ids=types,
            pixel_values=given["pixel_values"],
            **{name: cache},
        )
