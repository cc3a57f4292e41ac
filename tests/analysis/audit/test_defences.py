"""Defences: closed-form properties, composition, what they cost to send, and errors."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from afterimage.analysis.audit.defences.chain import create_defence
from afterimage.config import AfterimageError, Axis, FeatureSpec

SPEC = FeatureSpec("model:layer", 6, 8, 10)
VALUES = 6 * 8 * 10


def maps(count=32, seed=0, spec=SPEC):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, spec.channels)[:, None, None]
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=generator) * scale + scale


def fitted(text, features=None, spec=SPEC):
    return create_defence(text, spec).fit(maps(spec=spec) if features is None else features)


def test_nothing_changes_nothing():
    features = maps()
    assert torch.equal(fitted("none")(features), features)
    assert fitted("none").sent_bytes == 4 * VALUES


def test_noise_has_the_stated_scale_in_every_channel():
    features = maps(200)
    defence = fitted("noise:0.5", features)
    defence.reseed(0)
    difference = (defence(features) - features).transpose(0, 1).flatten(1)
    expected = 0.5 * features.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(difference.std(1), expected, rtol=0.03, atol=0)
    assert difference.mean(1).abs().max() < 0.05 * expected.max()
    again = defence(features)
    assert not torch.equal(again, defence(features)), "every sending draws anew"
    assert torch.equal(defence.encode(features, random=False), features)


def test_seeded_noise_repeats():
    defence, features = fitted("noise:1"), maps(4)
    results = []
    for _ in range(2):
        defence.reseed(7)
        results.append(defence(features))
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_is_off_by_half_a_step_at_most(bits):
    features = maps()
    (part,) = (defence := fitted(f"int{bits}", features)).parts
    values = features.transpose(0, 1).flatten(1)
    step = (values.amax(1) - values.amin(1)) / (2**bits - 1)
    error = (defence(features) - features).abs().transpose(0, 1).flatten(1).amax(1)
    assert (error <= step / 2 * (1 + 1e-4)).all() and (error > step / 4).all()
    codes = part.codes(features)
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    torch.testing.assert_close(part.values(codes), defence(features))
    assert defence.sent_bytes == math.ceil(VALUES * bits / 8)


def test_quantised_values_beyond_the_range_are_clipped():
    features = maps()
    defence = fitted("int8", features)
    torch.testing.assert_close(
        defence(features * 100).amax((0, 2, 3)), features.amax((0, 2, 3)), rtol=1e-4, atol=1e-4
    )


def test_one_bit_leaves_two_levels_that_are_the_means_of_their_sides():
    features = maps()
    defence = fitted("1bit", features)
    result = defence(features)
    for before, after in zip(features.transpose(0, 1), result.transpose(0, 1), strict=True):
        levels = after.unique()
        assert len(levels) == 2
        high = before > before.mean()
        torch.testing.assert_close(levels, torch.stack([before[~high].mean(), before[high].mean()]))
    assert defence.sent_bytes == VALUES // 8


@pytest.mark.parametrize(
    ("text", "kept"), [("topk:0.1", 48), ("topk:7", 7), ("topk:1", 1), ("topk:1.0", VALUES)]
)
def test_top_k_keeps_exactly_k_the_largest(text, kept):
    features = maps()
    result = fitted(text)(features)
    assert (result != 0).flatten(1).sum(1).tolist() == [kept] * len(features)
    for before, after in zip(features.flatten(1), result.flatten(1), strict=True):
        largest = np.sort(np.abs(before.numpy()))[-kept:]
        assert np.array_equal(np.sort(np.abs(after[after != 0].numpy())), largest)


def test_top_k_of_ties_keeps_k_places():
    assert (fitted("topk:5")(torch.ones(2, 6, 8, 10)) != 0).flatten(1).sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("dimensions", [1, 3, 6])
def test_pca_is_numpys_svd(dimensions):
    mixed = torch.einsum(
        "cd,bdhw->bchw", torch.randn(6, 6, generator=torch.Generator().manual_seed(2)), maps()
    )
    result = fitted(f"pca:{dimensions}", mixed)(mixed)
    rows = mixed.movedim(1, -1).reshape(-1, 6).double().numpy()
    mean = rows.mean(0)
    u, s, v = np.linalg.svd(rows - mean, full_matrices=False)
    expected = (u[:, :dimensions] * s[:dimensions]) @ v[:dimensions] + mean
    np.testing.assert_allclose(result.movedim(1, -1).reshape(-1, 6).numpy(), expected, atol=1e-4)


def test_dropping_keeps_some_channels_and_fills_in_means():
    features = maps()
    defence = fitted("drop:0.5", features)
    sent, restored = defence.encode(features), defence(features)
    assert sent.shape[1] == 3 and defence.sent_bytes == 4 * VALUES // 2
    same = [torch.equal(features[:, c], restored[:, c]) for c in range(6)]
    assert sum(same) == 3
    for c in range(6):
        if not same[c]:
            torch.testing.assert_close(restored[:, c], features[:, c].mean().expand_as(restored[:, c]))


def test_pooling_takes_means_over_squares():
    features = maps()
    defence = fitted("pool:2")
    sent = defence.encode(features)
    torch.testing.assert_close(sent, features.unflatten(3, (5, 2)).unflatten(2, (4, 2)).mean((3, 5)))
    assert defence.decode(sent).shape == features.shape
    odd = fitted("pool:3").encode(features)
    assert odd.shape[2:] == (3, 4)
    torch.testing.assert_close(odd[:, :, 2, 3], features[:, :, 6:8, 9:10].mean((2, 3)))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        (2, None, Axis(3.0, 8.0, 3, 43)),
        (3, Axis(0.0, 12.0, 0, 32), Axis(3.0, 12.0, 3, 43)),
    ],
)
def test_what_is_pooled_lies_where_its_squares_do(size, rows, columns):
    """Maps of 8x10 places of 4x4 pixels in an image of 32x43; a ramp pooled and enlarged again stays in its place."""
    spec = replace(SPEC, columns=Axis(3.0, 4.0, 3, 43))
    defence = create_defence(f"pool:{size}+int8", spec, image_size=(32, 43))
    sent = defence.sent_spec
    assert (sent.rows, sent.columns) == (rows, columns)
    assert create_defence("pool:3", SPEC).sent_spec.rows is None
    ramp = torch.arange(10.0).expand(1, SPEC.channels, 8, 10)
    part = create_defence(f"pool:{size}", spec, image_size=(32, 43))
    back = part.decode(part.encode(ramp))
    torch.testing.assert_close(back[..., 1:7], ramp[..., 1:7])


def test_a_shuffle_is_a_permutation_of_places_of_each_image():
    spec = FeatureSpec("model:layer", 2, 4, 5)
    places = torch.arange(20.0).view(1, 1, 4, 5).expand(8, 2, 4, 5)
    defence = fitted("shuffle", places, spec)
    defence.reseed(3)
    result = defence(places).flatten(2)
    assert torch.equal(result.sort(2).values, places.flatten(2))
    assert torch.equal(result[:, 0], result[:, 1]), "all channels of a place move together"
    assert len({tuple(row.tolist()) for row in result[:, 0]}) == 8, "every image has its own order"
    assert not defence.preserves_positions and fitted("noise:1").preserves_positions


PARTS = ["noise:0.5", "int8", "int4", "1bit", "topk:0.2", "pca:3", "drop:0.5", "pool:2", "shuffle"]


@pytest.mark.parametrize(
    "text", [*PARTS, *map("+".join, itertools.permutations(["noise:0.5", "pca:2", "int8"], 2))]
)
def test_every_defence_keeps_its_promises(text):
    features = maps()
    defence = fitted(text, features)
    defence.reseed(1)
    sent = defence.encode(features)
    shape = defence.sent_spec
    assert sent.shape[1:] == (shape.channels, shape.height, shape.width)
    assert defence.decode(sent).shape == features.shape
    assert 0 < defence.sent_bytes <= defence.plain_bytes
    # What was fitted is in the state dict, so that a deployed copy is the same.
    copy = create_defence(text, SPEC, seed=5)
    copy.load_state_dict(defence.state_dict())
    defence.reseed(2), copy.reseed(2)
    assert torch.equal(defence(features), copy(features))


@pytest.mark.parametrize("text", PARTS)
def test_gradients_pass_for_an_attacker_that_knows_the_weights(text):
    features = maps().requires_grad_()
    fitted(text, features.detach())(features).square().sum().backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_parts_run_from_left_to_right_and_pay_for_what_is_sent():
    features = maps()
    both = fitted("pca:3+int4", features)
    first = fitted("pca:3", features)
    codes = both.encode(features)
    assert all(len(codes[:, c].unique()) <= 16 for c in range(3))
    assert (codes - first.encode(features)).abs().max() > 0
    assert both.sent_bytes == 3 * 80 * 4 // 8
    assert fitted("topk:48+int8").sent_bytes == 48 + math.ceil(min(48 * 9, VALUES) / 8)
    assert fitted("int8+noise:1").sent_bytes == 4 * VALUES, "noise undoes the saving"


@pytest.mark.parametrize(
    "strength",
    [["int8", "int4", "int2"], ["noise:0.1", "noise:0.5", "noise:2"], ["pca:5", "pca:3", "pca:1"]],
)
def test_the_stronger_the_further_from_the_features(strength):
    features = maps()
    errors = []
    for text in strength:
        defence = fitted(text, features)
        defence.reseed(0)
        errors.append(float((defence(features) - features).square().mean()))
    assert errors == sorted(errors) and errors[0] < errors[-1] / 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown defence ''"),
        ("blur", "unknown defence 'blur'.*noise:SCALE.*shuffle"),
        ("int", "unknown defence 'int'"),
        ("int1", "int1 is out of range.*1bit"),
        ("int40", "int40 is out of range"),
        ("noise", "incomplete.*noise:SCALE"),
        ("noise:", "needs a number"),
        ("noise:-1", "noise:-1 is out of range"),
        ("noise:nan", "out of range"),
        ("1bit:3", "incomplete or too long.*1bit"),
        ("int8+", "unknown defence ''"),
        ("topk:0", "topk:0 of model:layer, which has 480 values"),
        ("topk:481", "topk:481"),
        ("pca:7", "has 6 channels"),
        ("pca:0.5", "has 6 channels"),
        ("drop:1.0", "leaves none"),
        ("pool:1", "is 8x10"),
    ],
)
def test_bad_text_is_an_error_that_says_what_to_write(text, message):
    with pytest.raises(AfterimageError, match=message):
        create_defence(text, SPEC)


def test_a_defence_that_was_not_fitted_says_so():
    with pytest.raises(AfterimageError, match="int8 has to be fitted"):
        create_defence("int8", SPEC)(maps())
