"""A model split over processes gives what one process gives; run by torchrun, see test_tensor_parallel.py.

    torchrun --nproc-per-node 2 tests/tensor_parallel.py FOLDER        (CPU: gloo; GPU: NCCL)

FOLDER is a model. Every process loads its share, generates with a compressed cache, and compares
with the whole model on the same device.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import selfindex
from selfindex.integrations.transformers.models import cache_argument

OPTIONS = {"sinks": 4, "recent": 8, "page_size": 128, "dense_below": 0, "min_tokens": 1, "budget": 40}
PROMPT, STEPS = 300, 40


@torch.inference_mode()
def run(model, ids):
    """(logits of the prompt's last token and of STEPS more, the cache), the tokens being given."""
    cache = selfindex.SelfIndexCache(model, **OPTIONS)
    call = {cache_argument(model): cache, "logits_to_keep": 1}
    logits = [model(input_ids=ids[:, :PROMPT], **call).logits[:, -1]]
    for i in range(PROMPT, PROMPT + STEPS):
        logits.append(model(input_ids=ids[:, i : i + 1], **call).logits[:, -1])
    return torch.stack(logits, 1).float(), cache


def main():
    where, gpu = sys.argv[1], torch.cuda.is_available()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    split = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, tp_plan="auto")
    whole = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).to(device)
    world, heads = dist.get_world_size(), whole.config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, whole.config.vocab_size, (2, PROMPT + STEPS), generator=generator).to(device)
    got, mine = run(split.eval(), ids)
    wanted, all_heads = run(whole.eval(), ids)
    stores = [[layer.store for layer in cache.compressed_layers] for cache in (mine, all_heads)]
    assert stores[0][0].format.kv_heads * world == stores[1][0].format.kv_heads == heads
    assert stores[0][0].encoded(0) == stores[1][0].encoded(0) > 0
    error = float((got - wanted).norm() / wanted.norm())
    agree = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
    # Processes that work together do not record graphs.
    options = OPTIONS | {"budget": 1.0}
    texts = [
        selfindex.generate(model, ids[:, :PROMPT], max_new_tokens=30, eos_token_id=[], **options)
        for model in (split, whole)
    ]
    assert torch.equal(*texts)
    # Every process holds its heads: the bytes of all of them together are those of one.
    pages = torch.tensor([sum(s.memory().payload for s in stores[0])], device=device)
    dist.all_reduce(pages)
    assert abs(int(pages) - sum(s.memory().payload for s in stores[1])) <= 256 * world * len(stores[0]) * 8
    if rank == 0:
        print(f"{world} processes on {device.type}: relative error {error:.1e}, same next token {agree:.3f}")
    assert error < 0.02, error
    assert agree > 0.98, agree
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
