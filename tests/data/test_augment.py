import colorsys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from mocosfl.config import AugmentSettings
from mocosfl.data.augment import augment, normalise, on_device, policy_of
from mocosfl_device.augment import AugmentParameters, Policy

V1, V2 = (policy_of(AugmentSettings(policy=policy)) for policy in ("v1", "v2"))
GEOMETRY = policy_of(AugmentSettings(jitter_p=0, grey_p=0, blur_p=0))
DRAWS = 20_000
NAMES = [field.name for field in fields(AugmentParameters)]


def random_images(n: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, channels, size, size), dtype=np.float32))


def grey_level_images(n: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """uint8 images from dark to bright and from grey to colourful; the first pixels black, white, grey and primary."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (n, 1, size, size)) * rng.random((n, 1, 1, 1))
    levels = levels + rng.integers(-128, 128, (n, channels, size, size)) * rng.random((n, 1, 1, 1))
    special = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 7)]
    for column, pixel in enumerate(special):
        levels[:, :, 0, column] = pixel[:channels]
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8))


def neutral(n: int, size: int, **changes) -> AugmentParameters:
    """Parameters that change nothing, but for those given."""
    values = {
        "box": (0, 0, size, size),
        "flip": 0,
        "factors": (1, 1, 1),
        "hue": 0,
        "order": (0, 1, 2),
        "hue_place": 0,
        "grey": 0,
        "sigma": 0,
    } | changes
    shapes = {"box": (n, 4), "factors": (n, 3), "order": (n, 3)}
    return AugmentParameters(
        **{
            name: np.broadcast_to(value, shapes.get(name, (n,))).astype(
                np.int64 if name in ("order", "hue_place") else np.float32
            )
            for name, value in values.items()
        }
    )


def chosen(parameters: AugmentParameters, index) -> AugmentParameters:
    return AugmentParameters(*(getattr(parameters, name)[index] for name in NAMES))


def draw(policy: Policy, size: int, n: int, seed: int = 0, view: int = 0) -> AugmentParameters:
    return AugmentParameters.draw(policy, size, seed, np.arange(n) % 7, np.arange(n) // 7, view)


# An augmentation of one image at a time, in float64 and with loops.


def resized_one(image: np.ndarray, box: np.ndarray, flip: float) -> np.ndarray:
    """Pillow on each channel, as float: nothing is rounded."""
    top, left, height, width = (int(value) for value in box)
    size, channels = image.shape[-1], []
    for channel in image.astype(np.float32):
        one = Image.fromarray(channel).crop((left, top, left + width, top + height))
        one = one.resize((size, size), Image.Resampling.BILINEAR)
        channels.append(np.asarray(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else one))
    return np.stack(channels).astype(np.float64)


def luma_one(image: np.ndarray) -> np.ndarray:
    return image[0] if len(image) == 1 else 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def hue_one(image: np.ndarray, turn: float) -> np.ndarray:
    if len(image) == 1:
        return image
    result = np.empty_like(image)
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, i, j])
            result[:, i, j] = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    return result


def jittered_one(image: np.ndarray, factors, hue: float, order, hue_place: int) -> np.ndarray:
    steps = [("brightness", "contrast", "saturation")[kind] for kind in order]
    steps.insert(hue_place, "hue")
    for step in steps:
        if step == "brightness":
            image = image * factors[0]
        elif step == "contrast":
            mean = luma_one(image).mean()
            image = mean + (image - mean) * factors[1]
        elif step == "saturation":
            image = luma_one(image) + (image - luma_one(image)) * factors[2]
        else:
            image = hue_one(image, hue)
        image = image.clip(0, 1)
    return image


def grey_one(image: np.ndarray, on: float) -> np.ndarray:
    return np.stack([luma_one(image)] * len(image)) if on else image


def blurred_one(image: np.ndarray, sigma: float, largest: float) -> np.ndarray:
    if sigma == 0:
        return image
    reach, size = int(np.ceil(3 * largest)), image.shape[-1]
    taps = np.arange(-reach, reach + 1)
    kernel = np.exp(-(taps[:, None] ** 2 + taps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    result = np.empty_like(image)
    for i in range(size):
        for j in range(size):
            window = padded[:, i : i + 2 * reach + 1, j : j + 2 * reach + 1]
            result[:, i, j] = (window * kernel).sum(axis=(1, 2))
    return result


def augmented_one(image: np.ndarray, p: AugmentParameters, i: int, policy: Policy) -> np.ndarray:
    """What MoCo's code does to one image; the flip stands beside the crop because it commutes with the rest."""
    image = resized_one(image, p.box[i], p.flip[i])
    if policy.grey_first:
        image = grey_one(image, p.grey[i])
    image = jittered_one(image, p.factors[i].astype(float), float(p.hue[i]), p.order[i], int(p.hue_place[i]))
    if not policy.grey_first:
        image = grey_one(image, p.grey[i])
    return blurred_one(image, float(p.sigma[i]), policy.blur_sigma[1])


def assert_close(found: torch.Tensor, expected: np.ndarray, atol: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


# The whole


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_a_batch_equals_one_image_at_a_time(policy: Policy, size: int, channels: int) -> None:
    images = grey_level_images(40, channels, size)
    p = draw(policy, size, 40)
    expected = [augmented_one(image.numpy() / 255, p, i, policy) for i, image in enumerate(images)]
    assert_close(augment(images, p, policy), np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_neutral_parameters_change_nothing(channels: int, kind: torch.dtype) -> None:
    images = grey_level_images(5, channels, 32)
    as_float = images.float() / 255
    given = images if kind == torch.uint8 else as_float
    found = augment(given, neutral(5, 32), V2)
    assert found.shape == images.shape
    torch.testing.assert_close(found, as_float, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_uint8_and_float_agree_and_are_left_as_they_were(policy: Policy) -> None:
    images = grey_level_images(30, 3, 8)
    p, as_float = draw(policy, 8, 30), images.float() / 255
    kept = images.clone(), as_float.clone(), {name: getattr(p, name).copy() for name in NAMES}
    assert torch.equal(augment(images, p, policy), augment(as_float, p, policy))
    assert torch.equal(images, kept[0])
    assert torch.equal(as_float, kept[1])
    for name in NAMES:
        np.testing.assert_array_equal(getattr(p, name), kept[2][name])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("level", [0, 1, None], ids=["black", "white", "noise"])
def test_the_result_stays_between_0_and_1(level: int | None, policy: Policy, channels: int) -> None:
    if level is None:
        images = random_images(200, channels, 13).round()
    else:
        images = torch.full((200, channels, 13, 13), float(level))
    strong = replace(policy, brightness=2.0, contrast=2.0, saturation=2.0, hue=0.5)
    for used in policy, strong:
        found = augment(images, draw(used, 13, 200), used)
        assert found.isfinite().all()
        assert found.min() >= -1e-6
        assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_a_batch_equals_each_image_alone_in_any_order(policy: Policy, channels: int) -> None:
    images, p = random_images(24, channels, 13), draw(policy, 13, 24)
    together = augment(images, p, policy)
    alone = torch.cat([augment(images[i : i + 1], chosen(p, [i]), policy) for i in range(24)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    shuffled = np.random.default_rng(0).permutation(24)
    again = augment(images[shuffled], chosen(p, shuffled), policy)
    torch.testing.assert_close(again, together[shuffled], rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_two_views_of_an_image_differ(policy: Policy) -> None:
    images = random_images(50, 3, 32)
    one, other = (augment(images, draw(policy, 32, 50, view=view), policy) for view in (0, 1))
    assert ((one - other).abs().amax(dim=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_every_image_of_a_batch_is_changed_in_its_own_way(policy: Policy) -> None:
    image = random_images(1, 3, 32).expand(50, -1, -1, -1)
    views = augment(image, draw(policy, 32, 50), policy).flatten(1)
    apart = (views[:, None] - views).abs().amax(dim=2)
    assert (apart[~torch.eye(50, dtype=torch.bool)] > 0.05).all()


# Geometry


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 13, 32])
def test_crop_resize_and_flip_equal_pillow(size: int, channels: int) -> None:
    images, p = random_images(150, channels, size), draw(GEOMETRY, size, 150)
    assert 0 < p.flip.sum() < 150
    expected = [resized_one(image.numpy(), p.box[i], p.flip[i]) for i, image in enumerate(images)]
    assert_close(augment(images, p, GEOMETRY), np.stack(expected))


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (12, 12, 1, 1), (5, 0, 1, 13), (0, 7, 13, 1), (0, 0, 13, 13), (3, 4, 10, 9)]
)
def test_extreme_crops_equal_pillow(box: tuple[int, ...], flip: int) -> None:
    images = random_images(2, 3, 13)
    expected = [resized_one(image.numpy(), np.array(box), flip) for image in images]
    assert_close(augment(images, neutral(2, 13, box=box, flip=flip), V2), np.stack(expected))


def test_nothing_outside_the_crop_is_read() -> None:
    images = random_images(1, 3, 13)
    p = neutral(1, 13, box=(3, 4, 6, 5))
    changed = torch.zeros_like(images)
    changed[:, :, 3:9, 4:9] = images[:, :, 3:9, 4:9]
    assert torch.equal(augment(images, p, V2), augment(changed, p, V2))


@pytest.mark.parametrize("size", [8, 13])
def test_a_flip_comes_last_without_loss(size: int) -> None:
    images, p = random_images(60, 3, size), draw(V2, size, 60)
    unflipped = augment(images, replace(p, flip=np.zeros_like(p.flip)), V2)
    flips = torch.from_numpy(p.flip)[:, None, None, None] > 0
    expected = torch.where(flips, unflipped.flip(3), unflipped)
    torch.testing.assert_close(augment(images, p, V2), expected, rtol=0, atol=1e-6)


# Colour

ORDERS = [
    (order, place) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)) for place in range(4)
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.4, 1.0, 3.0])
def test_jitter_in_every_order_equals_one_image_at_a_time(strength: float, channels: int) -> None:
    rng, n = np.random.default_rng(1), 2 * len(ORDERS)
    images = grey_level_images(n, channels, 8)
    p = neutral(
        n,
        8,
        factors=rng.uniform(max(0, 1 - strength), 1 + strength, (n, 3)),
        hue=rng.uniform(-0.5, 0.5, n),
        order=np.array([order for order, _ in ORDERS] * 2),
        hue_place=np.array([place for _, place in ORDERS] * 2),
    )
    expected = [
        jittered_one(image.numpy() / 255, p.factors[i].astype(float), float(p.hue[i]), p.order[i], int(p.hue_place[i]))
        for i, image in enumerate(images)
    ]
    assert_close(augment(images, p, V2), np.stack(expected), atol=2e-5)


def test_the_order_matters() -> None:
    images = random_images(1, 3, 8).expand(len(ORDERS), -1, -1, -1)
    p = neutral(
        len(ORDERS),
        8,
        factors=(1.6, 0.5, 1.7),
        hue=0.3,
        order=np.array([order for order, _ in ORDERS]),
        hue_place=np.array([place for _, place in ORDERS]),
    )
    views = augment(images, p, V2).flatten(1)
    assert len(torch.unique(views, dim=0)) == len(ORDERS)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.6, 0.95, 1.0, 1.2, 1.4, 2.5])
