"""A file belongs to the weights that filled it, wherever they are and whatever was put on top of them."""

import copy

import accelerate
import pytest
import torch
from decoded_cache import small_cache
from peft import LoraConfig, get_peft_model
from tiny_models import forward, make_model, prompt
from torch.utils._python_dispatch import return_and_correct_aliasing

from selfindex import FormatError, SelfIndexCache, StateError
from selfindex.integrations.transformers.fingerprint import fingerprint

OTHER = "another model"


def adapted(*names, **options):
    """(PEFT's model, the model inside it); the first adapter acts."""
    options = {"r": 4, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False} | options
    outer = get_peft_model(make_model("llama"), LoraConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        outer.add_adapter(name, LoraConfig(**options))
    outer.set_adapter(names[0])
    return outer.eval(), outer.get_base_model()


def weight(model, name="layers.1.mlp.down_proj.weight"):
    return model.get_submodule("model").get_parameter(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda outer: outer.set_adapter("B"),
        lambda outer: outer.base_model.disable_adapter_layers(),
        lambda outer: outer.base_model.set_adapter(["A", "B"]),
        lambda outer: outer.base_model.model.model.layers[1].self_attn.v_proj.set_scale("A", 0.5),
        lambda outer: outer.merge_adapter(["A"]),
        lambda outer: outer.get_parameter(
            "base_model.model.model.layers.0.self_attn.k_proj.lora_B.A.weight"
        ).data.mul_(1.01),
    ],
    ids=["switched", "off", "two", "scaling", "merged", "trained"],
)
def test_a_prefix_of_one_adapter_is_refused_under_another(change, tmp_path):
    outer, model = adapted("A", "B")
    cache = small_cache(model)
    forward(model, prompt(30), cache)
    cache.save(model, tmp_path / "prefix")
    SelfIndexCache.load(model, tmp_path / "prefix")
    change(outer)
    with pytest.raises(FormatError, match=OTHER):
        SelfIndexCache.load(model, tmp_path / "prefix")


def test_adapters_that_do_not_act_and_their_names_do_not_count():
    outer, model = adapted("A", "B")
    with outer.disable_adapter():
        assert fingerprint(model) == fingerprint(make_model("llama"))
    _, renamed = adapted("default")
    for name, x in renamed.named_parameters():
        x.data.copy_(model.get_parameter(name.replace("default", "A")))
    assert fingerprint(renamed) == fingerprint(model)
    plain = copy.deepcopy(outer).merge_and_unload()
    outer.merge_adapter(["A"])
    assert fingerprint(model) == fingerprint(plain)


def test_modules_that_an_adapter_replaces():
    _, model = adapted("A", modules_to_save=["embed_tokens"])
    before = fingerprint(model)
    model.model.embed_tokens.original_module.weight.data.add_(1)
    assert fingerprint(model) == before
    model.model.embed_tokens.modules_to_save["A"].weight.data.add_(1)
    assert fingerprint(model) != before


def test_a_live_cache_is_refused_under_another_adapter(tmp_path):
    outer, model = adapted("A", "B")
    cache = small_cache(model, budget=9)
    forward(model, prompt(30), cache)
    fork = cache.fork()
    outer.set_adapter("B")
    for new in (1, 3):
        with pytest.raises(StateError, match=r"with the adapter A, the model now runs with the adapter B"):
            forward(model, prompt(new), cache)
    with pytest.raises(StateError, match="adapter A"):
        fork.save(model, tmp_path / "prefix")
    # Nothing was changed, and an empty cache takes whatever acts.
    outer.set_adapter("A")
    assert torch.equal(forward(model, prompt(3), cache), forward(model, prompt(3), fork))
    outer.set_adapter("B")
    cache.reset()
    forward(model, prompt(30), cache)
    forward(model, prompt(1), cache)


def test_a_live_cache_notices_an_adapter_put_on_later():
    model = make_model("gemma3")
    cache = small_cache(model, budget=9)
    forward(model, prompt(30), cache)
    held = [layer.get_seq_length() for layer in cache.layers]
    get_peft_model(model, LoraConfig(target_modules=["k_proj"]))
    with pytest.raises(StateError, match="without an adapter, the model now runs with the adapter default"):
        forward(model, prompt(2), cache)
    # Before any layer ran, so that those with a sliding window have not moved on.
    assert [layer.get_seq_length() for layer in cache.layers] == held


def test_a_live_cache_notices_training():
    model = make_model("llama")
    cache = small_cache(model)
    forward(model, prompt(30), cache)
    with torch.no_grad():
        weight(model).mul_(1.001)
    with pytest.raises(StateError, match="weights were written"):
        forward(model, prompt(2), cache)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_every_weight_below_the_head_counts(family):
    model = make_model(family)
    before = fingerprint(model)
    for name, x in model.named_parameters():
        old, flat = x[..., -1:].detach().clone(), x.data.view(-1)
        with torch.no_grad():
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
            x.add_(0)  # PyTorch counts this write, where it does not count one through `data`
        assert (fingerprint(model) == before) == name.startswith("lm_head"), name
        with torch.no_grad():
            x[..., -1:].copy_(old)
    assert fingerprint(model) == before


