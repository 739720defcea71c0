"""A file that is not what `save` wrote, or could not have written, is refused."""

import re

import pytest
import torch
from decoded_cache import small_cache
from saved_files import forge, rewrite
from tiny_models import forward, pair, prompt

from selfindex import FormatError, SelfIndexCache
from selfindex.codec import PageFormat


@pytest.fixture(params=["balanced", "paper"])
def preset(request):
    return request.param


@pytest.fixture
def saved(tmp_path, preset):
    """(model, file): two rows, one of them with padding; a page that `crop` cut between whole ones."""
    _, ours = pair("llama")
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[1, :3] = 0
    cache = small_cache(ours, preset=preset)
    forward(ours, prompt(45, batch=2), cache, mask)
    forward(ours, prompt(20, batch=2), cache, torch.cat((mask, mask.new_ones(2, 20)), 1))
    cache.crop(50)
    forward(ours, prompt(30, batch=2), cache, torch.cat((mask, mask.new_ones(2, 35)), 1))
    cache.save(ours, tmp_path / "prefix")
    return ours, tmp_path / "prefix"


def refused(model, path, match):
    with pytest.raises(FormatError, match=match):
        SelfIndexCache.load(model, path)


@pytest.mark.parametrize("preset", ["balanced"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot read"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "cannot read"),
        (lambda path: path.write_bytes(b"not a cache"), "cannot read"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: rewrite(path, version="1"), r"version 1, this release reads versions 2, 3, 4"),
        (lambda path: rewrite(path, format="selfindex-profile"), "is not a file of"),
        (lambda path: rewrite(path, header="{"), "header of"),
        (lambda path: rewrite(path, checksum="0"), "header of"),
        (lambda path: rewrite(path, lambda t: t["layers.1.index"][0].add_(1)), "1.index is missing"),
        (lambda path: rewrite(path, lambda t: t.pop("layers.0.keys")), "0.keys is missing"),
        (lambda path: rewrite(path, lambda t: t.update(more=torch.ones(1))), "more is missing"),
        (
            lambda path: rewrite(path, lambda t: t.update(other=t.pop("layers.0.keys"))),
            "is missing or not what",
        ),
        (
            # The same bytes as another type, and in another shape.
            lambda path: rewrite(path, lambda t: t.update(columns=t["columns"].view(torch.uint8))),
            "columns is missing",
        ),
        (
            lambda path: rewrite(path, lambda t: t.update(columns=t["columns"].view(-1, 2))),
            "columns is missing",
        ),
    ],
)
def test_a_wrong_file_is_refused(saved, damage, message):
    damage(saved[1])
    refused(*saved, message)


