"""PyTorch files: every tensor comes out bit by bit, and no file can make the reader run or allocate anything."""

import collections
import io
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.errors import UserError
from spo_jax.formats.torch_bin import index_torch_bin, index_training_checkpoint

ROOT = "archive/"
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def archive(path, pickled, records=(("0", bytes(16)),), compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(ROOT + "data.pkl", pickled)
        for name, content in records:
            file.writestr(f"{ROOT}data/{name}", content)
        for name, content in members.items():
            file.writestr(ROOT + name, content)
    return path


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy()


def check(path, expected):
    arrays = index_torch_bin(path)
    assert list(arrays) == list(expected)
    for key, tensor in expected.items():
        array = arrays[key].read()
        assert array.shape == tuple(tensor.shape) and array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.ascontiguousarray(array).reshape(-1).view(np.uint8), bits(tensor))


# ------------------------------------------------------------------------------------------------------- good files
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_pytorch_saves_is_read_bit_by_bit(tmp_path_factory, data):
    """All dtypes and ranks, empty tensors, transposed and sliced views, and views that share one storage."""
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tensors = {}
    for i in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = data.draw(st.sampled_from(DTYPES))
        tensor = torch.from_numpy(np.asarray(generator.integers(0, 100, shape))).to(dtype)
        if shape and shape[-1] > 1 and data.draw(st.booleans()):
            tensor = data.draw(st.sampled_from([lambda x: x.T, lambda x: x[..., 1:], lambda x: x[..., ::2]]))(
                tensor if tensor.ndim == 2 else tensor.reshape(-1, shape[-1])
            )
        tensors[f"layer.{i}"] = tensor
        if data.draw(st.booleans()):
            tensors[f"tied.{i}"] = tensor[..., :1] if tensor.ndim else tensor
    path = tmp_path_factory.mktemp("good") / "m.bin"
    torch.save(tensors, path)
    check(path, tensors)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_state_dict_of_a_module_is_read(tmp_path, protocol):
    """With its OrderedDict, its metadata, and parameters that still want a gradient."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    check(tmp_path / "a.pt", state)
    with_gradient = dict(module.named_parameters())
    torch.save(with_gradient, tmp_path / "b.bin", pickle_protocol=protocol)
    check(tmp_path / "b.bin", {k: v.detach() for k, v in with_gradient.items()})


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    torch.save({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "m.bin")
    arrays = index_torch_bin(tmp_path / "m.bin")
    os.truncate(tmp_path / "m.bin", arrays["a"].offset + 16)
    np.testing.assert_array_equal(arrays["a"].read(), np.zeros(4))
    with pytest.raises(UserError, match="truncated"):
        arrays["b"].read()


# What training programs keep beside the state dict: numbers, texts, and dicts, lists and tuples of them and of tensors.
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.just(torch.ones(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(-9, 2**40), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(beside=st.dictionaries(st.text().filter(lambda key: key != "state_dict"), PLAIN, max_size=4))
def test_tensors_below_state_dict_are_read_whatever_plain_values_are_beside(tmp_path_factory, beside):
    path = tmp_path_factory.mktemp("nested") / "m.pt"
    state = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2, dtype=torch.float16)}
    torch.save({**beside, "state_dict": collections.OrderedDict(state)}, path)
    arrays, values = index_training_checkpoint(path)
    assert list(arrays) == list(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(arrays[key].read(), tensor.numpy())
    plain = {key: value for key, value in beside.items() if type(value) in (str, bool, int, float)}
    assert repr(values) == repr(plain)
    with pytest.raises(UserError, match=r"holds a .*state dict"):
        index_torch_bin(path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": 1}},
        {"state_dict": {"a": [torch.ones(1)]}},
        {"state_dict": {"state_dict": {"a": torch.ones(1)}}},
        {"model": {"state_dict": {"a": torch.ones(1)}}},
        {"model": {"a": torch.ones(1)}, "iterations": 3},
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {1: torch.ones(1)}},
    ],
    ids=str,
)
def test_any_other_nesting_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"m\.pt holds a .*state dict"):
        index_training_checkpoint(tmp_path / "m.pt")


# ------------------------------------------------------------------------------------------------------------ attacks
class Call:
    """Pickles as "call this function with these arguments"."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def binary(value):
    """Opcodes that leave a plain value on the stack, as PyTorch writes them."""
    return pickle.dumps(value, 2)[2:-1]


