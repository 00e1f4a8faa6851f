"""PyTorch's ``.bin`` and ``.pt`` files, read without PyTorch and without running anything that they ask for.

Such a file is an uncompressed zip archive (``torch.save`` since PyTorch 1.6): ``data.pkl`` is a pickle of a dict from
keys to tensors, and each tensor points into a record ``data/<number>``. A pickle is a program for a small stack machine
that may import and call anything. The machine below knows only the instructions that a dict of tensors takes, and calls
nothing: the few names that a tensor is made of are compared as text.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax.numpy as jnp
import numpy as np

from spo_jax.errors import UserError
from spo_jax.formats.hub import missing
from spo_jax.formats.json_files import Json
from spo_jax.formats.stored import StoredArray

# A tensor takes about 150 bytes of pickle, so this is room for 25,000, and little enough for the machine below.
_MAX_PICKLE_BYTES = 4 * 2**20
_MAX_RANK = 8
_T = TypeVar("_T")
_SAFER = "get the weights as safetensors, or from a source that you trust"
_STORAGES = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16, "Bool": np.bool_}
_STORAGES |= {"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8}
_DTYPES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()}
_DICT = "collections OrderedDict"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
# What the instructions without an argument push.
_NEW: dict[str, Callable[[], object]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_NEW |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}


class _Name(NamedTuple):
    text: str  # what the pickle wants imported; it stays a name


class _Storage(NamedTuple):
    record: str
    dtype: np.dtype
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _NotTensorsError(Exception):
    """The pickle holds something that a dict of tensors does not; the text continues "The file ..."."""


def index_torch_bin(path: Path) -> dict[str, StoredArray]:
    """The tensors of a PyTorch zip file by key; none of their values is read yet. UserError if the file is missing,
    damaged, of a PyTorch before 1.6, compressed, or holds anything but a dict of tensors (an optimizer, an attack)."""
    return index_training_checkpoint(path, nested=False)[0]


def index_training_checkpoint(path: Path, *, nested: bool = True) -> tuple[dict[str, StoredArray], Json]:
    """The tensors below ``"state_dict"``, as training programs write them, and the numbers and strings beside it.

    None, and lists and dicts of all this and of tensors, such as an optimizer's, may be there too and are left out;
    whatever else is there is refused. A file without that level is as one of ``index_torch_bin``, and so is any with
    ``nested=False``; errors are the same.
    """
    if not path.is_file():
        raise UserError(missing(path, "Weight file"))
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"Weight file {path} is not a PyTorch zip file; if it is of a PyTorch before 1.6, read it there with "
                "torch.load(path, weights_only=True) and save that again, with torch.save or as safetensors."
            )
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {member.filename: member for member in archive.infolist()}
            roots = [name.removesuffix("data.pkl") for name in members if f"/{name}".endswith("/data.pkl")]
            if len(roots) != 1:
                raise UserError(f"Weight file {path} is a zip file, but not one of PyTorch's (no data.pkl).")
            root = roots[0]  # the folder in the archive, with its slash, that everything lies in
            pickle = members[f"{root}data.pkl"]
            if pickle.file_size > _MAX_PICKLE_BYTES:
                raise UserError(f"Weight file {path} has a table of more than {_MAX_PICKLE_BYTES} bytes; {_SAFER}.")
            if f"{root}byteorder" in members and _content(path, file, members[f"{root}byteorder"]) != b"little":
                raise UserError(f"Weight file {path} is not little-endian; save it again on another machine.")
            content, beside = _expect(dict, _interpret(_content(path, file, pickle))), {}
            if nested and type(content.get("state_dict")) is dict:
                _check_beside([value for key, value in content.items() if key != "state_dict"])
                beside = {k: v for k, v in content.items() if type(v) in (str, bool, int, float)}
                content = content["state_dict"]
            arrays = {}
            for key, tensor in content.items():
                _expect(str, key)
                if type(tensor) is not _Tensor:
                    raise _NotTensorsError(
                        f"holds a {type(tensor).__name__} under {key!r} where a tensor should be; only plain state "
                        "dicts can be read, so save the model's own state_dict()"
                    )
                (record, dtype, size), start, shape, strides = tensor
                member = members.get(f"{root}data/{record}")
                if member is None or member.file_size < size * dtype.itemsize:
                    raise _NotTensorsError(f"lacks the values of {key!r}; download or copy it again")
                offset = _start(path, file, member) + start * dtype.itemsize
                arrays[key] = StoredArray(path, offset, dtype, shape, strides)
            return arrays, beside
    except _NotTensorsError as error:
        raise UserError(f"Weight file {path} {error}.") from error
    # Whatever is malformed ends in one of these: the stack, a record or a string is too short, or of another type. With
    # the last one zipfile says that it cannot read this kind of archive.
    except (zipfile.BadZipFile, OSError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"Weight file {path} is damaged or truncated ({error}); download or copy it again.") from error


def _check_beside(values: list[object]) -> None:
    """Refuses what is no plain value; each container is looked at once, as a pickle may hold it in itself."""
    seen: set[int] = set()
    while values:
        value = values.pop()
        if isinstance(value, list | tuple | dict) and type(value) in (list, tuple, dict):
            if id(value) not in seen:
                seen.add(id(value))
                values += list(value.values() if isinstance(value, dict) else value)
        elif value is not None and type(value) not in (str, bool, int, float, _Tensor):
            raise _NotTensorsError(
                f"holds a {type(value).__name__.strip('_').lower()} beside its state_dict, where numbers and texts are "
                "expected; save the model's own state_dict() alone"
            )


def _start(path: Path, file: io.BufferedIOBase, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive member start in the file; they lie there uncompressed and complete."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
        raise UserError(f"Weight file {path} is compressed or encrypted, which PyTorch's own are not; {_SAFER}.")
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{member.filename} is not where it should be")
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
    if start + member.file_size > path.stat().st_size:
        raise ValueError(f"{member.filename} ends beyond the file")
    return start


def _content(path: Path, file: io.BufferedIOBase, member: zipfile.ZipInfo) -> bytes:
    file.seek(_start(path, file, member))
    return file.read(min(member.file_size, _MAX_PICKLE_BYTES))


def _interpret(pickle: bytes) -> object:
    """Runs the pickle on a machine that can build dicts, lists and tensors and nothing else."""
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[int, object] = {}
    argument: Any

    def pop(start: int) -> list[object]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(marks.pop() if name == "TUPLE" else -int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                items = pop(marks.pop() if name == "APPENDS" else -1)
                _expect(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = pop(marks.pop() if name == "SETITEMS" else -2)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _expect(dict, stack[-1])[key if type(key) is int else _expect(str, key)] = value
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE" as name:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL" as name:
                text = argument if name == "GLOBAL" else " ".join(_expect(str, part) for part in pop(-2))
                if text not in (_DICT, _TENSOR, _PARAMETER, *_DTYPES):
                    _refuse(text)
                stack.append(_Name(text))
            case "BINPERSID":  # ("storage", type, record, device, number of elements)
                kind, dtype, record, _, size = _expect(tuple, stack.pop())
                if kind != "storage" or _expect(_Name, dtype).text not in _DTYPES:
                    raise ValueError("unknown kind of storage")
                stack.append(_Storage(_expect(str, record), _DTYPES[dtype.text], _expect(int, size)))
            case "REDUCE":
                arguments = _expect(tuple, stack.pop())
                stack.append(_build(_expect(_Name, stack.pop()).text, arguments))
            case "BUILD":
                stack.pop()  # the attributes of a state dict: versions of its modules
                _expect(dict, stack[-1])
            case "STOP":
                return stack.pop()
            case _:
                raise _NotTensorsError(
                    f"uses the pickle instruction {opcode.name}, which no dict of tensors needs, and was not read; "
                    f"it may be an attack: {_SAFER}"
                )
    raise ValueError("its pickle does not end")


def _expect(kind: type[_T], value: object) -> _T:
    if type(value) is not kind or not isinstance(value, kind):
        raise _NotTensorsError(
            f"holds a {type(value).__name__.strip('_').lower()} where a dict of tensors has a {kind.__name__}; "
            "only plain state dicts can be read"
        )
    return value


def _refuse(text: str) -> NoReturn:
    raise _NotTensorsError(
        f"asks for {text.replace(' ', '.', 1)!r}, which no dict of tensors needs, and was not read; it may be an "
        f"attack or a whole model: {_SAFER}"
    )


def _build(name: str, arguments: tuple[Any, ...]) -> object:
    """What PyTorch's functions of that name would make of these arguments."""
    if name == _DICT and not arguments:
        return {}
    if name == _PARAMETER:
        return _expect(_Tensor, arguments[0])
    if name != _TENSOR:
        _refuse(name)
    storage, offset, shape, strides, _, hooks = arguments[:6]
    if _expect(dict, hooks):
        raise _NotTensorsError("has a tensor with hooks, which could run code; only plain state dicts can be read")
    tensor = _Tensor(_expect(_Storage, storage), _expect(int, offset), _expect(tuple, shape), _expect(tuple, strides))
    if len(shape) > _MAX_RANK or len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    if min(storage.size, offset, *(_expect(int, n) for n in (*shape, *strides))) < 0:
        raise ValueError("a tensor has a negative size, stride or offset")
    # The second condition refuses tensors that repeat values of a small storage without end (stride 0).
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} does not fit its storage of {storage.size}")
    return tensor
