import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from d4m_plugin import InputError
from d4m_plugin.sources.images import natural_size, read_image, squares_of, to_pixels, to_rgb
from tests.toys import Squares


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixel(image, place=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(place)


GREY_16 = Image.fromarray(np.full((2, 3), 128 * 257, np.uint16))
PALETTE = Image.new("RGB", (3, 2), (200, 30, 60)).quantize(4)
PALETTE_CLEAR = Image.new("P", (3, 2), 1)
PALETTE_CLEAR.putpalette([0, 0, 0, 200, 30, 60])
PALETTE_CLEAR.info["transparency"] = 1


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (3, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("LA", (3, 2), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (3, 2), (100, 255)), "PNG", (100, 100, 100)),
        (Image.new("RGBA", (3, 2), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),  # a fifth of black over white
        (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
        (PALETTE, "PNG", (200, 30, 60)),
        (PALETTE_CLEAR, "PNG", (255, 255, 255)),
        (PALETTE, "GIF", (200, 30, 60)),
        (GREY_16, "PNG", (128, 128, 128)),
        (GREY_16, "TIFF", (128, 128, 128)),
        (Image.new("I", (3, 2), 65535), "TIFF", (255, 255, 255)),
        (Image.new("I", (3, 2), 77), "TIFF", (77, 77, 77)),
        (Image.new("F", (3, 2), 0.5), "TIFF", (128, 128, 128)),
        (Image.new("F", (3, 2), 77.0), "TIFF", (77, 77, 77)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("YCbCr", (3, 2), (128, 128, 128)), "JPEG", (128, 128, 128)),
        (Image.new("RGB", (3, 2), (9, 99, 199)), "WEBP", (9, 99, 199)),
        (Image.new("RGB", (3, 2), (9, 99, 199)), "JPEG2000", (9, 99, 199)),
        (Image.new("RGB", (3, 2), (9, 99, 199)), "BMP", (9, 99, 199)),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(image, kind, expected):
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    found = pixel(read_image(saved(image, kind, **options), "image"))
    assert np.abs(np.subtract(found, expected)).max() <= 1


def test_lab_is_converted_as_its_colour_space_says():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (3, 2), (200, 30, 60)), srgb, lab, outputMode="LAB")
    found = pixel(read_image(saved(image, "TIFF"), "image"))
    assert np.abs(np.subtract(found, (200, 30, 60))).max() <= 3  # LAB has 8 bits too


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_deep_pictures_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 1, 256, dtype=np.float64)[None].repeat(2, 0)
    values = (ramp * 65535).astype(kind) if kind == np.uint16 else ramp.astype(kind)
    levels = np.asarray(read_image(saved(Image.fromarray(values), "TIFF"), "image"))[0, :, 0]
    assert np.abs(levels.astype(int) - np.arange(256)).max() <= 1


def test_floats_beyond_a_byte_are_scaled_from_their_own_range():
    values = np.array([[-1000.0, 0.0, 3000.0, np.nan]], np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 64, 255, 64]


def test_exif_turns_a_picture_upright():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = read_image(saved(image, "PNG", exif=exif), "image")
    assert (upright.size, pixel(upright, (1, 0))) == ((2, 4), (255, 0, 0))


def test_a_picture_with_broken_exif_is_shown_as_it_is():
    file = saved(Image.new("RGB", (4, 2), (9, 9, 9)), "PNG", exif=b"Exif\x00\x00no tags at all")
    assert pixel(read_image(file, "image")) == (9, 9, 9)


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "lime")]
    assert pixel(read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "image")) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "header"])
def test_a_broken_file_is_named(content):
    with pytest.raises(InputError, match=r"'a/b.png' cannot be read as an image"):
        read_image(io.BytesIO(content), "a/b.png")


def test_a_truncated_file_is_named():
    whole = saved(Image.effect_noise((64, 64), 90), "JPEG").getvalue()
    with pytest.raises(InputError, match=r"'x.jpg' cannot be read as an image .*truncated"):
        read_image(io.BytesIO(whole[: len(whole) // 2]), "x.jpg")


def test_a_bomb_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"'bomb.png' cannot be read .*decompression bomb"):
        read_image(saved(Image.new("L", (10, 10)), "PNG"), "bomb.png")


@pytest.mark.filterwarnings("error")
def test_a_huge_picture_is_no_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert read_image(saved(Image.new("L", (10, 10)), "PNG"), "huge.png").size == (10, 10)


def stripes(width, height):
    """A picture whose left, middle and right (or top, middle and bottom) thirds are red, green and blue."""
    colours = np.zeros((height, width, 3), np.uint8)
    along = colours if width < height else colours.swapaxes(0, 1)
    for third, place in enumerate(np.array_split(np.arange(max(width, height)), 3)):
        along[place, :, third] = 255
    return Image.fromarray(colours)


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (3, 1), (1, 3000)], ids=str)
def test_crop_keeps_the_middle_and_squash_keeps_all(size):
    image = stripes(*size)
    cropped, squashed = to_pixels(image, 9), to_pixels(image, 9, "squash")
    assert cropped.dtype == torch.uint8
    assert cropped.shape == squashed.shape == (3, 9, 9)
    assert cropped[:, 4, 4].tolist() == [0, 255, 0]
    assert cropped.float().mean((1, 2)).argmax() == 1
    assert squashed.float().mean((1, 2)).numpy() == pytest.approx([85, 85, 85], abs=6)


def test_pixels_of_the_right_size_are_left_alone():
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert torch.equal(to_pixels(Image.fromarray(values), 16), torch.from_numpy(values).permute(2, 0, 1))


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [8, 40])
def test_resizing_is_bicubic_with_antialiasing(resize, size):
    """A quadratic ramp keeps its shape where a bilinear or nearest filter would show steps."""
    ramp = np.round(np.linspace(0, 1, 32) ** 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(ramp, (32, 1))[..., None], 3, 2))
    places = (np.arange(size) + 0.5) * 32 / size - 0.5
    expected = (np.clip(places, 0, 31) / 31) ** 2 * 255
    inner = slice(2, -2)
    found = to_pixels(image, size, resize)[0, size // 2].numpy()
    assert np.abs(found[inner] - expected[inner]).max() < 3.5


def test_the_natural_size_is_the_median_shorter_edge_up_to_224():
    def images(*edges):
        return type("Images", (list,), {"targets": [0] * len(edges)})([(Image.new("L", (e, e + 9)), 0) for e in edges])

    assert natural_size(images(20, 28, 90)) == 28
    assert natural_size(images(500, 600)) == 224


@pytest.mark.parametrize("chosen", [None, [100, 3, 3, 2, 1], []])
def test_processes_read_the_same_squares(chosen, monkeypatch):
    images = Squares(per_class=40).train()
    monkeypatch.setattr("d4m_plugin.sources.images.READ_AT_ONCE", 2)
    before = torch.get_rng_state()
    assert torch.equal(squares_of(images, 8, chosen=chosen, num_workers=2), squares_of(images, 8, chosen=chosen))
    assert torch.equal(torch.get_rng_state(), before)  # a training may go on with it
