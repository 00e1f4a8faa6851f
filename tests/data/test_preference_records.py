"""What is wrong with a record, and pictures as the released code makes them."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spo_jax.data import records
from spo_jax.data.records import FAULTS, Fault, decode_pair, decode_picture, fault_of
from tests.preference_data import DAMAGE, damage, encode, picture, png_header, record


def reason(function, *arguments):
    with pytest.raises(Fault) as fault:
        function(*arguments)
    return str(fault.value)


def test_a_good_record():
    pair = decode_pair(record(2), (16, 16))
    assert pair["caption"] == "caption 2" and pair["weight"] == 1 / 3
    np.testing.assert_array_equal(pair["labels"], np.float32([0.5, 0.5]))
    assert pair["images"].shape == (2, 16, 16, 3) and pair["images"].dtype == np.uint8
    np.testing.assert_array_equal(pair["images"][1], decode_picture(record(2)["image_1"], (16, 16)))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_has_a_name(how):
    bad, name = damage(record(1), how), DAMAGE[how][1]
    assert name in FAULTS
    assert reason(decode_pair, bad, (16, 16)) == name
    # Preparation tells the same without decoding, or does not tell.
    assert fault_of(bad) in ((None, name) if name.startswith("picture") else (name,))


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 10**6))
@pytest.mark.parametrize("kind", records.FORMATS)
def test_no_damage_gets_through_as_another_error(kind, position, value, cut):
    data = bytearray(picture(3, kind=kind))
    data[position % len(data)] = value
    data = bytes(data[: 1 + cut % (2 * len(data))])
    try:
        assert decode_picture(data, (16, 16)).shape == (16, 16, 3)
    except Fault as fault:
        assert str(fault) in ("picture_broken", "picture_too_large")


@pytest.mark.parametrize("side", [5_793, 10_000, 60_000])  # below Pillow's warning, between, above its error
def test_a_bomb_is_refused_before_it_is_decoded(side):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(decode_picture, png_header(side, side), (16, 16)) == "picture_too_large"
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    )  # KB; decoded it would be 100 MB and more


def test_a_line_that_becomes_a_bomb_when_it_is_resized():
    assert reason(decode_picture, picture(0, 1, 30_000), (512, 512)) == "picture_too_large"


def test_a_webp_bomb_is_refused_before_it_is_decoded():
    canvas = (16_383 - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4) + canvas + picture(kind="WEBP")[12:]
    data = b"RIFF" + len(body).to_bytes(4, "little") + body
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(decode_picture, data, (16, 16)) in ("picture_too_large", "picture_broken")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 41), (17, 90), (16, 16), (7, 9)])
def test_pictures_as_the_released_code_makes_them(shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=False, do_rescale=False
    )
    data = picture(0, *shape, kind="PNG")
    with Image.open(io.BytesIO(data)) as image:
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(decode_picture(data, (16, 16)), theirs)


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_any_picture_covers_any_size(height, width, size):
    data = encode(Image.new("RGB", (width, height), (200, 100, 50)), "PNG")
    result = decode_picture(data, size)
    assert result.shape == (*size, 3)
    assert (result == (200, 100, 50)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_colour_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = encode(Image.new("RGB", (24, 24), (255, 255, 255)).convert(mode), kind)
    result = decode_picture(data, (16, 16))
    assert result.shape == (16, 16, 3)
    assert (result >= 250).all()


def test_orientation_tags_are_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = Image.fromarray(np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3))
    plain, tagged = (decode_picture(encode(image, "PNG", **o), (24, 24)) for o in ({}, {"exif": exif}))
    np.testing.assert_array_equal(plain, tagged)
    np.testing.assert_array_equal(plain, np.asarray(image))


RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


def png_of_16_bits(samples, colour_type):
    """Pillow writes 16 bits for grey alone. ``samples`` uint16 [h, w] or [h, w, c]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", *samples.shape[1::-1], 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 0), (4, 2), (2, 3), (6, 4)])
def test_pictures_of_16_bits_are_scaled(colour_type, channels):
    samples = RAMP if not channels else np.repeat(RAMP[..., None], channels, axis=-1)
    if channels in (2, 4):
        samples[..., -1] = 65535
    decoded = decode_picture(png_of_16_bits(samples, colour_type), (16, 16))
    assert np.abs(decoded - (RAMP / 257)[..., None]).max() < 1
    assert (decoded[0, 0] == 0).all() and (decoded[-1, -1] == 255).all()


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")])
def test_pictures_of_other_modes_keep_their_brightness(mode, kind):
    grey = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=1).repeat(16, axis=0))
    decoded = decode_picture(encode(grey.convert("RGB").convert(mode), kind), (16, 16))
    assert np.abs(decoded.astype(int) - np.asarray(grey)[..., None]).max() < 8


def test_a_picture_of_fractions_is_a_fault():
    data = encode(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF")
    assert reason(decode_picture, data, (16, 16)) == "picture_broken"
