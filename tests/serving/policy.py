"""The serving policy in plain PyTorch: one sequence at a time, no engine, whole tensors.

A sequence takes the steps (tokens computed, new tokens) that an engine gave a request, and must come to
the same tokens. Pages of equal prefixes are shared as the engine shares them.
"""

from dataclasses import dataclass, field

import torch
from serving.engines import DEVICE
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from selfindex.backends import ops
from selfindex.backends.partial import attend_exact, merge_parts
from selfindex.codec import PageFormat
from selfindex.config import SelfIndexConfig

ENOUGH = 1.0 if DEVICE == "cpu" else 0.97
"""Share of equal tokens in a few requests; a GPU rounds sums of a batch otherwise than those of a row."""
MOST_EQUAL = 0.995 if DEVICE == "cpu" else 0.97
"""Share of equal tokens in many requests: a batch of another size is rounded otherwise on a CPU as well, and
of nearly equal tokens at the edge of a budget another one is then selected."""
CLOSE = 0.8
"""Share of equal tokens in any of many requests."""


@dataclass
class Layer:
    """Raw keys and values [H, n, d] by position, and pages by number."""

    raw: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    pages: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def tokens(self, positions):
        found = [self.raw[p] for p in positions]
        return tuple(torch.stack([x[i] for x in found], 1)[None] for i in (0, 1))


@dataclass
class Sequence:
    """One request: its tokens so far, what its layers hold, and from where on that is in full precision."""

    tokens: list[int]
    layers: dict[int, Layer] = field(default_factory=dict)
    low: int = 0
    done: int = 0


