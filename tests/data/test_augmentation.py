"""What is drawn for a pair depends on seed and position alone; views of a picture are what they say."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from spo_jax.data.augmentation import Augmentation, View, draw_views
from spo_jax.data.preferences import PairLoader
from spo_jax.data.records import decode_picture, decode_whole, view_picture
from tests.preference_data import picture, record

RANDOM = Augmentation("bilinear", "independent", "independent")
SIZES = [(24, 40), (40, 24), (24, 24), (33, 17)]
SOURCE = [
    record(i, image_0=picture(2 * i, *SIZES[i % 4]), image_1=picture(2 * i + 1, *SIZES[(i + i // 4) % 4]))
    for i in range(9)
]


def make(batch_size=4, source=SOURCE, **options):
    return PairLoader(source, **{"batch_size": batch_size, "size": (16, 16), "seed": 3, "num_workers": 0} | options)


def rows(batches):
    """Images and crops by position in the stream."""
    found = {}
    for batch in batches:
        for place, images, crops in zip(batch.positions, batch.images, batch.crops, strict=True):
            found[int(place)] = images.tolist(), crops.tolist()
    return found


# ------------------------------------------------------------------------------------------------------------- draws
def test_nothing_is_drawn_by_default():
    assert {draw_views(Augmentation(), 0, position) for position in range(20)} == {(View(), View())}


def test_draws_depend_on_seed_and_position():
    def draw(seed=0, position=5):
        return draw_views(RANDOM, seed, position)

    assert draw() == draw() and draw(seed=-1) == draw(seed=-1)
    assert draw() != draw(seed=1) and draw() != draw(position=6)


def test_flips_are_fair_and_shared_or_not():
    for flip, different in (("shared", 0), ("independent", 0.5)):
        views = [draw_views(Augmentation(flip=flip), 0, position) for position in range(1000)]
        mirrored = np.array([[view.mirrored for view in pair] for pair in views])
        np.testing.assert_allclose(mirrored.mean(axis=0), 0.5, atol=0.05)
        np.testing.assert_allclose((mirrored[:, 0] != mirrored[:, 1]).mean(), different, atol=0.05)
        assert all(view.place is None for pair in views for view in pair)


def test_places_are_uniform_and_shared_or_not():
    for crop, correlation in (("shared", 1), ("independent", 0)):
        views = [draw_views(Augmentation(crop=crop), 0, position) for position in range(1000)]
        places = np.array([[view.place for view in pair] for pair in views])
        assert places.min() >= 0 and places.max() < 1
        np.testing.assert_allclose(np.quantile(places, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
        for axis in range(2):
            found = np.corrcoef(places[:, 0, axis], places[:, 1, axis])[0, 1]
            np.testing.assert_allclose(found, correlation, atol=0.1)


def test_another_crop_mirrors_the_same_pictures():
    flips = [
        [view.mirrored for view in draw_views(Augmentation(flip="shared", crop=crop), 7, position)]
        for position in range(50)
        for crop in ("center", "shared", "independent")
    ]
    assert flips[::3] == flips[1::3] == flips[2::3]


@pytest.mark.parametrize("wrong", [{"resize": "nearest"}, {"flip": True}, {"crop": "centre"}])
def test_a_word_that_there_is_not(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        make(augmentation=Augmentation(**wrong))


# ------------------------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_a_view_by_hand(resize):
    data = picture(1, 30, 50, "PNG")
    with Image.open(io.BytesIO(data)) as image:
        small = np.asarray(image.resize((26, 16), getattr(Image.Resampling, resize.upper())))
    for place, left in ((None, 5), ((0.9, 0.0), 0), ((0.0, 0.49), 5), ((0.0, 0.999), 10)):
        image, crop = view_picture(data, (16, 16), View(resize, place=place))
        np.testing.assert_array_equal(image, small[:, left : left + 16])
        assert crop.tolist() == [30, 50, 0, left] and crop.dtype == np.int32
        mirrored, same = view_picture(data, (16, 16), View(resize, mirrored=True, place=place))
        np.testing.assert_array_equal(mirrored, image[:, ::-1])
        assert same.tolist() == crop.tolist()


def test_every_place_is_cut_as_often_as_another():
    data = picture(1, 20, 16, "PNG")  # five places
    tops = [view_picture(data, (16, 16), View(place=(place, 0.5)))[1][2] for place in np.arange(0, 1, 0.01)]
    np.testing.assert_array_equal(np.bincount(tops), [20] * 5)


def test_a_picture_at_its_own_size():
    data = picture(1, 30, 50, "PNG")
    np.testing.assert_array_equal(decode_whole(data), decode_picture(data, (30, 50)))


# ------------------------------------------------------------------------------------------------------------- loader
def test_crops_say_where_an_image_is_from():
    batch = next(make(9, shuffle=False))
    assert batch.crops.shape == (9, 2, 4) and batch.crops.dtype == np.int32
    for crops, number in zip(batch.crops, range(9), strict=True):
        sizes = SIZES[number % 4], SIZES[(number + number // 4) % 4]
        assert [tuple(crop[:2]) for crop in crops] == list(sizes)
        assert crops[0, 2:].tolist() == [[0, 5], [5, 0], [0, 0], [7, 0]][number % 4]


def test_a_shared_crop_cuts_pictures_of_one_size_alike():
    pairs = [record(i, image_0=picture(i, 24, 60), image_1=picture(i + 50, 24, 60)) for i in range(8)]
    batch = next(make(8, pairs, augmentation=Augmentation(crop="shared")))
    np.testing.assert_array_equal(batch.crops[:, 0], batch.crops[:, 1])
    assert len(set(batch.crops[:, 0, 3].tolist())) > 3
    batch = next(make(8, pairs, augmentation=Augmentation(crop="independent")))
    assert (batch.crops[:, 0, 3] != batch.crops[:, 1, 3]).any()


def test_a_shared_flip_mirrors_both():
    plain, mirrored = (next(make(9, augmentation=Augmentation(flip=flip))) for flip in ("none", "shared"))
    flipped = [np.array_equal(one[:, :, ::-1], other) for one, other in zip(plain.images, mirrored.images, strict=True)]
    same = [np.array_equal(one, other) for one, other in zip(plain.images, mirrored.images, strict=True)]
    assert any(flipped) and any(same) and all(a != b for a, b in zip(flipped, same, strict=True))
    np.testing.assert_array_equal(plain.crops, mirrored.crops)


def test_any_way_to_read_the_stream_augments_alike():
    expected = rows(itertools.islice(make(12, augmentation=RANDOM), 2))  # 24 places, 2 2/3 epochs
    assert expected[0] != expected[9 + 3]
    shares = [make(3, augmentation=RANDOM, process_index=i, process_count=2) for i in range(2)]
    assert rows(batch for loader in shares for batch in itertools.islice(loader, 4)) == expected
    first = make(5, augmentation=RANDOM)
    found = rows(itertools.islice(first, 2))
    found |= rows(itertools.islice(make(7, augmentation=RANDOM, state=first.state()), 2))
    assert found == expected
    loader = make(6, augmentation=RANDOM, num_workers=1)
    assert rows(itertools.islice(loader, 4)) == expected
    loader.close()


def test_a_picture_is_seen_anew_in_each_epoch():
    batches = [next(make(9, augmentation=RANDOM, shuffle=False)), *itertools.islice(make(9, shuffle=False), 1)]
    loader = make(9, augmentation=RANDOM, shuffle=False)
    first, second = next(loader), next(loader)
    np.testing.assert_array_equal(first.images, batches[0].images)
    assert (first.crops != second.crops).any() and (first.images != batches[1].images).any()


def test_rows_without_a_record_have_no_crop():
    batch = next(make(4, [record(0), record(1, image_0=b"")], num_epochs=1, augmentation=RANDOM))
    np.testing.assert_array_equal(batch.crops.any(axis=(1, 2)), batch.weights > 0)
    assert (batch.weights > 0).sum() == 1