def test_any_changed_digit_of_the_header_is_refused(saved):
    model, path = saved
    SelfIndexCache.load(model, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    # Every digit would take minutes: one of each run of digits in what is before the checksums.
    digits = [8 + found.start() for found in re.finditer(rb"[0-9]+", raw[8 : 8 + size])]
    for at in digits[:: max(1, len(digits) // 150)]:
        changed = bytearray(raw)
        changed[at] = ord("1") if raw[at] != ord("1") else ord("2")
        path.write_bytes(changed)
        refused(model, path, ".")


def layer(change):
    """A forged number in the last layer, or a forged tensor there by its short name."""

    def forged(header, tensors):
        numbers = header["layers"][1]
        own = {n.removeprefix("layers.1."): x for n, x in tensors.items() if n.startswith("layers.1.")}
        change(numbers, own)
        for name in [n for n in tensors if n.startswith("layers.1.")]:
            del tensors[name]
        tensors |= {f"layers.1.{n}": x.contiguous() for n, x in own.items()}

    return forged


def first_row(name, place, value):
    return layer(lambda n, t: n["rows"][0][name].__setitem__(place, value))


def page_counts(numbers, tensors):
    return PageFormat.parse(numbers["format"]).count(tensors["index"])


FORGED = {
    "too many tokens in a page": first_row("counts", 1, 9),
    "no tokens in a page": first_row("counts", 1, 0),
    "a count that is no integer": first_row("counts", 1, 8.0),
    "more tokens than were encoded": layer(lambda n, t: page_counts(n, t).sub_(1)),
    "more tokens in a page than it has": layer(lambda n, t: page_counts(n, t).fill_(9)),
    "a block beyond the pool": first_row("blocks", 0, 10**6),
    "a negative block": first_row("blocks", 0, -1),
    "a block twice": layer(lambda n, t: n["rows"][0]["blocks"].__setitem__(0, n["rows"][0]["blocks"][1])),
    "a page without a count": layer(lambda n, t: n["rows"][0]["counts"].pop()),
    "pages of nobody": layer(
        lambda n, t: t.update({k: torch.cat((t[k], t[k])) for k in ("index", "payload")})
    ),
    "lengths beyond the tensors": layer(lambda n, t: n["lengths"].__setitem__(0, 10**6)),
    "negative lengths": layer(lambda n, t: n["lengths"].__setitem__(1, -1)),
    "fewer tokens than the tensors": layer(lambda n, t: n.update(lengths=[4, 4])),
    "a row too few": layer(lambda n, t: n["rows"].pop()),
    "a prompt longer than the row": layer(lambda n, t: n["prompt_tokens"].__setitem__(0, 10**6)),
    "constants that are not there": layer(lambda n, t: t.pop("constants")),
    "constants of whom": layer(lambda n, t: n["has_constants"].__setitem__(0, 1)),
    "no queries": layer(lambda n, t: n["queries_seen"].__setitem__(1, -1)),
    "queries of nobody": layer(lambda n, t: n["queries_seen"].append(1)),
    "constants in common that are not": layer(lambda n, t: n.update(shared=True)),
    "constants that may be in common": layer(lambda n, t: n.update(shared=1)),
    "constants of one row": layer(lambda n, t: t.update(constants=t["constants"][:1])),
    "another format": layer(lambda n, t: n.update(format="balanced-1:h2,d64,p16,v2")),
    "other columns": layer(lambda n, t: n.update(columns=79)),
    "columns that are no integer": lambda h, t: [x.update(columns=True) for x in h["layers"]],
    "a layer twice": lambda h, t: h["layers"].append(h["layers"][0]),
    "no layers": lambda h, t: h.update(layers=[]),
    "layers that are numbers": lambda h, t: h.update(layers=[1, 2]),
    "layers in another order": lambda h, t: h["layers"].reverse(),
    "other padding": lambda h, t: t["columns"][0].logical_not_(),
    "padding of another row": lambda h, t: t.update(columns=t["columns"].flip(0).contiguous()),
    "padding too short": lambda h, t: t.update(columns=t["columns"][:, 1:].contiguous()),
    "padding that is forgotten": lambda h, t: t.pop("columns"),
    "a tensor too many": lambda h, t: t.update(more=torch.ones(1)),
    "a tensor too many in a layer": layer(lambda n, t: t.update(more=torch.ones(1))),
    "tokens of another type": layer(lambda n, t: t.update(values=t["values"].half())),
    "tokens that are integers": layer(lambda n, t: t.update({k: t[k].int() for k in ("keys", "values")})),
    "tokens in another shape": layer(lambda n, t: t.update(values=t["values"][:, :, 1:])),
    "pages too small": layer(lambda n, t: t.update(payload=t["payload"][:, :-256])),
    "pages of other types": layer(lambda n, t: t.update(index=t["index"].view(torch.int8))),
    "squares in another shape": layer(lambda n, t: t.update(query_square=t["query_square"][:1])),
    "an option out of range": lambda h, t: h["options"].update(page_size=12),
    "an option of another release": lambda h, t: h["options"].update(speed="high"),
    "an option of another type": lambda h, t: h["options"].update(budget="much"),
    "another model": lambda h, t: h.update(model="0"),
    "no model": lambda h, t: h.pop("model"),
}


def test_numbers_that_do_not_fit_are_refused_even_under_the_right_checksum(saved):
    model, path = saved
    raw, accepted = path.read_bytes(), []
    forge(path, lambda header, tensors: None)
    SelfIndexCache.load(model, path)
    for name, change in FORGED.items():
        path.write_bytes(raw)
        forge(path, change)
        try:
            SelfIndexCache.load(model, path)
        except FormatError:
            continue
        accepted.append(name)
    assert accepted == []