class Policy:
    """Runs sequences of one transformers model.

    Args:
        constants: layer -> those of its pages, [1, H, ...]; ones where missing.
        few: most new tokens of a row that select for themselves.
    """

    def __init__(self, model, config: SelfIndexConfig, constants=None):
        self.model, self.config = model.eval().to(DEVICE), config
        self.constants = {i: one.to(DEVICE) for i, one in (constants or {}).items()}
        self.few = max(1, config.sparse_queries)
        self.shared: dict[tuple, tuple] = {}
        self.current = None
        AttentionInterface.register("serving_policy", self._attend)
        AttentionMaskInterface.register("serving_policy", lambda *args, **kwargs: None)
        model.set_attn_implementation("serving_policy")

    def step(self, sequence, computed, new):
        """Compute `new` tokens behind `computed` ones; append the next token if these were the last."""
        # The engine's operators, and its device: they are compared with the reference elsewhere.
        with torch.inference_mode(), torch.device(DEVICE):
            self._step(sequence, computed, new)

    def _step(self, sequence, computed, new):
        if not new:  # preempted
            sequence.done = -1
            return
        if computed == 0 or computed != sequence.done:  # behind a prefix that was there, or once more
            sequence.layers, sequence.low = {}, 0
            self._evict(sequence, computed)
            self._hit(sequence, computed)
        sequence.done = computed + new
        self.current = sequence, computed
        ids = torch.tensor([sequence.tokens[computed : computed + new]])
        positions = torch.arange(computed, computed + new)[None]
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for i in range(computed // self.config.page_size, (computed + new) // self.config.page_size):
            self._share(sequence, i)
        self.logits = logits[0, -1]
        if computed + new == len(sequence.tokens):
            sequence.tokens.append(int(self.logits.argmax()))

    def _share(self, sequence, page):
        prefix = tuple(sequence.tokens[: (page + 1) * self.config.page_size])
        if prefix not in self.shared:
            self.shared[prefix] = {
                i: (
                    layer.pages[page],
                    {p: layer.raw[p] for p in range(self.config.sinks)} if page == 0 else {},
                )
                for i, layer in sequence.layers.items()
                if layer.pages
            }

    def _evict(self, sequence, computed):
        """Forget pages that a request would have found if they were still there."""
        page = self.config.page_size
        for end in range(computed + page, len(sequence.tokens), page):
            self.shared.pop(tuple(sequence.tokens[:end]), None)

    def _hit(self, sequence, computed):
        sequence.low = computed
        for page in range(computed // self.config.page_size):
            found = self.shared[tuple(sequence.tokens[: (page + 1) * self.config.page_size])]
            for i, (encoded, sinks) in found.items():
                layer = sequence.layers.setdefault(i, Layer())
                layer.pages.append(encoded)
                layer.raw |= sinks

    def _attend(self, module, query, key, value, mask, scaling=None, s_aux=None, **kwargs):
        sequence, computed = self.current
        layer = sequence.layers.setdefault(module.layer_idx, Layer())
        new = query.shape[2]
        for t in range(new):
            layer.raw[computed + t] = key[0, :, t].clone(), value[0, :, t].clone()
        window = getattr(module, "sliding_window", None)
        if window is not None:
            return self._sliding(layer, query, computed, window, scaling, s_aux), None
        page, (heads, dim) = self.config.page_size, (key.shape[1], key.shape[3])
        fmt = PageFormat(self.config.preset, heads, dim, page, self.config.value_bits)
        constants = self.constants.get(module.layer_idx)
        if constants is None:
            constants = torch.ones(1, heads, fmt.constants)
        for i in range(computed // page, (computed + new) // page):
            first = i * page + (self.config.sinks if i == 0 else 0)
            k, v = layer.tokens(range(first, (i + 1) * page))
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, page - x.shape[2])) for x in (k, v))
            counts = torch.tensor([(i + 1) * page - first], dtype=torch.int32)
            del layer.pages[i:]
            layer.pages.append(ops.encode(k, v, counts, constants, fmt.name))
        rest = fmt, constants, scaling, s_aux
        if new > self.few:
            return self._read(sequence, layer, query, computed, computed, True, *rest), None
        parts = [
            self._read(sequence, layer, query[:, :, t : t + 1], computed + t, computed + t + 1, False, *rest)
            for t in range(new)
        ]
        return torch.cat(parts, 1), None

    def _read(self, sequence, layer, query, held, length, dense, fmt, constants, scaling, sink_logit):
        """Attention of queries at positions from `held` on, to tokens before and, causally, to themselves."""
        page, sinks, new = fmt.page_size, self.config.sinks, query.shape[2]
        start = max(0, held - self.config.recent) // page * page
        while start < sequence.low and start + page <= held:
            start += page
        pages = start // page
        front = range(min(sinks, start))
        keys, values = layer.tokens([*front, *range(start, held + new)])
        before = len(front) + held - start
        visible = torch.arange(keys.shape[2]) <= before + torch.arange(new)[:, None]
        parts = [attend_exact(query, keys, values, visible[None, None, None], scaling)]
        if pages:
            index, payload = (torch.cat([p[i] for p in layer.pages[:pages]]) for i in (0, 1))
            table = torch.arange(pages, dtype=torch.int32)[None]
            counts = torch.full_like(table, page)
            counts[0, 0] -= sinks
            pools = query, index, payload, table, counts
            if dense:
                parts.append(ops.dense_attend(*pools, constants, scaling, fmt.name))
            else:
                budget = self.config.budget_tokens(length, start - sinks)
                budgets = torch.tensor([budget], dtype=torch.int32)
                parts.append(ops.sparse_decode(*pools, budgets, budget, constants, scaling, fmt.name))
        return merge_parts(parts, sink_logit).to(query.dtype).transpose(1, 2)

    def _sliding(self, layer, query, computed, window, scaling, sink_logit):
        last = computed + query.shape[2]
        first = max(0, computed - window + 1)
        keys, values = layer.tokens(range(first, last))
        at, own = torch.arange(first, last), torch.arange(computed, last)[:, None]
        visible = (at <= own) & (at > own - window)
        part = attend_exact(query, keys, values, visible[None, None, None], scaling)
        return merge_parts([part], sink_logit).to(query.dtype).transpose(1, 2)


def agreement(model, config, constants, asked, steps, tokens):
    """How many of an engine's tokens the policy chooses too, behind the engine's own tokens before them.

    Args:
        constants: layer -> those of its pages, [1, H, ...].
        asked: request -> token ids of its prompt.
        steps: (request, tokens computed before, new tokens) of every row of every step.
        tokens: request -> token ids of its answer.

    Returns:
        Equal tokens, and tokens compared.
    """
    policy = Policy(model, config, constants)
    sequences = {name: Sequence(list(ids)) for name, ids in asked.items()}
    total = same = 0
    for name, computed, new in (row for step in steps for row in step):
        sequence, before = sequences[name], len(sequences[name].tokens)
        policy.step(sequence, computed, new)
        place = before - len(asked[name])
        if len(sequence.tokens) > before and place < len(tokens[name]):
            total += 1
            same += sequence.tokens[-1] == tokens[name][place]
            sequence.tokens[-1] = tokens[name][place]
    assert total == sum(map(len, tokens.values()))
    return same, total
