"""What the live page shows, without a page: states, links, changed features, refinement, files that are refused."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from afterimage import train_runs
from afterimage.config import AfterimageError, Axis, DataConfig, FeatureSpec, FusionConfig
from afterimage.evaluation.metrics import psnr
from afterimage.experiments import live
from afterimage.experiments.live import LiveDecoder
from afterimage.experiments.live_state import CHANGES, LiveState, examples
from children import small_configs

SPEC = FeatureSpec("model:layer", 3, 4, 4)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A `linear` decoder of a small random encoder, for images of 32 x 32."""
    folder = tmp_path_factory.mktemp("live")
    config = small_configs(folder, weights="random-init")[1]
    config = dataclasses.replace(config, data=DataConfig("photographs", resize=48, crop=32))
    (run,) = train_runs([config], folder / "runs", cache=folder / "cache", accelerator="cpu")
    return LiveDecoder(run, max_pixels=1_000_000)


def show(decoder, **state):
    state = LiveState(**state)
    return decoder.show(state, examples()[state.image], examples()[state.second])


def test_a_link_holds_what_differs_and_gives_the_state_back():
    assert LiveState().query() == ""
    state = LiveState("coffee", pca=30, noise=0.25, bits=2, change="swap", channel=7, left=20, bottom=60)
    query = dict(pair.split("=") for pair in state.query().split("&"))
    assert set(query) == {"image", "pca", "noise", "bits", "change", "channel", "left", "bottom"}
    assert LiveState.from_query(query | {"__theme": "dark"}) == state


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"image": "/etc/passwd"}, "astronaut"),
        ({"bits": "two"}, "bits must be a number"),
        ({"bits": "17"}, "bits must lie between 1 and 16"),
        ({"noise": "nan"}, "noise must lie between"),
        ({"change": "burn"}, "average"),
        ({"bit": "2"}, "bits"),
    ],
)
def test_a_wrong_link_names_what_is_wrong(query, named):
    with pytest.raises(AfterimageError, match=named):
        LiveState.from_query(query)


def test_sliders_are_a_defence_of_the_audit():
    state = LiveState(pca=34, top=10, noise=0.5, bits=1)
    assert state.defence(SPEC) == "pca:1+topk:0.1+noise:0.5+1bit"
    assert LiveState(bits=2).defence(SPEC) == "int2"
    assert LiveState().defence(SPEC) == "none"


def test_a_region_is_the_locations_whose_centres_lie_in_it():
    chosen = LiveState(left=50, bottom=26, channel=1).change_mask(SPEC, (40, 40))
    assert chosen.nonzero().tolist() == [[1, 0, 2], [1, 0, 3]]
    assert LiveState().change_mask(SPEC, (40, 40)).all()
    # The map's cells are 8 pixels wide and begin at pixel 8: centres at 12, 20, 28, 36 of 40.
    shifted = dataclasses.replace(SPEC, columns=Axis(8.0, 8.0, 8, 40))
    assert LiveState(right=50).change_mask(shifted, (40, 40))[0, 0].tolist() == [True, False, False, False]


def test_an_unchanged_state_shows_what_the_decoder_answers(decoder):
    view = show(decoder)
    original = torch.from_numpy(view.original).permute(2, 0, 1)[None] / 255
    answer = decoder.reconstructor.reconstruct(original)
    assert np.array_equal(view.image, answer.mul(255).round()[0].permute(1, 2, 0).byte().numpy())
    assert view.scores["psnr"] == pytest.approx(float(psnr(answer, original)), abs=1e-4)
    assert view.scores["lpips"] is not None or view.lpips.reason
    assert view.change_map is None and view.notes == ()
    brightest = np.unravel_index(view.error.sum(2, dtype=int).argmax(), view.error.shape[:2])
    difference = np.abs(view.image.astype(int) - view.original).mean(2)
    assert difference[brightest] >= 0.9 * min(difference.max(), 64)


@pytest.mark.parametrize("setting", [{"noise": 1}, {"bits": 1}, {"top": 2}, {"pca": 5}])
def test_sending_less_costs_and_can_be_repeated(decoder, setting):
    view, again = show(decoder, **setting), show(decoder, **setting)
    assert view.scores["psnr"] < show(decoder).scores["psnr"]
    assert view.change_map.any() and np.array_equal(view.image, again.image)