def test_rows_that_change_places_count():
    model = make_model("llama")
    before, x = fingerprint(model), weight(model, "embed_tokens.weight")
    with torch.no_grad():
        x.copy_(x.flip(0))
    assert fingerprint(model) != before


@pytest.mark.parametrize("write", ["load_state_dict", "replaced", "data", "inference_mode"])
def test_what_is_remembered_is_given_up_when_weights_change(write):
    with torch.inference_mode(write == "inference_mode"):
        model, other = make_model("llama"), make_model("llama", seed=1)
    before = fingerprint(model)
    assert fingerprint(model) == before
    x, y = weight(model), weight(other)
    with torch.inference_mode(write == "inference_mode"):
        if write == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif write == "replaced":
            x.data = y.data
        else:
            x.data.mul_(1.001)
    now = fingerprint(model)
    assert now != before
    assert now == fingerprint(copy.deepcopy(model))


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"rms_norm_eps": 1e-5},
    ],
)
def test_options_that_change_keys_count(options):
    model, other = make_model("llama"), make_model("llama", **options)
    other.load_state_dict(model.state_dict())
    assert fingerprint(model) != fingerprint(other)


def test_options_that_do_not_change_keys_do_not_count():
    model = make_model("llama")
    before = fingerprint(model)
    model.config.use_cache, model.config.pad_token_id, model.config.name_or_path = False, 5, "elsewhere"
    model.config.an_option_of_a_later_release = None
    assert fingerprint(model) == before


def test_layout_and_ties_do_not_count():
    model, tied = make_model("llama"), make_model("llama", tie_word_embeddings=True)
    tied.load_state_dict(model.state_dict() | {"lm_head.weight": model.model.embed_tokens.weight})
    before = fingerprint(model)
    assert fingerprint(tied) == before
    x = weight(model)
    x.data = x.data.T.contiguous().T
    assert fingerprint(model) == before
    # Views into one large buffer need not begin at a whole word.
    x.data = torch.cat((torch.zeros(1), x.data.flatten()))[1:].view(x.shape)
    assert fingerprint(model) == before
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert fingerprint(model) == before


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_weights_are_read_where_they_are(where, tmp_path):
    model, other = (make_model("llama", seed=seed).to(torch.bfloat16) for seed in (0, 1))
    wanted = [fingerprint(x) for x in (model, other)]
    for i, x in enumerate((model, other)):
        if where == "disk":
            accelerate.disk_offload(x, tmp_path / str(i), execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(x, execution_device=torch.device("cpu"))
        assert weight(x).is_meta
    assert [fingerprint(x) for x in (model, other)] == wanted
    # A step puts weights in place and takes them away again.
    cache = small_cache(model)
    for new in (30, 2, 1):
        forward(model, prompt(new), cache)
    assert [fingerprint(x) for x in (model, other)] == wanted
    cache.save(model, tmp_path / "prefix")
    assert SelfIndexCache.load(model, tmp_path / "prefix").get_seq_length() == 33


def test_weights_that_are_nowhere_are_refused(tmp_path):
    model = make_model("llama")
    cache = small_cache(model)
    forward(model, prompt(30), cache)
    with pytest.raises(StateError, match="meta device"):
        cache.save(model.to("meta"), tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


class Scaled(torch.Tensor):
    """Stands for the quantised weights of other libraries: a tensor made of packed bytes and scales."""

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(**inner)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [{n: function(getattr(x, n)) for n in ("packed", "scale")} for x in args]
        return return_and_correct_aliasing(function, args, kwargs or {}, Scaled(**inner[0]))


@pytest.mark.parametrize("kind", ["buffers", "bytes", "subclass", "beside"])
@pytest.mark.parametrize("part", ["packed", "scale"])
def test_quantised_weights_count_with_their_scales(kind, part):
    model = make_model("llama")
    layer, parts = model.model.layers[1].mlp.down_proj, {"packed": torch.arange(15, dtype=torch.uint8)}
    parts["scale"] = torch.ones(15)
    if kind == "buffers":
        del layer.weight
        for name, x in parts.items():
            layer.register_buffer(name, x)
    elif kind == "subclass":
        layer.weight = torch.nn.Parameter(Scaled(**parts), requires_grad=False)
    else:
        layer.weight = torch.nn.Parameter(parts["packed"], requires_grad=False)
        if kind == "beside":
            inner = type("State", (), {})()
            inner.absmax = parts["scale"]
            layer.weight.quant_state = type("State", (), {})()
            layer.weight.quant_state.code, layer.weight.quant_state.state2 = torch.ones(3), inner
        else:
            layer.register_parameter("scale", torch.nn.Parameter(parts["scale"]))
            parts["scale"] = layer.scale.data
    before = fingerprint(model)
    parts[part][7] += 1
    assert fingerprint(model) != before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_does_not_count(dtype):
    model = make_model("llama").to(dtype)
    before = fingerprint(model)
    assert fingerprint(model.cuda()) == before
