"""Reading values out of pickled files without running anything of them.

A pickle is a program, and Python's own reader calls whatever the program names. Here its instructions are followed on
values alone: dicts, lists, tuples, numbers, strings, numpy numbers, and tensors of a zipped torch file. Anything else
that a file names stays an inert `Opaque` that is never imported, called or set up.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scldm_cd4._errors import CheckpointError

MAX_PROGRAM = 256 * 2**20
"""The largest pickled program, in bytes, that is followed."""
MAX_STORED = 64 * 2**30
"""The most bytes of tensors that a file may ask for."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Opaque:
    """Something that a file names and that is not looked into."""

    name: str


class _Mark:
    """The beginning of a group of values on the stack."""


_DICTS = ("collections OrderedDict", "collections defaultdict", "builtins dict")
_NUMPY_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"


def read_numbers(path: str | Path) -> dict[str, Any]:
    """Read a pickled dict of numbers, or a dict of such dicts.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or holds anything else.
    """
    path = Path(path)
    value = _Reader(_bytes(path), str(path)).run()
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds no dict of numbers")

    def checked(values: dict[Any, Any], nested: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, item in values.items():
            if isinstance(item, dict) and nested:
                item = checked(item, False)
            elif isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
                what = item.name if isinstance(item, Opaque) else type(item).__name__
                raise CheckpointError(f"{path} holds {what!r} at {key!r}, where a number is expected")
            if not isinstance(key, str):
                raise CheckpointError(f"{path} has the key {key!r}, where a string is expected")
            out[key] = item if isinstance(item, dict) else float(item)
        return out

    return checked(value, True)


def read_lightning(path: str | Path) -> dict[str, Tensor]:
    """Read the ``state_dict`` of a Lightning checkpoint; optimisers, settings and callbacks stay unread.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, of torch's format before 1.6, or has no ``state_dict`` of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1:
                raise CheckpointError(f"{path} is no checkpoint of torch: it has {len(names)} data.pkl")
            if archive.getinfo(names[0]).file_size > MAX_PROGRAM:
                raise CheckpointError(f"{path} describes its values in more than {MAX_PROGRAM} bytes")
            storages = _Storages(archive, names[0].removesuffix("data.pkl"), path)
            value = _Reader(archive.read(names[0]), str(path), storages).run()
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint of torch (a zip file): {error}") from error
    state = value.get("state_dict") if isinstance(value, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no state_dict")
    if other := [key for key, item in state.items() if not isinstance(item, Tensor)]:
        raise CheckpointError(f"{path}: these are no tensors: {', '.join(sorted(other)[:5])}")
    return dict(state)


class _Storages:
    """Numbers of a zipped torch file, by storage."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        self.archive, self.root, self.path = archive, root, path
        self.read: dict[str, Tensor] = {}
        self.total = 0
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not read")

    def __call__(self, reference: Any) -> Tensor:
        """Return the storage, flat, that a persistent id names: ("storage", type, key, location, number)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise CheckpointError(f"{self.path} refers to something that is no storage")
        kind, key, number = reference[1], reference[2], reference[4]
        dtype = STORAGES.get(kind.name.removeprefix("torch ")) if isinstance(kind, Opaque) else None
        if dtype is None or not isinstance(key, str) or not isinstance(number, int) or number < 0:
            raise CheckpointError(f"{self.path} has a storage of a kind that is not read: {kind}")
        if key not in self.read:
            info = self.archive.getinfo(f"{self.root}data/{key}")
            self.total += info.file_size
            if info.file_size != number * dtype.itemsize or self.total > MAX_STORED:
                raise CheckpointError(f"{self.path} is damaged: storage {key!r} has {info.file_size} bytes")
            data = bytearray(self.archive.read(info))  # checks the checksum of the zip file
            self.read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.read[key]


class _Reader:
    """Follows the instructions of one pickled program."""

    def __init__(self, program: bytes, path: str, storages: Callable[[Any], Tensor] | None = None) -> None:
        self.program, self.path, self.storages = program, path, storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the value that the program makes."""
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(self.program)):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{self.path} is damaged, or no pickled file: {error}") from error
        raise CheckpointError(f"{self.path} is damaged: it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                member, module = stack.pop(), stack.pop()
                argument = f"{module} {member}"
            stack.append(Opaque(argument))
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._group()
        elif name in _COLLECTORS:
            stack.append(_COLLECTORS[name](self._group()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        else:
            self._change(name, argument)

    def _change(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._group()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._group()
            if isinstance(stack[-1], dict):
                stack[-1].update(_pairs(items))
        elif name == "BINPERSID":
            if self.storages is None:
                raise CheckpointError(f"{self.path} refers to data outside itself")
            stack[-1] = _Storage(self.storages, stack[-1])
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, made = stack.pop(), stack.pop()
            stack.append(self._make(made, arguments))
        elif name == "NEWOBJ_EX":
            stack[-3:] = [Opaque(str(stack[-3]))]
        elif name == "BUILD":
            stack.pop()
        else:
            raise CheckpointError(f"{self.path} uses {name}, which a file of plain values does not")

    def _group(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if isinstance(value, _Mark))
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _make(self, made: Any, arguments: Any) -> Any:
        name = made.name if isinstance(made, Opaque) else ""
        if name in _DICTS:
            return {}
        if name == "numpy dtype":
            return Opaque(f"dtype {arguments[0]}")
        if name in _NUMPY_SCALARS:
            dtype = np.dtype(arguments[0].name.removeprefix("dtype ")).newbyteorder("<")
            if dtype.kind not in "fiu":
                raise CheckpointError(f"{self.path} holds a numpy value of kind {dtype}, which is no number")
            return np.frombuffer(arguments[1], dtype=dtype, count=1)[0].item()
        if name == "_codecs encode" and arguments[1] == "latin1":  # how protocol 2 writes bytes
            return arguments[0].encode("latin1")
        if name == _TENSOR:
            storage, offset, size, stride = arguments[:4]
            return torch.as_strided(storage.read(), size, stride, offset)
        if name == _PARAMETER:
            return arguments[0]
        return Opaque(name)


@dataclass(frozen=True)
class _Storage:
    """A storage that is read where a tensor needs it."""

    find: Callable[[Any], Tensor]
    reference: Any

    def read(self) -> Tensor:
        return self.find(self.reference)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": _Mark,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_LITERALS = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ]
)
_COLLECTORS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": list,
    "DICT": lambda items: _pairs(items),
}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.stat().st_size > MAX_PROGRAM:
        raise CheckpointError(f"{path} is larger than the {MAX_PROGRAM} bytes that such a file may have")
    return path.read_bytes()
