"""Weights that bitsandbytes saved in NF4: which tensors of a checkpoint belong to them, their codes, scales and values.

For a weight `W` a checkpoint holds (bitsandbytes.functional.QuantState.as_dict, packed):
    W                                  codes, two a byte, the first in the high half: the flattened weight
    W.quant_map                        float32 [16], the values of the codes
    W.absmax                           a scale per block of 64: float32; doubly quantised: uint8, and then also
    W.nested_absmax, W.nested_quant_map   float32 [blocks / nested_blocksize] and [256]
    W.quant_state.bitsandbytes__nf4    JSON: quant_type, blocksize, dtype, shape, nested_blocksize, nested_offset
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import _C, ops
from .errors import StoreError
from .safetensors_io import TensorInfo, safetensors_dtype

FORMAT = "nf4"
_STATE = "quant_state.bitsandbytes__"
_PART = re.compile(
    r"^(?P<weight>.+)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

ReadTensor = Callable[[str], torch.Tensor]  # by key


def is_bitsandbytes(quantization_config: Any) -> bool:
    """Whether a config.json's quantization_config is bitsandbytes'."""
    return isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "bitsandbytes"


@cache
def _nf4_map() -> torch.Tensor:
    """The values of the 16 codes, float32."""
    codes = torch.zeros(1, _C.code_bytes(FORMAT, 16), dtype=torch.uint8)
    codes[0, :8] = torch.tensor([(2 * i << 4) + 2 * i + 1 for i in range(8)], dtype=torch.uint8)
    return ops.dequantize_blocks(codes, torch.ones(1, 1), 16, FORMAT)[0]


@dataclass(frozen=True)
class PackedWeight:
    """One such weight.

    Attributes:
        key, shape: of the weight. dtype: what it was quantised from, and is decoded to.
        file: where its codes stand.
        nested_blocksize, nested_offset: of doubly quantised scales; None otherwise.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    nested_blocksize: int | None
    nested_offset: float | None

    @property
    def info(self) -> TensorInfo:
        """The decoded weight as if it stood in the checkpoint; it has no place in the file."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return TensorInfo(self.file, safetensors_dtype(self.dtype), self.shape, -1, size)

    def encoded(self, read: ReadTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """codes uint8 [ceil(n / 2)] and absmax float32 [ceil(n / 64)] of the flattened weight of n elements.

        Doubly quantised scales are decoded as bitsandbytes does: nested_quant_map[code] * nested_absmax of its block,
        + nested_offset, each rounded to fp32.

        Raises StoreError for another table than NF4's, and for scales that are not finite.
        """
        if not torch.equal(read(f"{self.key}.quant_map"), _nf4_map()):
            raise StoreError(f"{self.key}.quant_map: expected the values of NF4")
        absmax = read(f"{self.key}.absmax")
        if self.nested_blocksize is not None:
            scales = read(f"{self.key}.nested_absmax").repeat_interleave(self.nested_blocksize)[: absmax.numel()]
            absmax = read(f"{self.key}.nested_quant_map")[absmax.flatten().long()] * scales
            absmax += torch.tensor(self.nested_offset, dtype=torch.float32)
        if not bool(torch.isfinite(absmax).all()):
            raise StoreError(f"{self.key}.absmax: scales that are not finite")
        return read(self.key).contiguous().view(torch.uint8).flatten(), absmax.flatten()

    def decode(self, read: ReadTensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight: value of the code * absmax in fp32, rounded once to `dtype`. Raises as `encoded`."""
        codes, absmax = self.encoded(read)
        block = _C.BLOCK_SIZE
        whole = torch.zeros(len(absmax), block // 2, dtype=torch.uint8)
        whole.view(-1)[: len(codes)] = codes
        weight = ops.dequantize_blocks(whole, absmax[:, None], block, FORMAT, dtype)
        return weight.flatten()[: math.prod(self.shape)].view(self.shape)


def find_packed(tensors: Mapping[str, TensorInfo], read: ReadTensor) -> tuple[dict[str, PackedWeight], set[str]]:
    """The NF4 weights among a checkpoint's tensors, by key, and the keys of the tensors that belong to them.

    Reads each weight's quant_state.

    Raises StoreError naming the tensor for one that is missing, damaged or of another size than its weight needs; for
    other types than NF4, other block sizes than 64, and 8-bit weights; and when there is no NF4 weight.
    """
    parts: dict[str, set[str]] = {}
    for key in tensors:
        if key.endswith(".SCB"):
            raise StoreError(f"{key}: bitsandbytes' 8-bit weights; only NF4 can be imported")
        if match := _PART.match(key):
            parts.setdefault(match["weight"], set()).add(match["part"])
    if not parts:
        raise StoreError("bitsandbytes in quantization_config, but no weight in NF4; only NF4 can be imported")
    packed = {key: _packed_weight(key, found, tensors, read) for key, found in parts.items()}
    return packed, {f"{key}.{part}" for key, found in parts.items() for part in found}


def _packed_weight(key: str, parts: set[str], tensors: Mapping[str, TensorInfo], read: ReadTensor) -> PackedWeight:
    states = [part for part in parts if part.startswith(_STATE)]
    if not states:
        raise StoreError(f"{key}: its {_STATE}{FORMAT} is missing")
    if states != [_STATE + FORMAT]:
        raise StoreError(f"{key}: {', '.join(part.removeprefix(_STATE) for part in sorted(states))}; expected {FORMAT}")
    try:
        state = json.loads(bytes(read(f"{key}.{_STATE}{FORMAT}").tolist()))
        quant_type, block, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
        dtype = _DTYPES[state["dtype"]]
        nested = state.get("nested_blocksize")
        offset = None if nested is None else float(state["nested_offset"])
        counts = [*shape, 1 if nested is None else nested]
        sane = all(isinstance(size, int) and size > 0 for size in counts) and math.isfinite(offset or 0.0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{key}.{_STATE}{FORMAT}: damaged ({error!r})") from error
    if not sane:
        raise StoreError(f"{key}.{_STATE}{FORMAT}: damaged ({state})")
    if quant_type != FORMAT or block != _C.BLOCK_SIZE:
        raise StoreError(
            f"{key}: {quant_type} with blocks of {block}; only {FORMAT} with blocks of {_C.BLOCK_SIZE} can be imported"
        )
    count = math.prod(shape)
    num_blocks = -(-count // block)
    expected = {"quant_map": ("F32", 16), "absmax": ("F32", num_blocks)}
    if nested is not None:
        expected |= {"absmax": ("U8", num_blocks), "nested_quant_map": ("F32", 256)}
        expected["nested_absmax"] = ("F32", -(-num_blocks // nested))
    if key not in tensors:
        raise StoreError(f"{key}: its codes are missing")
    num_bytes = -(-count // 2)
    if tensors[key].num_bytes != num_bytes:
        raise StoreError(f"{key}: {tensors[key].num_bytes} bytes of codes; its shape {list(shape)} needs {num_bytes}")
    for part, (name, size) in expected.items():
        found = tensors.get(f"{key}.{part}")
        if found is None:
            raise StoreError(f"{key}.{part} is missing")
        if found.dtype != name or math.prod(found.shape) != size:
            raise StoreError(f"{key}.{part}: {found.dtype} {list(found.shape)}; expected {name} [{size}]")
    return PackedWeight(key, shape, dtype, tensors[key].file, nested, offset)