def tensor_pickle(*, shape=(2, 2), strides=(2, 1), offset=0, size=4, kind="FloatStorage", record="0", hooks=b"}"):
    """A dict of one tensor, as opcodes."""
    identity = b"(" + binary("storage") + b"ctorch\n%b\n" % kind.encode() + binary(record) + binary("cpu")
    content = identity + binary(size) + b"tQ" + binary(offset) + binary(shape) + binary(strides) + b"\x89" + hooks
    return b"\x80\x02}" + binary("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + content + b"tRs."


def payloads(mark):
    """Pickles that would make a file named ``mark``, in ways that real attacks use."""
    shell, python = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    tensor = tensor_pickle()
    evil = pickle.dumps(Call(os.system, shell), 2)[2:-1]
    array = np.empty(1, object)
    array[0] = Call(os.system, shell)
    ordered = collections.OrderedDict(w=Call(eval, python))
    return {
        "os.system": pickle.dumps({"w": Call(os.system, shell)}, 2),
        "os.system, protocol 0": pickle.dumps({"w": Call(os.system, shell)}, 0),
        "os.system, protocol 5": pickle.dumps({"w": Call(os.system, shell)}, 5),
        "posix.system in bare opcodes": f"cposix\nsystem\n(V{shell}\ntR.".encode(),
        "nt.system by INST": f"(V{shell}\nios\nsystem\n.".encode(),
        "builtins.eval by OBJ": b"(cbuiltins\neval\n" + binary(python) + b"o.",
        "builtins.eval": pickle.dumps({"w": Call(eval, python)}, 2),
        "builtins.exec": pickle.dumps({"w": Call(exec, python)}, 2),
        "__builtin__ of Python 2": f"c__builtin__\neval\n(V{python}\ntR.".encode(),
        "getattr, to anything": pickle.dumps(Call(getattr, Call(__import__, "os"), "system"), 2),
        "a dotted name": b"\x80\x04" + binary("collections") + binary("OrderedDict.fromkeys") + b"\x93.",
        "call inside a call": pickle.dumps({"w": Call(list, Call(map, eval, (python,)))}, 2),
        "inside an OrderedDict": pickle.dumps(ordered, 2),
        "as a key": b"\x80\x02}" + evil + b"K\x01s.",
        "as the attributes of a dict": b"\x80\x02ccollections\nOrderedDict\n)R" + evil + b"b.",
        "as the argument of OrderedDict": b"\x80\x02ccollections\nOrderedDict\n" + evil + b"\x85R.",
        "as a tensor's storage": tensor.replace(b"tQ", b"t" + evil, 1),
        "as a tensor's shape": tensor_pickle(shape=Call(eval, python)),
        "as a tensor's hooks": tensor_pickle(hooks=evil),
        "as a persistent id": evil + b"Q.",
        "as a text persistent id": f"Pcposix\nsystem\n(V{shell}\ntR.".encode(),
        "after the end of a good dict": tensor[:-1] + b"0" + evil + b".",
        "NumPy objects": pickle.dumps({"w": array}, 2),
        "NumPy objects, protocol 5": pickle.dumps({"w": array}, 5),
        "torch.load of another file": pickle.dumps({"w": Call(torch.load, str(mark))}, 2),
        "torch's own way to eval": b"ctorch.jit.unsupported_tensor_ops\nexecWrapper\n(" + binary(python) + b"}}tR.",
        "runpy": b"crunpy\n_run_code\n(" + binary(python) + b"}tR.",
        "extension registry": b"\x80\x02\x82\x01" + evil + b".",
        "new object": b"\x80\x02csubprocess\nPopen\n" + binary(([shell],)) + b"\x81.",
        "a class's attributes": b"\x80\x02ccollections\nOrderedDict\nN}" + binary("__init__") + evil + b"s\x86b.",
        "a function's attributes": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + binary("__code__") + evil + b"s\x86b)R.",
    }


PAYLOADS = list(payloads("mark"))


def test_the_payloads_are_real(tmp_path):
    """Python's own unpickler falls for them (those that need nothing but the standard library)."""
    mark = tmp_path / "mark"
    for name in (
        "os.system",
        "posix.system in bare opcodes",
        "builtins.eval",
        "inside an OrderedDict",
        "NumPy objects",
    ):
        pickle.loads(payloads(mark)[name])
        assert mark.exists(), name
        mark.unlink()


@pytest.mark.parametrize("name", PAYLOADS)
def test_attack_is_refused_and_not_run(tmp_path, name):
    mark = tmp_path / "mark"
    path = archive(tmp_path / "m.bin", payloads(mark)[name])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        index_torch_bin(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_attack_in_the_rest_of_the_archive_or_the_old_format_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    evil = pickle.dumps({"w": Call(os.system, f"touch {mark}")}, 2)
    for content in (evil, b"", b"\x80\x02", struct.pack("<I", 1) * 100):
        (tmp_path / "old.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"old\.bin is not a PyTorch zip file.*torch\.load"):
            index_torch_bin(tmp_path / "old.bin")
    torch.save({"w": torch.ones(2)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        index_torch_bin(tmp_path / "legacy.bin")
    other = archive(tmp_path / "m.bin", tensor_pickle(), **{"code/evil.py": "x", "constants.pkl": evil})
    assert list(index_torch_bin(other)) == ["w"]
    assert not mark.exists()


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("where", ["below state_dict", "beside it"])
def test_attack_inside_a_training_checkpoint_is_refused_and_not_run(tmp_path, name, where):
    """The bytes of each attack, without their header and end, as a value below or beside a good state dict."""
    mark = tmp_path / "mark"
    evil = re.sub(rb"^\x80.(\x95.{8})?", b"", payloads(mark)[name], flags=re.DOTALL)[:-1]
    tensor = tensor_pickle()[2:-1]  # a dict of one tensor
    inner = b"}" + binary("w") + evil + b"s" if where == "below state_dict" else tensor
    pickled = b"\x80\x02}(" + binary("state_dict") + inner + binary("more") + evil + b"u."
    path = archive(tmp_path / "m.pt", pickled)
    with pytest.raises(UserError, match=re.escape(str(path))):
        index_training_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("value", [b"ctorch\nFloatStorage\n", b"(" + binary(1) + b"ctorch\nFloatStorage\nt"])
def test_names_beside_the_state_dict_are_refused(tmp_path, value):
    pickled = b"\x80\x02}(" + binary("state_dict") + tensor_pickle()[2:-1] + binary("more") + value + b"u."
    with pytest.raises(UserError, match="holds a name beside its state_dict"):
        index_training_checkpoint(archive(tmp_path / "m.pt", pickled))


def test_values_that_hold_themselves_or_others_often_take_no_time(tmp_path):
    pairs = (b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))  # each a pair of the one before: 2^60 in all
    for value in (b"]q\x00h\x00a", b"(]q\x00" + b"".join(pairs) + b"t"):
        pickled = b"\x80\x02}(" + binary("state_dict") + tensor_pickle()[2:-1] + binary("more") + value + b"u."
        assert list(index_training_checkpoint(archive(tmp_path / "m.pt", pickled))[0]) == ["w"]


# ----------------------------------------------------------------------------------------------------------- nonsense
@pytest.mark.parametrize(
    "change",
    [
        dict(strides=(2**40, 1)),
        dict(strides=(2, 2)),
        dict(strides=(0, 0), shape=(2**20, 2**20)),
        dict(shape=(2**63, 2**63), strides=(0, 0)),
        dict(shape=(-2, -2)),
        dict(strides=(-2, -1), offset=3),
        dict(offset=-1),
        dict(offset=1),
        dict(offset=2**70),
        dict(shape=(2, 2, 1)),
        dict(shape=(1,) * 9, strides=(1,) * 9),
        dict(shape=(2.0, 2)),
        dict(shape=(True, 2)),
        dict(shape=[2, 2]),
        dict(size=5),
        dict(size=2**60),
        dict(kind="DoubleStorage"),
        dict(record="1"),
        dict(record="../data.pkl"),
        dict(record=0),
        dict(kind="UntypedStorage"),
        dict(hooks=binary({"x": 1})),
        dict(hooks=b"N"),
    ],
    ids=str,
)
def test_tensor_outside_its_storage_is_refused(tmp_path, change):
    good = archive(tmp_path / "good.bin", tensor_pickle())
    np.testing.assert_array_equal(index_torch_bin(good)["w"].read(), np.zeros((2, 2)))
    path = archive(tmp_path / "m.bin", tensor_pickle(**change))
    with pytest.raises(UserError, match=re.escape(str(path))):
        index_torch_bin(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, [], "text", None, {1: 2}, {"a": {"b": [1.5]}}])
def test_anything_but_a_dict_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"m\.bin holds a .*state dict"):
        index_torch_bin(tmp_path / "m.bin")


def test_whole_model_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        index_torch_bin(tmp_path / "m.bin")


@pytest.mark.parametrize(
    "pickled, word",
    [
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),  # a memo of 2 billion entries
        (b"\x80\x02" + b"(" * 1000 + b"t" * 1000 + b".", "state dict"),
        (b"\x80\x02}" + b")" + b"2\x86" * 100 + b"K\x01s.", "DUP"),
        (b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"K\x01s.", "tuple"),  # its hash takes forever
        (b"\x80\x02]q\x00h\x00a\x93.", "list"),
        (b"X\xff\xff\xff\x7fabc.", "damaged"),
        (b"L" + b"9" * 10_000 + b"L\n.", "damaged"),
        (b"\x80\x02" + b"}" * (4 * 2**20), "more than 4194304 bytes"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02}K\x01K\x02s.", "int"),
    ],
)
def test_pickle_that_wants_too_much_is_refused_at_once(tmp_path, pickled, word):
    path = archive(tmp_path / "m.bin", pickled)
    with pytest.raises(UserError, match=word):
        index_torch_bin(path)


def test_compressed_archive_is_refused(tmp_path):
    """A few bytes of it could be gigabytes of zeros."""
    records = [("0", bytes(2**20))]
    path = archive(tmp_path / "m.bin", tensor_pickle(), records, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        index_torch_bin(path)


def test_archive_that_is_not_pytorchs_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        index_torch_bin(tmp_path / "m.bin")
    path = archive(tmp_path / "big.bin", tensor_pickle(), byteorder="big")
    with pytest.raises(UserError, match="little-endian"):
        index_torch_bin(path)


@settings(max_examples=60)
@given(data=st.data())
def test_damage_anywhere_is_refused_or_harmless(tmp_path_factory, data):
    """Bytes changed or cut at random: an error by name, or tensors inside the file; never another exception."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path = tmp_path_factory.mktemp("damaged") / "m.bin"
    path.write_bytes(content)
    try:
        arrays = index_torch_bin(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        for array in arrays.values():
            assert array.read().size <= len(content)


@settings(max_examples=200)
@given(
    opcodes=st.lists(st.sampled_from([bytes([b]) for b in range(256)] + [binary(1), binary("a"), b"h\x00", b"q\x00"]))
)
def test_any_program_is_refused_or_a_dict_of_tensors(tmp_path_factory, opcodes):
    path = archive(tmp_path_factory.mktemp("program") / "m.bin", b"".join(opcodes) + b".")
    try:
        assert index_torch_bin(path) == {}
    except UserError as error:
        assert str(path) in str(error)