def test_fitted_defences_of_all_sources_of_a_fusion_are_kept(tmp_path, monkeypatch):
    config = small_configs(tmp_path, weights="random-init")[1]
    (model, _) = config.sources[0].split(":")
    data, sources = DataConfig("photographs", resize=48, crop=32), (f"{model}:layer1", f"{model}:layer2")
    config = dataclasses.replace(config, data=data, sources=sources, fusion=FusionConfig("aligned"))
    (run,) = train_runs([config], tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    monkeypatch.setattr(live, "CACHE_SIZE", 1)
    create, created = live.create_defence, []
    monkeypatch.setattr(
        live, "create_defence", lambda text, *a, **o: created.append(text) or create(text, *a, **o)
    )
    fused = LiveDecoder(run)
    for _ in range(2):
        show(fused, bits=2)
    assert len(created) == 2


def test_swapping_everything_shows_the_second_image(decoder):
    other = show(decoder, image="coffee").image
    assert np.array_equal(show(decoder, change="swap").image, other)
    assert np.array_equal(show(decoder, change="swap", second="astronaut").image, show(decoder).image)
    half = show(decoder, change="swap", right=50)
    assert np.array_equal(half.image[:, :10], other[:, :10])
    assert np.array_equal(half.image[:, 24:], show(decoder).image[:, 24:])


def test_average_and_zero_lie_where_they_should(decoder):
    features = [
        decoder._features(LiveState(change=change), *list(examples().values())[:2])[0] for change in CHANGES
    ]
    none, zero, swap, average = features
    assert not zero.any() and torch.equal(average, (none + swap) / 2)
    one = decoder._features(LiveState(change="zero", channel=2), *list(examples().values())[:2])[0]
    assert not one[:, 2].any() and torch.equal(one[:, 3:], none[:, 3:])


def test_a_channel_that_a_layer_lacks_changes_nothing_and_is_told(decoder):
    last = decoder.specs[0].channels - 1
    view = show(decoder, change="zero", channel=last + 1)
    assert view.notes == (f"nothing was changed: its channels are 0 to {last}",)
    assert np.array_equal(view.image, show(decoder).image)


def test_refining_starts_at_the_decoder_and_comes_nearer(decoder):
    state = LiveState()
    found = list(decoder.refine(state, examples()["astronaut"], examples()["coffee"], steps=32))
    assert [step for step, _ in found][:3] == [0, 1, 2] and found[-1][0] == 32
    assert np.array_equal(found[0][1].image, show(decoder).image)
    assert found[-1][1].scores["psnr"] > found[0][1].scores["psnr"] + 1


def test_who_moves_a_slider_does_not_wait_for_a_search(decoder):
    images = examples()["astronaut"], examples()["coffee"]
    undisturbed = [view.image for _, view in decoder.refine(LiveState(), *images, steps=40)]
    before = show(decoder, noise=0.5).image
    watched = decoder.refine(LiveState(), *images, steps=40)
    found = []
    for _, view in watched:
        found.append(view.image)
        assert np.array_equal(show(decoder, noise=0.5).image, before)
    assert len(found) == len(undisturbed) and all(map(np.array_equal, found, undisturbed))

    endless = decoder.refine(LiveState(), *images, steps=100_000)
    next(endless)
    assert np.array_equal(show(decoder, noise=0.5).image, before)
    endless.close()


def test_files_that_are_no_images_or_too_large_are_named_without_their_folder(decoder, tmp_path):
    text, large, cut = (tmp_path / name for name in ("text.jpg", "large.png", "cut.png"))
    text.write_text("not an image")
    Image.new("1", (10_000, 10_000)).save(large)
    large.write_bytes(large.read_bytes()[:100])  # refused by what its header says: no pixel of it is decoded
    cut.write_bytes(examples()["astronaut"].read_bytes()[:20_000])
    for path, reason in (
        (text, "is not an image"),
        (large, "has 100.0 megapixels; at most 1"),
        (cut, "is damaged"),
    ):
        with pytest.raises(AfterimageError, match=f"^{path.name}: {reason}"):
            decoder.show(LiveState(image="own"), path, path)
