import pytest
import torch

from sidetune.data.clips import Frame
from sidetune.data.reading import Reading
from sidetune.data.views import PLAIN, views
from sidetune.features import Features, Spec, Tap


def test_images_are_read_a_view_at_a_time():
    reading = Reading.of_images(views(3), averaged=True)
    assert (reading.stored, reading.views) == (views(3), ((0,), (1,), (2,), (3,)))
    assert (reading.scored, reading.together) == (4, 1)
    assert Reading() == Reading.of_images((PLAIN,))
    spec = Spec((Tap("block.1", "block", 4, (1, 2, 2)),))
    features = Features((torch.randn(2, 4, 4),), spec)
    assert reading.spec(spec) is spec and reading.joined(features) is features


@pytest.mark.parametrize(
    ("frames", "stored", "expected"),
    [
        (4, 16, (2, 6, 10, 14)),
        (8, 16, (1, 3, 5, 7, 9, 11, 13, 15)),
        (3, 16, (2, 8, 13)),
        (1, 1, (0,)),
        (5, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_the_evenly_spaced_sampling_has_the_middle_of_every_part(frames, stored, expected):
    reading = Reading.of_clips(frames, stored, drawn=8)
    assert reading.views[0] == expected
    assert reading.stored == tuple(Frame(number, stored) for number in range(stored))
    assert (reading.scored, reading.together) == (1, frames)


def test_drawn_samplings_have_one_frame_of_every_part_and_are_the_same_everywhere():
    frames, stored = 4, 16
    reading = Reading.of_clips(frames, stored, drawn=64)
    assert reading == Reading.of_clips(frames, stored, drawn=64)
    assert len(set(reading.views)) == len(reading.views) > 32
    for view in reading.views:
        assert [number // 4 for number in view] == [0, 1, 2, 3]
    places = {number for view in reading.views for number in view}
    assert places == set(range(stored)), "every stored frame is read by some"


def test_parts_that_are_not_equally_long_are_covered_too():
    reading = Reading.of_clips(3, 16, drawn=64)
    assert {number for view in reading.views for number in view} == set(range(16))


def test_where_all_frames_are_read_there_is_one_sampling():
    assert Reading.of_clips(8, 8, drawn=32, scored=3).views == (tuple(range(8)),)
    assert Reading.of_clips(8, 8, drawn=32, scored=3).scored == 1


def test_scored_samplings_lie_evenly_in_the_parts():
    reading = Reading.of_clips(4, 16, drawn=0, scored=2)
    assert reading.views == ((1, 5, 9, 13), (3, 7, 11, 15))
    assert reading.scored == 2


def test_squares_are_stored_each_and_all_are_scored():
    squares = ("middle", "first", "last")
    reading = Reading.of_clips(2, 4, drawn=6, scored=1, squares=squares)
    assert reading.stored == tuple(Frame(number, 4, square) for square in squares for number in range(4))
    assert reading.views[:3] == ((1, 3), (5, 7), (9, 11)) and reading.scored == 3
    shown = [{reading.stored[number].square for number in view} for view in reading.views]
    assert all(len(of_view) == 1 for of_view in shown), "a sampling is of one square"
    assert set.union(*shown[3:]) == set(squares)


def test_features_of_frames_become_those_of_clips():
    tap = Tap("block.1", "block", 6, (1, 2, 2), num_prefix=1, cls_index=0)
    spec, reading = Spec((tap,)), Reading.of_clips(3, 6, drawn=0)
    of_clip = reading.spec(spec).last
    assert (of_clip.grid, of_clip.prefix_per, of_clip.num_tokens) == ((3, 2, 2), "frame", 15)
    frames = torch.randn(2 * 3, 5, 6)
    joined = reading.joined(Features((frames,), spec))
    assert joined.spec == reading.spec(spec)
    clips = frames.view(2, 3, 5, 6)
    torch.testing.assert_close(of_clip.cls_token(joined["block.1"]), clips[:, :, 0].mean(1))
    torch.testing.assert_close(of_clip.patch_tokens(joined["block.1"]), clips[:, :, 1:].flatten(1, 2))