@pytest.mark.parametrize(
    ("kind", "enhancer"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_each_factor_equals_pillow_within_two_grey_levels(kind: int, enhancer, factor: float) -> None:
    images = grey_level_images(10, 3, 32)
    factors = np.ones(3)
    factors[kind] = factor
    found = augment(images, neutral(10, 32, factors=factors), V2).permute(0, 2, 3, 1) * 255
    for image, ours in zip(images, found, strict=True):
        pillow = enhancer(Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor)
        # Pillow rounds the luma or its mean to a grey level, and |1 - factor| of that is in the result.
        np.testing.assert_allclose(ours.numpy(), np.asarray(pillow, float), rtol=0, atol=2)


def test_grey_equals_pillow_within_a_grey_level() -> None:
    images = grey_level_images(20, 3, 32)
    found = augment(images, neutral(20, 32, grey=1), V2) * 255
    for image, ours in zip(images, found, strict=True):
        pillow = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"), float)
        np.testing.assert_allclose(ours.numpy(), np.stack([pillow] * 3), rtol=0, atol=0.51)


def test_only_the_chosen_images_turn_grey() -> None:
    images = random_images(6, 3, 8)
    found = augment(images, neutral(6, 8, grey=np.array([1, 0, 0, 1, 0, 1])), V2)
    spread = (found.amax(1) - found.amin(1)).amax(dim=(1, 2))
    np.testing.assert_array_equal(spread.numpy() == 0, [True, False, False, True, False, True])
    torch.testing.assert_close(found[[1, 2, 4]], images[[1, 2, 4]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("turn", [-0.5, -0.4, -1 / 3, -0.1, 0.0, 0.05, 1 / 6, 1 / 3, 0.5])
def test_a_turn_of_the_hue_equals_colorsys(turn: float) -> None:
    images = grey_level_images(6, 3, 8)
    p = neutral(6, 8, hue=turn)
    expected = [hue_one(image.numpy() / 255, float(p.hue[0])) for image in images]
    assert_close(augment(images, p, V2), np.stack(expected))


def test_a_third_of_a_turn_moves_the_channels_on() -> None:
    images = random_images(3, 3, 8)
    found = augment(images, neutral(3, 8, hue=1 / 3), V2)
    torch.testing.assert_close(found, images[:, [2, 0, 1]], rtol=0, atol=2e-6)


def test_v1_turns_grey_before_the_jitter_and_v2_after() -> None:
    images = random_images(4, 3, 8)
    p = neutral(4, 8, grey=1, factors=(1.3, 1, 1.4), hue=0.3)
    grey = np.stack([grey_one(image.numpy().astype(float), 1) for image in images])
    assert_close(augment(images, p, V1), (1.3 * grey).clip(0, 1))
    jittered = [jittered_one(image.numpy().astype(float), (1.3, 1, 1.4), 0.3, (0, 1, 2), 0) for image in images]
    after = np.stack([grey_one(image, 1) for image in jittered])
    assert_close(augment(images, p, V2), after)
    assert np.abs(after - (1.3 * grey).clip(0, 1)).max() > 0.05


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_hue_saturation_and_grey_leave_one_channel_alone(policy: Policy) -> None:
    images, p = random_images(60, 1, 8), draw(policy, 8, 60)
    without = replace(
        p,
        factors=p.factors * [1, 1, 0] + np.float32([0, 0, 1]),
        hue=np.zeros_like(p.hue),
        hue_place=np.zeros_like(p.hue_place),
        grey=np.zeros_like(p.grey),
    )
    without = replace(without, factors=without.factors.astype(np.float32))
    torch.testing.assert_close(augment(images, p, policy), augment(images, without, policy), rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_one_channel_equals_three_equal_channels(policy: Policy) -> None:
    images, p = random_images(60, 1, 8), draw(policy, 8, 60)
    one = augment(images, p, policy)
    assert one.shape == (60, 1, 8, 8)
    three = augment(images.expand(-1, 3, -1, -1), p, policy)
    torch.testing.assert_close(three, one.expand(-1, 3, -1, -1), rtol=0, atol=2e-6)


# Blur


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "sigmas"), [(8, (0.1, 0.3, 0.8, 1.5, 2.0)), (32, (0.1, 0.6, 2.0))])
def test_blur_equals_direct_convolution_with_repeated_edges(
    size: int, sigmas: tuple[float, ...], channels: int
) -> None:
    images = random_images(len(sigmas), channels, size)
    p = neutral(len(sigmas), size, sigma=np.array(sigmas))
    expected = [
        blurred_one(image.numpy().astype(float), float(s), 2.0) for image, s in zip(images, p.sigma, strict=True)
    ]
    assert_close(augment(images, p, V2), np.stack(expected))


@pytest.mark.parametrize("largest", [0.2, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("size", [8, 32])
def test_blur_equals_scipy(size: int, largest: float) -> None:
    sigmas = np.linspace(0.1, largest, 6)
    images, p = random_images(6, 3, size), neutral(6, size, sigma=sigmas)
    policy = replace(V2, blur_sigma=(0.1, largest))
    expected = [
        gaussian_filter(
            image.numpy().astype(float),
            (0, float(sigma), float(sigma)),
            mode="nearest",
            radius=(0, int(np.ceil(3 * largest)), int(np.ceil(3 * largest))),
        )
        for image, sigma in zip(images, p.sigma, strict=True)
    ]
    assert_close(augment(images, p, policy), np.stack(expected))


@pytest.mark.parametrize("size", [8, 32])
def test_sigma_0_leaves_the_image_untouched_beside_blurred_ones(size: int) -> None:
    images = random_images(4, 3, size)
    found = augment(images, neutral(4, size, sigma=np.array([0, 1.5, 0, 0.7])), V2)
    unblurred = augment(images, neutral(4, size), replace(V2, blur_p=0))
    assert torch.equal(found[[0, 2]], unblurred[[0, 2]])
    assert ((found - unblurred)[[1, 3]].abs().amax(dim=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("size", [8, 32])
def test_blur_keeps_a_plain_image(size: int) -> None:
    images = torch.full((5, 3, size, size), 0.7)
    p = neutral(5, size, sigma=np.array([0.1, 0.5, 1, 1.5, 2]))
    torch.testing.assert_close(augment(images, p, V2), images, rtol=0, atol=1e-6)


# Policies


def test_the_policies_have_their_published_values() -> None:
    shared = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "grey_p": 0.2, "flip_p": 0.5}
    shared["blur_sigma"] = (0.1, 2.0)
    assert Policy(**shared, crop_scale=(0.2, 1.0), hue=0.4, jitter_p=1.0, blur_p=0.0, grey_first=True) == policy_of(
        AugmentSettings(policy="v1")
    )
    assert Policy(**shared, crop_scale=(0.08, 1.0), hue=0.1, jitter_p=0.8, blur_p=0.5, grey_first=False) == policy_of(
        AugmentSettings(policy="v2")
    )


def test_version_2_is_the_default() -> None:
    assert policy_of(AugmentSettings()) == V2


@pytest.mark.parametrize("policy", ["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", (0.5, 0.6)),
        ("brightness", 0.0),
        ("contrast", 1.5),
        ("saturation", 0.0),
        ("hue", 0.0),
        ("jitter_p", 0.0),
        ("grey_p", 0.0),
        ("blur_p", 1.0),
        ("blur_p", 0.0),
        ("blur_sigma", (0.2, 0.3)),
        ("flip_p", 0.0),
    ],
)
def test_a_setting_replaces_the_policys_value_and_no_other(policy: str, name: str, value) -> None:
    published = policy_of(AugmentSettings(policy=policy))
    assert policy_of(AugmentSettings(policy=policy, **{name: value})) == replace(published, **{name: value})


# Parameters


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_a_views_parameters_do_not_depend_on_the_batch(policy: Policy) -> None:
    clients, draws, views = np.array([5, 0, 5, 99]), np.array([0, 3, 1000, 3]), np.array([0, 1, 0, 1])
    together = AugmentParameters.draw(policy, 32, 4, clients, draws, views)
    backwards = AugmentParameters.draw(policy, 32, 4, clients[::-1], draws[::-1], views[::-1])
    for i in range(4):
        alone = AugmentParameters.draw(policy, 32, 4, int(clients[i]), int(draws[i]), int(views[i]))
        for name in NAMES:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[i])
            np.testing.assert_array_equal(getattr(backwards, name)[3 - i], getattr(together, name)[i])


def test_client_draw_and_view_broadcast_row_by_row() -> None:
    clients, draws = np.array([2, 7, 4]), np.arange(10, 14)
    table = AugmentParameters.draw(V2, 32, 0, clients[:, None], draws, 1)
    flat = AugmentParameters.draw(V2, 32, 0, np.repeat(clients, 4), np.tile(draws, 3), np.ones(12, int))
    for name in NAMES:
        assert len(getattr(table, name)) == 12
        np.testing.assert_array_equal(getattr(table, name), getattr(flat, name))


@pytest.mark.parametrize("other", [{"seed": 1}, {"client": 1}, {"draw": 1}, {"view": 1}])
def test_seed_client_draw_and_view_each_change_the_parameters(other: dict[str, int]) -> None:
    names = {"seed": 0, "client": 0, "draw": 0, "view": 0}
    one, another = (AugmentParameters.draw(V2, 32, **given) for given in (names, names | other))
    assert not np.array_equal(one.box, another.box)


def test_parameters_are_pinned() -> None:
    p = AugmentParameters.draw(V2, 32, 5, [0, 3, 3], [0, 17, 17], [0, 0, 1])
    np.testing.assert_array_equal(p.box, [[1, 3, 31, 29], [4, 1, 28, 31], [3, 4, 25, 25]])
    np.testing.assert_array_equal(p.flip, [1, 0, 1])
    np.testing.assert_array_equal(p.order, [[2, 1, 0], [2, 1, 0], [2, 1, 0]])
    np.testing.assert_array_equal(p.hue_place, [2, 1, 1])
    np.testing.assert_array_equal(p.grey, [0, 0, 0])
    factors = [[0.788369238, 0.875071168, 0.965323746], [1, 1, 1], [1.146312952, 1.279801607, 1.281523943]]
    np.testing.assert_allclose(p.factors, factors, rtol=1e-6)
    np.testing.assert_allclose(p.hue, [0.0906011835, 0, -0.0203088522], rtol=1e-6)
    np.testing.assert_allclose(p.sigma, [1.6816895, 0, 0], rtol=1e-6)


def test_parameters_have_the_types_and_shapes_they_promise() -> None:
    p = draw(V2, 32, 9)
    for name in NAMES:
        value = getattr(p, name)
        assert value.dtype == (np.int64 if name in ("order", "hue_place") else np.float32), name
        assert value.shape == {"box": (9, 4), "factors": (9, 3), "order": (9, 3)}.get(name, (9,)), name
    for name, tensor in on_device(p, torch.device("cpu")).items():
        np.testing.assert_array_equal(tensor.numpy(), getattr(p, name))


# Distributions, over 20,000 draws


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: the greatest distance from the uniform distribution is one that chance explains."""
    unit = (np.sort(values.astype(float)) - low) / (high - low)
    assert unit[0] >= -1e-6
    assert unit[-1] <= 1 + 1e-6
    assert np.abs(unit - (np.arange(len(unit)) + 0.5) / len(unit)).max() < 2 / np.sqrt(len(unit))


def assert_share(events: np.ndarray, p: float) -> None:
    assert abs(events.mean() - p) <= 4 * np.sqrt(p * (1 - p) / len(events))


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_every_step_happens_as_often_as_the_policy_says(policy: Policy) -> None:
    p = draw(policy, 32, DRAWS)
    assert set(np.unique(p.flip)) == set(np.unique(p.grey)) == {0, 1}
    assert_share(p.flip == 1, policy.flip_p)
    assert_share(p.grey == 1, policy.grey_p)
    assert_share(p.sigma > 0, policy.blur_p)
    assert_share((p.factors != 1).any(axis=1), policy.jitter_p)
    np.testing.assert_array_equal((p.factors != 1).any(axis=1), p.hue != 0)  # all of the jitter or nothing


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probabilities_are_settings(probability: float) -> None:
    names = ("jitter_p", "grey_p", "blur_p", "flip_p")
    p = draw(policy_of(AugmentSettings(**dict.fromkeys(names, probability))), 32, DRAWS)
    for happened in (p.hue != 0, p.grey > 0, p.sigma > 0, p.flip > 0):
        assert_share(happened, probability)


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_strengths_are_uniform_where_the_step_happens(policy: Policy) -> None:
    p = draw(policy, 32, DRAWS)
    jittered = p.hue != 0
    for kind in range(3):
        assert_uniform(p.factors[jittered, kind], 0.6, 1.4)
    assert_uniform(p.hue[jittered], -policy.hue, policy.hue)
    if policy.blur_p:
        assert_uniform(p.sigma[p.sigma > 0], 0.1, 2.0)


def test_a_strength_above_1_never_makes_a_factor_negative() -> None:
    p = draw(replace(V1, brightness=1.5, contrast=1.0, saturation=0.0), 32, DRAWS)
    assert_uniform(p.factors[:, 0], 0, 2.5)
    assert_uniform(p.factors[:, 1], 0, 2)
    np.testing.assert_array_equal(p.factors[:, 2], 1)


def test_all_24_orders_of_the_jitter_are_equally_frequent() -> None:
    p = draw(V2, 32, DRAWS)
    np.testing.assert_array_equal(np.sort(p.order, axis=1), np.tile([0, 1, 2], (DRAWS, 1)))
    _, counts = np.unique(np.column_stack([p.order, p.hue_place]), axis=0, return_counts=True)
    assert len(counts) == 24
    assert set(p.hue_place) == {0, 1, 2, 3}
    assert ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 23 + 4 * np.sqrt(2 * 23)


@pytest.mark.parametrize("size", [8, 32, 512])
@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_crops_lie_inside_the_image_and_within_area_and_aspect(policy: Policy, size: int) -> None:
    top, left, height, width = draw(policy, size, DRAWS).box.astype(float).T
    for value in (top, left, height, width):
        np.testing.assert_array_equal(value, np.rint(value))
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() == (left + width).max() == size
    # Each side is rounded by half a pixel at most.
    assert ((height + 0.5) * (width + 0.5) >= policy.crop_scale[0] * size**2).all()
    assert ((height + 0.5) / (width - 0.5) >= 3 / 4).all()
    assert ((width + 0.5) / (height - 0.5) >= 3 / 4).all()


def test_area_and_aspect_are_uniform_where_every_crop_fits() -> None:
    size = 4096  # rounding to pixels is negligible
    box = draw(replace(V2, crop_scale=(0.1, 0.5)), size, DRAWS).box.astype(float)
    top, left, height, width = box.T
    area, aspect = np.log(height) + np.log(width), np.log(width / height)
    assert_uniform(np.exp(area) / size**2, 0.1 - 1e-3, 0.5 + 1e-3)
    assert_uniform(aspect, np.log(3 / 4) - 1e-3, np.log(4 / 3) + 1e-3)
    assert_uniform((top + 0.5) / (size - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (size - width + 1), 0, 1)
    together = np.corrcoef([area, aspect, top / (size - height), left / (size - width)])
    assert np.abs(together - np.eye(4)).max() < 4 / np.sqrt(DRAWS)


@pytest.mark.parametrize("policy", [V1, V2], ids=["v1", "v2"])
def test_crops_are_distributed_as_those_of_a_plain_loop(policy: Policy) -> None:
    """Where not every try fits, large crops are rarer: as in the loop of torchvision's RandomResizedCrop."""
    size, rng, loop = 32, np.random.default_rng(0), []
    for _ in range(DRAWS):
        height = width = size
        for _ in range(10):
            area = size**2 * rng.uniform(*policy.crop_scale)
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= size and 0 < h <= size:
                height, width = h, w
                break
        loop.append((height, width))
    ours, theirs = draw(policy, size, DRAWS).box[:, 2:].astype(float), np.array(loop, float)
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 0] * b[:, 1], lambda b: b[:, 0] / b[:, 1]):
        one, other = np.sort(measure(ours)), np.sort(measure(theirs))
        points = np.union1d(one, other)
        apart = np.searchsorted(one, points, "right") - np.searchsorted(other, points, "right")
        assert np.abs(apart).max() / DRAWS < 2 * np.sqrt(2 / DRAWS)


def test_a_crop_of_the_whole_area_is_the_image() -> None:
    whole = replace(GEOMETRY, crop_scale=(1.0, 1.0), flip_p=0)
    p = draw(whole, 8, 200)
    np.testing.assert_array_equal(p.box, np.tile([0, 0, 8, 8], (200, 1)))
    images = random_images(200, 1, 8)
    torch.testing.assert_close(augment(images, p, whole), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("other", ["view", "draw", "client"])
def test_parameters_of_neighbours_are_uncorrelated(other: str) -> None:
    names = {"client": 3, "draw": np.arange(DRAWS), "view": 0}
    shifted = names | {other: names[other] + 1}
    table = []
    for given in (names, shifted):
        p = AugmentParameters.draw(V1, 32, 0, **given)
        table += [p.box[:, 2], p.box[:, 0], p.box[:, 1], p.flip, *p.factors.T, p.hue, p.order[:, 0], p.grey]
    across = np.corrcoef(table)[:10, 10:]
    assert np.abs(across).max() < 4.5 / np.sqrt(DRAWS)


def test_steps_are_independent_of_each_other() -> None:
    p = draw(V2, 32, DRAWS)
    steps = [p.flip, p.hue != 0, p.grey, p.sigma > 0, p.order[:, 0], p.hue_place, p.box[:, 2] * p.box[:, 3]]
    assert np.abs(np.corrcoef(steps) - np.eye(7)).max() < 4.5 / np.sqrt(DRAWS)


# Normalisation


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_takes_off_each_channels_mean_and_spread(channels: int) -> None:
    images = random_images(5, channels, 8)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:channels], torch.tensor([0.2, 0.25, 0.3])[:channels]
    found = normalise(images, mean, std)
    assert found.shape == images.shape
    for c in range(channels):
        expected = (images[:, c].double() - mean[c].double()) / std[c].double()
        torch.testing.assert_close(found[:, c].double(), expected, rtol=0, atol=1e-6)


def test_normalised_images_have_mean_0_and_spread_1() -> None:
    images = random_images(50, 3, 13)
    found = normalise(images, images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3)))
    torch.testing.assert_close(found.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)
