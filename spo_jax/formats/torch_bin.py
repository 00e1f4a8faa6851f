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
_DTYPES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)


class _Name(NamedTuple):
    """A name that the pickle wants imported; it stays a name."""

    text: str


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
    """The tensors of a PyTorch zip file by key; none of their values is read yet.

    Raises:
      UserError: the file is missing or damaged, in the format before PyTorch 1.6, compressed, or holds anything but a
        dict of tensors (a trained optimizer, a whole model, an attack).
    """
    return index_training_checkpoint(path, nested=False)[0]


def index_training_checkpoint(path: Path, *, nested: bool = True) -> tuple[dict[str, StoredArray], Json]:
    """The tensors below ``"state_dict"``, as training programs write them, and the numbers and strings beside it.

    Lists and dicts may be there too; objects of other kinds are refused. A file without that level is as one of
    ``index_torch_bin``, and so is any with ``nested=False``; errors are the same.
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
            content, beside = _interpret(_content(path, file, pickle)), {}
            if nested and type(content) is dict and type(content.get("state_dict")) is dict:
                beside = {k: v for k, v in content.items() if type(v) in (str, bool, int, float)}
                content = content["state_dict"]
            arrays = {}
            for key, tensor in _checked(content).items():
                member = members.get(f"{root}data/{tensor.storage.record}")
                if member is None or member.file_size < tensor.storage.size * tensor.storage.dtype.itemsize:
                    raise _NotTensorsError(f"lacks the values of {key!r}; download or copy it again")
                offset = _start(path, file, member) + tensor.offset * tensor.storage.dtype.itemsize
                arrays[key] = StoredArray(path, offset, tensor.storage.dtype, tensor.shape, tensor.strides)
            return arrays, beside
    except _NotTensorsError as error:
        raise UserError(f"Weight file {path} {error}.") from error
    # Whatever is malformed ends in one of these: the stack, a record or a string is too short, or of another type. With
    # the last one zipfile says that it cannot read this kind of archive.
    except (zipfile.BadZipFile, OSError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"Weight file {path} is damaged or truncated ({error}); download or copy it again.") from error


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

    def pop_to_mark() -> list[object]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "APPEND":
                item = stack.pop()
                _expect(list, stack[-1]).append(item)
            case "APPENDS":
                items = pop_to_mark()
                _expect(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = pop_to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _expect(dict, stack[-1])[_key(key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument))
            case "STACK_GLOBAL":
                name, module = _expect(str, stack.pop()), _expect(str, stack.pop())
                stack.append(_name(f"{module} {name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
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


def _key(value: object) -> str | int:
    """A key of a dict; numbers are those of an optimizer's state."""
    return value if type(value) is int else _expect(str, value)


def _refuse(text: str) -> NoReturn:
    raise _NotTensorsError(
        f"asks for {text.replace(' ', '.', 1)!r}, which no dict of tensors needs, and was not read; it may be an "
        f"attack or a whole model: {_SAFER}"
    )


def _name(text: str) -> _Name:
    if text not in (_DICT, _TENSOR, _PARAMETER) and text not in _DTYPES:
        _refuse(text)
    return _Name(text)


def _storage(identity: object) -> _Storage:
    """What the pickle calls by a persistent id: ``("storage", type, record, device, number of elements)``."""
    kind, dtype, record, _, size = _expect(tuple, identity)
    if kind != "storage" or _expect(_Name, dtype).text not in _DTYPES:
        raise ValueError("unknown kind of storage")
    return _Storage(_expect(str, record), _DTYPES[dtype.text], _expect(int, size))


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


def _checked(result: object) -> dict[str, _Tensor]:
    tensors = _expect(dict, result)
    for key, value in tensors.items():
        _expect(str, key)
        if type(value) is not _Tensor:
            raise _NotTensorsError(
                f"holds a {type(value).__name__} under {key!r} where a tensor should be; only plain state dicts can be "
                "read, so save the model's own state_dict()"
            )
    return tensors
