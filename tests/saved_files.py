"""Files of saved caches, written again with other content."""

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def read(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def rewrite(path, change=None, **metadata):
    """Write a file again with other metadata, or with changed tensors."""
    tensors, meta = read(path)
    if change:
        change(tensors)
    save_file(tensors, path, metadata=meta | metadata)


def forge(path, change, version=None):
    """Write a file again with a changed header and tensors, and with the checksums that they need."""
    tensors, meta = read(path)
    meta = meta if version is None else meta | {"version": version}
    header = json.loads(meta["header"])
    change(header, tensors)
    for name, x in tensors.items():
        found = ""
        if x.numel():
            found = hashlib.sha256(x.contiguous().view(torch.uint8).numpy().data).hexdigest()
        header["tensors"][name] = [str(x.dtype), list(x.shape), found]
    for name in header["tensors"].keys() - tensors.keys():
        del header["tensors"][name]
    text = json.dumps(header)
    checksum = hashlib.sha256(f"{meta['format']} {meta['version']} {text}".encode()).hexdigest()
    save_file(tensors, path, metadata=meta | {"header": text, "checksum": checksum})


def as_version_2(path):
    """Write a file of today as releases wrote it whose rows measured one balance together."""

    def older(header, tensors):
        del header["others"]
        for numbers in header["layers"]:
            own = f"layers.{numbers['layer']}"
            seen = numbers["queries_seen"]
            tensors[f"{own}.query_square"] = tensors[f"{own}.query_square"].sum(0)
            numbers["queries_seen"] = sum(seen)
            del numbers["shared"]
            if header["options"]["preset"] == "balanced":
                numbers["has_constants"] = [False] * len(seen)
                if f"{own}.constants" in tensors:
                    tensors[f"{own}.constants"] = tensors[f"{own}.constants"][:1].clone()

    forge(path, older, "2")
