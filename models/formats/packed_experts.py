"""gpt-oss's tensors of experts: gate and up are one, row by row in turn; matrices are in MXFP4 or transposed.

MXFP4 (Open Compute Project, Microscaling Formats 1.0): 32 numbers share a power of two, each has 4 bits. A
matrix NAME of all experts is then NAME_blocks, uint8 (E, out, in / 32, 16), two numbers in a byte, the first
in its lower half, and NAME_scales, uint8 (E, out, in / 32), exponents plus 127. As plain numbers it is
(E, in, out).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

PACKED = re.compile(r"(.*\.experts\.(gate_up|down)_proj)(_blocks|_scales|_bias)?")
NUMBERS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Of the 16 codes: sign, two bits of exponent, one of mantissa."""
_PAIRS = NUMBERS[np.arange(256)[:, None] >> np.array([0, 4]) & 15]  # of a byte


def unpacked(tensors: Mapping[str, Any], lost: Collection[str]) -> tuple[dict[str, Any], set[str], list[str]]:
    """The tensors of a checkpoint with those of experts as other families store them, one of each matrix.

    What gate and up are made of is called NAME/gate and NAME/up.

    Args:
        tensors: file by name of a tensor, as `safetensors.safe_open` gives it.
        lost: names of tensors that belong to the checkpoint and cannot be read.

    Returns:
        The file by name, where tensors of experts are files of their own; what is lost, by the new names
        too; and what is wrong with blocks and scales.
    """
    found, problems, lost = {}, [], {*lost}
    for name, file in tensors.items():
        match = PACKED.fullmatch(name)
        if match is None:
            found[name] = file
            continue
        base, kind, ending = match.groups()
        if ending == "_scales":
            if f"{base}_blocks" not in tensors:
                problems.append(f"unexpected: {name} without {base}_blocks")
        elif ending == "_blocks":
            problem = _problem(tensors, base, lost)
            if problem:
                problems.append(problem)
                lost.add(name)
            elif f"{base}_scales" in tensors:
                found |= _parts(base, kind, _Quantized(tensors, base))
        else:
            found |= _parts(name, kind, _Plain(file, name))
    return found, lost | {made for name in lost for made in _made_of(name)}, problems


def dequantize(
    blocks: UInt8[np.ndarray, "*rows groups 16"], scales: UInt8[np.ndarray, "*rows groups"]
) -> Float[np.ndarray, "*rows columns"]:
    """The numbers of MXFP4, float32."""
    numbers = _PAIRS[blocks].reshape(*scales.shape, 32)
    numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


class _Plain:
    """A tensor of plain numbers, its matrices as (out, in)."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        shape = file.get_slice(name).get_shape()
        self.shape = (shape[0], *shape[:0:-1]) if len(shape) == 3 else tuple(shape)
        self.dtype = file.get_slice(name).get_dtype()

    def rows(self, chosen: slice) -> np.ndarray:
        array = self._file.get_tensor(self._name)
        return (array.swapaxes(1, 2) if array.ndim == 3 else array)[:, chosen]


class _Quantized:
    """A tensor in MXFP4; what comes out is float32."""

    dtype = "F32"

    def __init__(self, tensors: Mapping[str, Any], base: str):
        self._stored = [(tensors[name], name) for name in (f"{base}_blocks", f"{base}_scales")]
        file, name = self._stored[1]
        *rows, groups = file.get_slice(name).get_shape()
        self.shape = (*rows, 32 * groups)

    def rows(self, chosen: slice) -> np.ndarray:
        return dequantize(*(file.get_tensor(name)[:, chosen] for file, name in self._stored))


@dataclass(frozen=True)
class _Part:
    """Some rows of a tensor, as a file that holds nothing else."""

    of: _Plain | _Quantized
    chosen: slice

    def get_slice(self, _: str) -> "_Part":
        return self

    def get_shape(self) -> list[int]:
        experts, rows, *columns = self.of.shape
        return [experts, len(range(rows)[self.chosen]), *columns]

    def get_dtype(self) -> str:
        return self.of.dtype

    def get_tensor(self, _: str) -> np.ndarray:
        return self.of.rows(self.chosen)


def _parts(name: str, kind: str, of: _Plain | _Quantized) -> dict[str, _Part]:
    return {made: _Part(of, chosen) for made, chosen in _chosen_of(name, kind).items()}


def _chosen_of(name: str, kind: str) -> dict[str, slice]:
    if kind == "down":
        return {name: slice(None)}
    return {f"{name}/gate": slice(0, None, 2), f"{name}/up": slice(1, None, 2)}


def _made_of(name: str) -> list[str]:
    """The names of what a stored tensor of experts is needed for."""
    match = PACKED.fullmatch(name)
    if match is None:
        return []
    base, kind, ending = match.groups()
    return [*_chosen_of(name if ending == "_bias" else base, kind)]


def _problem(tensors: Mapping[str, Any], base: str, lost: Collection[str]) -> str | None:
    """What is wrong with blocks and their scales."""
    blocks, scales = f"{base}_blocks", f"{base}_scales"
    if scales not in tensors:
        return None if scales in lost else f"missing: {scales}, of {blocks}"
    stored = [tensors[name].get_slice(name) for name in (blocks, scales)]
    shapes, kinds = [each.get_shape() for each in stored], [each.get_dtype() for each in stored]
    if kinds != ["U8", "U8"]:
        return f"unsupported quantisation: {blocks} is {kinds[0]} and {scales} {kinds[1]}, MXFP4 is U8"
    if len(shapes[0]) != 4 or shapes[0] != [*shapes[1], 16]:
        return f"wrong shape: {blocks} is {tuple(shapes[0])}, {scales} needs {(*shapes[1], 16)}"
    return None
