"""Images from folders, tar shards, Hugging Face data sets and arrays; ADM's crop; and what is wrong with them."""

import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from lwd.data import image_archives, images  # noqa: E402
from lwd.data.embedded import load_embedded_images  # noqa: E402
from lwd.data.image_archives import HubImages, TarImages  # noqa: E402
from lwd.data.images import (  # noqa: E402
    ArrayImages,
    FolderImages,
    ImageError,
    crop_to_array,
    decode_image,
    open_images,
    read_class_names,
)

CLASSES = ("cat", "dog", "eel")


def pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(array: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze()).save(buffer, form, **options)
    return buffer.getvalue()


# Three classes of 3, 2 and 4 images, each of its own size.
FILES = {
    f"{name}/{i:03}.png": encoded(pixels(10 * label + i, 8 + i, 9 + label))
    for label, (name, count) in enumerate(zip(CLASSES, (3, 2, 4), strict=True))
    for i in range(count)
}
NAMES = list(FILES)
LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2]


def write_folder(root: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes] = FILES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def webdataset(files: dict[str, bytes] = FILES, suffix: str = "cls") -> dict[str, bytes]:
    members = {}
    for name, data in files.items():
        label = CLASSES.index(name.partition("/")[0])
        members[name] = data
        members[name.replace("png", suffix)] = (
            f"{label}\n" if suffix == "cls" else json.dumps({"label": label, "caption": "x"})
        ).encode()
    return members


def hub_dataset(files: dict[str, bytes] = FILES, named: bool = True):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    rows = {
        "image": [{"bytes": data, "path": name.rpartition("/")[2] if named else None} for name, data in files.items()],
        "label": [CLASSES.index(name.partition("/")[0]) for name in files],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(autouse=True)
def _hub_cache(tmp_path, monkeypatch):
    """Parquet files are unpacked below the test's own folder."""
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path / ".hub")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / ".hub"))


# --- ADM's crop --------------------------------------------------------------------------------------------------


def reference_crop(rgb: Image.Image, size: int) -> np.ndarray:
    """The three steps as the paper's appendix and code state them, on whole arrays."""
    while min(rgb.size) >= 2 * size:
        rgb = rgb.resize((rgb.size[0] // 2, rgb.size[1] // 2), Image.BOX)
    factor = size / min(rgb.size)
    rgb = rgb.resize((round(rgb.size[0] * factor), round(rgb.size[1] * factor)), Image.BICUBIC)
    array = np.asarray(rgb)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (16, 16, 16),  # nothing to do
        (32, 32, 16),  # exactly twice: halved once
        (31, 45, 16),  # just below twice: bicubic only
        (100, 67, 16),  # halved twice, odd sides
        (67, 131, 16),
        (9, 21, 16),  # upscaled
        (1, 3, 5),
        (200, 64, 32),
    ],
)
def test_the_crop_is_adms(height, width, size):
    image = Image.fromarray(pixels(height, height, width))
    cropped = crop_to_array(image, size)
    assert cropped.dtype == torch.uint8
    assert cropped.shape == (3, size, size)
    assert cropped.is_contiguous()
    assert np.array_equal(cropped.permute(1, 2, 0).numpy(), reference_crop(image, size))
    grey = crop_to_array(image, size, channels=1)
    assert np.array_equal(grey[0].numpy(), reference_crop(image.convert("L"), size))


def test_an_exact_halving_is_the_mean_of_squares_and_an_equal_size_changes_nothing():
    array = pixels(0, 8, 8)
    assert np.array_equal(crop_to_array(Image.fromarray(array), 8).permute(1, 2, 0).numpy(), array)
    rows = (array[:, 0::2].astype(int) + array[:, 1::2] + 1) // 2  # Pillow rounds after each direction
    means = (rows[0::2] + rows[1::2] + 1) // 2
    assert np.array_equal(crop_to_array(Image.fromarray(array), 4).permute(1, 2, 0).numpy(), means)


def test_a_wide_image_loses_as_much_on_both_sides():
    columns = np.zeros((4, 9, 3), dtype=np.uint8)
    columns[:] = np.arange(9, dtype=np.uint8)[None, :, None]
    assert crop_to_array(Image.fromarray(columns), 4)[0, 0].tolist() == [2, 3, 4, 5]  # (9 - 4) // 2 = 2 on the left


def test_modes_become_colours():
    grey = pixels(1, 8, 8, 1)[..., 0]
    image = Image.fromarray(grey)
    assert np.array_equal(crop_to_array(image, 8), np.stack([grey] * 3))
    assert np.array_equal(crop_to_array(image, 8, channels=1)[0], grey)

    rgba = pixels(2, 8, 8, 4)
    assert np.array_equal(crop_to_array(Image.fromarray(rgba), 8).permute(1, 2, 0), rgba[..., :3])

    cmyk = Image.fromarray(pixels(3, 8, 8)).convert("CMYK")
    assert np.array_equal(crop_to_array(cmyk, 8).permute(1, 2, 0), pixels(3, 8, 8))

    indices = pixels(4, 8, 8, 1)[..., 0] % 4
    palette = np.array([[10, 20, 30], [255, 0, 0], [0, 255, 0], [7, 7, 9]], dtype=np.uint8)
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette(palette.tobytes())
    assert np.array_equal(crop_to_array(image, 8).permute(1, 2, 0), palette[indices])
    grey_of_palette = crop_to_array(image, 8, channels=1)
    image.info["transparency"] = bytes([0, 255, 128, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(crop_to_array(image, 8).permute(1, 2, 0), palette[indices])
        assert torch.equal(crop_to_array(image, 8, channels=1), grey_of_palette)

    black_and_white = Image.fromarray(grey).convert("1")
    assert set(crop_to_array(black_and_white, 8).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte(form):
    values = np.array([[0, 255, 256, 511], [4096, 32768, 65280, 65535]] * 2, dtype=np.uint16)
    image = decode_image(encoded(values, form), "x")
    assert crop_to_array(image, 4, channels=1)[0, :2].tolist() == [[0, 0, 1, 1], [16, 128, 255, 255]]
    assert crop_to_array(image, 4)[2, :2].tolist() == [[0, 0, 1, 1], [16, 128, 255, 255]]


def test_pixels_without_a_range_are_refused():
    floats = encoded(np.ones((4, 4), dtype=np.float32), "TIFF")
    with pytest.raises(ImageError, match=r"^x\.tif has pixels of mode F; convert it to 8 or 16 bits"):
        decode_image(floats, "x.tif")
    large = encoded(np.full((4, 4), 70000, dtype=np.int32), "TIFF")
    with pytest.raises(ImageError, match=r"x\.tif has 32-bit pixels, 70000 to 70000"):
        decode_image(large, "x.tif")
    with pytest.raises(ImageError, match="the image has pixels of mode F"):
        crop_to_array(Image.new("F", (4, 4)), 4)


def test_senseless_crops_are_refused():
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="not 0 and 3"):
        crop_to_array(image, 0)
    with pytest.raises(ValueError, match="not 4 and 2"):
        crop_to_array(image, 4, channels=2)
    with pytest.raises(ImageError, match="100000 x 1 pixels are too thin for a crop of 256 x 256"):
        crop_to_array(Image.new("L", (100000, 1)), 256)


def test_exif_orientation_is_not_applied(tmp_path):
    image = Image.fromarray(pixels(5, 4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    files = {"cat/0.png": buffer.getvalue()}
    sources = [FolderImages(write_folder(tmp_path / "f", files))]
    hub_dataset(files).save_to_disk(tmp_path / "h")
    sources.append(HubImages(tmp_path / "h"))
    for source in sources:
        assert np.array_equal(np.asarray(source.read(0)), pixels(5, 4, 6))


# --- every source gives the same ---------------------------------------------------------------------------------


def folder_source(root: Path) -> Path:
    return write_folder(root)


def classes_in_one_tar(root: Path) -> Path:
    hidden = {"./all/train/cat/._000.png": b"what macOS adds", "./all/.cache/x/0.png": b""}
    return write_tar(root / "images.tar", hidden | {f"./all/train/{name}": data for name, data in FILES.items()})


def classes_in_several_tars(root: Path) -> str:
    for i in range(3):  # four images to the first, three to the second, two to the third
        part = NAMES[[0, 4, 7][i] : [4, 7, 9][i]]
        write_tar(root / f"train-{i}.tar", {name: FILES[name] for name in part})
    write_tar(root / "val-0.tar", {"cat/999.png": FILES[NAMES[0]]})
    return str(root / "train-*.tar")


def one_tar_per_class(root: Path) -> Path:
    for name in CLASSES:
        members = {key.partition("/")[2]: data for key, data in FILES.items() if key.startswith(name)}
        write_tar(root / f"{name}.tar", members)
    return root


def saved_dataset(root: Path) -> Path:
    hub_dataset().save_to_disk(root)
    return root


def saved_splits(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    test = hub_dataset({"cat/7.png": FILES[NAMES[0]]})
    datasets.DatasetDict(test=test, train=hub_dataset()).save_to_disk(root)
    return root


def write_parquet(table, path: Path) -> None:
    """As the hub stores it: the bytes inside."""
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.with_format("arrow")[:], path)


def hub_download(root: Path) -> Path:
    whole = hub_dataset()
    write_parquet(whole.select(range(5)), root / "data" / "train-00000-of-00002.parquet")
    write_parquet(whole.select(range(5, 9)), root / "data" / "train-00001-of-00002.parquet")
    write_parquet(whole.select(range(2)), root / "data" / "test-00000-of-00001.parquet")
    (root / "README.md").write_text("about")
    (root / "example.png").write_bytes(FILES[NAMES[0]])
    return root


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (folder_source, "folder"),
        (classes_in_one_tar, "tar"),
        (classes_in_several_tars, "tar"),
        (one_tar_per_class, "tar"),
        (saved_dataset, "hub"),
        (saved_splits, "hub"),
        (hub_download, "hub"),
    ],
)
def test_every_source_gives_the_same_images(make, kind, tmp_path):
    place = make(tmp_path / "data")
    source = open_images(place)
    assert list(source.names) == NAMES
    assert source.labels.dtype == torch.int64
    assert source.labels.tolist() == LABELS
    assert source.class_names == CLASSES
    assert len(source) == 9
    for index in torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist():
        expected = Image.open(io.BytesIO(FILES[NAMES[index]]))
        image = source.read(index)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    digest = hashlib.sha256()
    for name, label in zip(NAMES, LABELS, strict=True):
        digest.update(f"{name}\0{label}\n".encode())
    expected = {"kind": kind, "path": str(place), "count": 9, "classes": 3, "names_sha256": digest.hexdigest()}
    expected |= {"split": "train"} if kind == "hub" else {}
    assert source.describe() == expected
    assert open_images(place).describe() == json.loads(json.dumps(expected))


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_webdataset_shards_have_their_labels_beside_the_images(suffix, tmp_path):
    members = webdataset(suffix=suffix)
    members["cat/000.mask.png"] = FILES["cat/001.png"]  # an extra of a labelled image
    source = open_images(write_tar(tmp_path / "shard-000.tar", members))
    assert list(source.names) == NAMES
    assert source.labels.tolist() == LABELS
    assert source.class_names == ("0", "1", "2")
    assert np.array_equal(np.asarray(source.read(4)), pixels(11, 9, 10))


def test_cls_wins_over_json_and_equal_keys_of_two_shards_get_the_shards_name(tmp_path):
    picture = FILES[NAMES[0]]
    write_tar(tmp_path / "a-0.tar", {"0.png": picture, "0.json": b'{"label": "a cat"}', "0.cls": b"4"})
    write_tar(tmp_path / "a-1.tar", {"0.png": FILES[NAMES[1]], "0.cls": b"0", "0.json": b'{"label": 1}'})
    source = TarImages(tmp_path)
    assert list(source.names) == ["a-0.tar/0.png", "a-1.tar/0.png"]
    assert source.labels.tolist() == [4, 0]
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert np.array_equal(np.asarray(source.read(1)), pixels(1, 9, 9))
    in_given_files = TarImages([tmp_path / "a-1.tar", tmp_path / "a-0.tar"])
    assert in_given_files.describe() == source.describe()


def test_the_embedded_images_are_a_source():
    source = open_images("fashion-mnist-heldout")
    part = load_embedded_images("heldout")
    assert isinstance(source, ArrayImages)
    assert source.class_names == part.class_names
    assert torch.equal(source.labels, part.labels)
    assert source.read(7).mode == "L"
    assert torch.equal(crop_to_array(source.read(7), 32, channels=1)[0], part.images[7])
    assert source.describe()["path"] == "fashion-mnist-heldout"
    assert len(open_images("fashion-mnist")) == 8000


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 1, 5, 4), (3, 3, 5, 4)])
def test_arrays_come_back(shape):
    array = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ArrayImages(array, torch.tensor([1, 0, 1]), ("a", "b"), "mine")
    assert source.names == ["mine/000000", "mine/000001", "mine/000002"]
    image = source.read(2)
    assert image.mode == ("RGB" if len(shape) == 4 and shape[1] == 3 else "L")
    assert np.array_equal(np.asarray(image), array[2].squeeze() if image.mode == "L" else array[2].permute(1, 2, 0))


def test_bad_arrays_are_refused():
    images_, labels = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be uint8 .* not torch.float32 \(3, 4, 4\)"):
        ArrayImages(images_.float(), labels, ("a",))
    with pytest.raises(ValueError, match=r"not torch.uint8 \(3, 2, 4, 4\)"):
        ArrayImages(torch.zeros(3, 2, 4, 4, dtype=torch.uint8), labels, ("a",))
    with pytest.raises(ValueError, match=r"3 images need as many integer labels, not torch.int64 \(2,\)"):
        ArrayImages(images_, labels[:2], ("a",))
    with pytest.raises(ValueError, match="label 1 is none of 0 to 0"):
        ArrayImages(images_, labels + 1, ("a",))


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_one_class(tmp_path):
    root = write_folder(tmp_path / "faces", {"b.PNG": FILES[NAMES[1]], "a.png": FILES[NAMES[0]], "notes.txt": b"x"})
    source = open_images(root)
    assert list(source.names) == ["a.png", "b.PNG"]
    assert source.class_names == ("faces",)
    assert source.labels.tolist() == [0, 0]
    assert np.array_equal(np.asarray(source.read(1)), pixels(1, 9, 9))


def test_nested_hidden_linked_and_other_files(tmp_path):
    picture = FILES[NAMES[0]]
    files = ["cat/b/1.Jpeg", "cat/b.png", "cat/a.tiff", "dog/x/y/2.WEBP", "cat/.c.png", ".git/1.png", "dog/list.csv"]
    root = write_folder(tmp_path / "r", dict.fromkeys(files, picture))
    elsewhere = write_folder(tmp_path / "elsewhere", {"e.png": picture})
    (root / "eel").symlink_to(elsewhere)
    source = FolderImages(root)
    assert list(source.names) == ["cat/a.tiff", "cat/b.png", "cat/b/1.Jpeg", "dog/x/y/2.WEBP", "eel/e.png"]
    assert source.labels.tolist() == [0, 0, 0, 1, 2]
    assert source.class_names == CLASSES


def test_files_are_listed_without_asking_for_their_status(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "r")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a file's status was asked for")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        patch.setattr(os, "lstat", refuse)
        patch.setattr(images, "_pillow", refuse)
        source = FolderImages(root)
    assert list(source.names) == NAMES


def test_the_digest_changes_with_a_file_and_with_a_label(tmp_path):
    root = write_folder(tmp_path / "r")
    before = FolderImages(root).describe()
    assert FolderImages(root).describe() == before
    (root / "eel" / "new.png").write_bytes(FILES[NAMES[0]])
    after = FolderImages(root).describe()
    assert after["count"] == 10
    assert after["names_sha256"] != before["names_sha256"]
    array = torch.zeros(2, 4, 4, dtype=torch.uint8)
    digests = {ArrayImages(array, torch.tensor(x), ("a", "b")).describe()["names_sha256"] for x in ([0, 1], [1, 0])}
    assert len(digests) == 2


def test_names_that_are_not_unicode_are_described(tmp_path):
    (tmp_path / "c").mkdir()
    with open(os.path.join(os.fsencode(tmp_path), b"c", b"\xff.png"), "wb") as file:
        file.write(FILES[NAMES[0]])
    source = FolderImages(tmp_path)
    assert source.read(0).size == (9, 8)
    assert len(source.describe()["names_sha256"]) == 64


def test_empty_classes_are_named(tmp_path):
    root = write_folder(tmp_path / "r")
    (root / "fox").mkdir()
    write_folder(root / "gnu", {"readme.txt": b""})
    with pytest.raises(ValueError, match=r"2 class folders in .* hold no images: fox, gnu. .*delete the empty ones"):
        open_images(root)


def test_folders_without_images_and_mixed_folders_are_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images; images can be a folder of class folders"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"no images in .*: none ends in \.jpg, \.jpeg"):
        FolderImages(tmp_path)
    (tmp_path / "1.png").write_bytes(FILES[NAMES[0]])
    with pytest.raises(ValueError, match=r"holds images \(1\.png\) beside folders \(a\)"):
        open_images(tmp_path)
    write_tar(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="holds both images and tar files, of which one must go"):
        open_images(tmp_path)


def test_splits_are_not_classes(tmp_path):
    write_folder(tmp_path / "f" / "train")
    write_folder(tmp_path / "f" / "val")
    with pytest.raises(ValueError, match=r"train, val, the parts of a data set: pass one of them, such as .*f/train"):
        open_images(tmp_path / "f")
    write_tar(tmp_path / "t" / "train-0.tar")
    write_tar(tmp_path / "t" / "test-0.tar")
    with pytest.raises(ValueError, match=r"test, train, the parts of a data set: pass one of them, with a glob"):
        open_images(tmp_path / "t")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is nothing at .*/nowhere; images can be a folder of class"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tar files at .*none-"):
        open_images(str(tmp_path / "none-*.tar"))
    with pytest.raises(FileNotFoundError, match=r"the folder .*/nowhere cannot be listed: No such file"):
        FolderImages(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.zip is a file, not a set of images; images can be .*'fashion-mnist'"):
        open_images(tmp_path / "x.zip")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "r")
    (root / "dog").chmod(0)
    try:
        if os.access(root / "dog", os.R_OK):  # the superuser may read it all the same
            scandir = os.scandir

            def refuse(path):
                if str(path).endswith("dog"):
                    raise PermissionError(13, "Permission denied", str(path))
                return scandir(path)

            monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match=r"the folder .*/r/dog cannot be listed: Permission denied"):
            FolderImages(root)
    finally:
        (root / "dog").chmod(0o755)


# --- damaged images ----------------------------------------------------------------------------------------------


def damaged_files() -> dict[str, tuple[bytes, str]]:
    """Contents, and the reason given."""
    jpeg, png = encoded(pixels(0, 64, 64), "JPEG"), encoded(pixels(0, 64, 64))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated|unrecognized|broken"),
        "flipped.png": (bytes(flipped), "broken"),
        "empty.png": (b"", "it is empty"),
        "page.jpg": (b"<html>404</html>", "of no format that Pillow knows"),
    }


@pytest.mark.parametrize("name", list(damaged_files()))
def test_damaged_images_are_named_by_every_source(name, tmp_path):
    data, reason = damaged_files()[name]
    files = {"cat/fine.png": FILES[NAMES[0]], f"cat/{name}": data}
    hub_dataset(files).save_to_disk(tmp_path / "hub")
    write_folder(tmp_path / "folder", files)
    write_tar(tmp_path / "tar" / "x.tar", files)
    for kind in ("folder", "tar", "hub"):
        source = open_images(tmp_path / kind)
        index = list(source.names).index(f"cat/{name}")
        with pytest.raises(ImageError, match=f"cat/{name}.* cannot be decoded: .*({reason})"):
            source.read(index)
        assert np.array_equal(np.asarray(source.read(1 - index)), pixels(0, 8, 9))


def test_decompression_bombs_are_image_errors(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"big\.png cannot be decoded: .*decompression bomb"):
        decode_image(encoded(pixels(0, 64, 64)), "big.png")


def test_a_file_that_vanished_is_an_image_error(tmp_path):
    source = FolderImages(write_folder(tmp_path / "r"))
    (tmp_path / "r" / NAMES[3]).unlink()
    with pytest.raises(ImageError, match=f"{NAMES[3]} cannot be read: No such file"):
        source.read(3)


def test_running_out_of_memory_is_not_the_images_fault(monkeypatch):
    def fail(_file):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode_image(FILES[NAMES[0]], "x")


# --- tar files ---------------------------------------------------------------------------------------------------


def test_a_tar_cut_anywhere_is_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
        end = archive.offset
    cuts = [0, 100, 512, 700, last.offset, last.offset + 100, last.offset_data, last.offset_data + 5, end]
    for cut in cuts:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.tar is truncated"):
            TarImages(path)
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert len(TarImages(tmp_path / "cut.tar")) == 9


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[4]
    data = bytearray(path.read_bytes())
    data[middle.offset + 150] ^= 0xFF  # the checksum
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.tar is truncated or damaged after {middle.offset} bytes"):
        TarImages(path)


def test_compressed_tars_and_other_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"x\.tar is truncated, damaged, or no uncompressed tar file"):
        TarImages(tmp_path / "x.tar")


def test_what_a_tar_cannot_be_used_for_is_said(tmp_path):
    picture = FILES[NAMES[0]]
    cases = [
        ({"a.tar": b"x"}, r"no images in the 1 tar files of .*; tar files in tar files stay closed"),
        ({"0.png": picture, "0.txt": b"a cat"}, r"holds 0\.txt beside its images, so it is no class"),
        ({"0.png": picture, "0.json": b'{"caption": "a cat"}'}, r"holds 0\.json beside its images"),
        ({"0.png": picture, "0.cls": b"cat"}, r"the label of 0\.png in .* is 'cat'; labels are integers from 0"),
        ({"0.png": picture, "0.cls": b"-1"}, r"the label of 0\.png in .* is -1"),
        ({"0.png": picture, "0.json": b'{"label": true}'}, r"the label of 0\.png in .* is True"),
        ({"0.png": picture, "0.cls": b"1", "1.png": picture}, r"1\.png in .* has no label beside it, but other"),
        (
            {"0.input.png": picture, "0.cls": b"1"},
            r"no image is named like a label .*; the last one is 0\.input\.png in .*x\.tar",
        ),
        ({"a/0.png": picture, "1.png": picture}, r"1\.png in .* is in no folder, but other images are"),
        ({"train/a/0.png": picture, "val/a/1.png": picture}, "the tar files hold the folders train, val"),
    ]
    for files, message in cases:
        with pytest.raises(ValueError, match=message):
            TarImages(write_tar(tmp_path / "x.tar", files))
    (tmp_path / "x.tar").unlink()
    one_tar_per_class(tmp_path)
    write_tar(tmp_path / "fox.tar", {})
    with pytest.raises(ValueError, match=r"fox\.tar holds no images, so it is no class"):
        TarImages(tmp_path)


def test_links_in_a_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"cat/1\.png in .*x\.tar is a link or sparse; pack again"):
        TarImages(tmp_path / "x.tar")


def test_a_tar_that_shrinks_after_it_was_indexed_is_an_image_error(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    source = TarImages(path)
    os.truncate(path, 2000)
    with pytest.raises(ImageError, match=r"eel/003\.png in .*x\.tar cannot be read: the tar file was truncated"):
        source.read(8)
    unopened = TarImages(write_tar(path))
    path.unlink()
    with pytest.raises(ImageError, match=r"cat/000\.png in .*x\.tar cannot be read: No such file"):
        unopened.read(0)


def test_threads_and_a_forked_process_read_from_more_tars_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(image_archives, "OPEN_FILES", 2)
    for i in range(12):
        members = {f"c{i:02}/{j}.png": encoded(np.full((4, 4, 3), 8 * i + j, np.uint8)) for j in range(4)}
        write_tar(tmp_path / f"s{i:02}.tar", members)
    source = TarImages(tmp_path)
    expected = [8 * i + j for i in range(12) for j in range(4)]

    def values(seed: int) -> bool:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed)).tolist()
        return all(source.read(index).getpixel((0, 0)) == (expected[index],) * 3 for index in order)

    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    right: list[bool] = []
    threads = [threading.Thread(target=lambda seed=seed: right.append(values(seed))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which have ended
        child = os.fork()
    if child == 0:
        os._exit(0 if values(9) else 1)
    ours = values(10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ours


# --- Hugging Face data sets --------------------------------------------------------------------------------------


def test_a_split_is_chosen_by_name(tmp_path):
    saved = saved_splits(tmp_path / "saved")
    assert list(HubImages(saved, split="test").names) == ["cat/7.png"]
    with pytest.raises(ValueError, match="has no split 'val'; it has test, train"):
        HubImages(saved, split="val")
    downloaded = hub_download(tmp_path / "downloaded")
    assert list(HubImages(downloaded, split="test").names) == NAMES[:2]
    assert list(open_images(downloaded, split="test").names) == NAMES[:2]
    assert open_images(downloaded, split="test").describe()["split"] == "test"
    with pytest.raises(ValueError, match=r"is not a Hugging Face data set and has no split 'test'"):
        open_images(folder_source(tmp_path / "folder"), split="test")
    write_parquet(hub_dataset(), tmp_path / "only" / "default" / "test-set" / "0000.parquet")
    only = open_images(tmp_path / "only")
    assert len(only) == 9


def test_the_names_that_the_hub_once_gave_to_files_are_understood(tmp_path):
    whole = hub_dataset()
    write_parquet(whole.select(range(5)), tmp_path / "data" / "train-00000-of-00002-c08a401c53fe5312.parquet")
    write_parquet(whole.select(range(5, 9)), tmp_path / "data" / "train-00001-of-00002-0123456789abcdef.parquet")
    write_parquet(whole.select(range(2)), tmp_path / "data" / "validation-00000-of-00001-00deadbeef00cafe.parquet")
    assert list(open_images(tmp_path).names) == NAMES
    assert list(open_images(tmp_path, split="validation").names) == NAMES[:2]


def test_images_without_file_names_are_called_by_their_row(tmp_path):
    hub_dataset(named=False).save_to_disk(tmp_path / "a")
    assert list(open_images(tmp_path / "a").names[:2]) == ["train/00000000", "train/00000001"]
    repeated = hub_dataset().select([0, 0, 1])
    repeated.save_to_disk(tmp_path / "b")
    assert list(open_images(tmp_path / "b").names) == ["train/00000000", "train/00000001", "train/00000002"]


def test_a_parquet_file_without_hugging_faces_metadata_and_with_plain_integers(tmp_path):
    import pyarrow
    from pyarrow import parquet

    stored = [{"bytes": FILES[NAMES[0]], "path": "x.png"}, None, {"bytes": None, "path": None}]
    table = pyarrow.table({"id": [5, 6, 7], "picture": stored, "fine_label": pyarrow.array([2, 0, 1], pyarrow.int32())})
    (tmp_path / "p").mkdir()
    parquet.write_table(table, tmp_path / "p" / "train.parquet")
    source = open_images(tmp_path / "p")
    assert source.labels.tolist() == [2, 0, 1]
    assert source.class_names == ("0", "1", "2")
    assert np.array_equal(np.asarray(source.read(0)), pixels(0, 8, 9))
    for row in (1, 2):
        with pytest.raises(ImageError, match=f"train/0000000{row} in .*: the data set holds nothing for this image"):
            source.read(row)


def test_images_that_a_data_set_only_points_to_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = write_folder(tmp_path / "files")
    rows = {"image": [str(root / name) for name in NAMES[:4]], "label": LABELS[:4]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    write_parquet(datasets.Dataset.from_dict(rows, features=features), tmp_path / "p" / "train.parquet")
    (root / NAMES[1]).unlink()
    source = open_images(tmp_path / "p")
    assert list(source.names) == NAMES[:4]
    assert np.array_equal(np.asarray(source.read(3)), pixels(10, 8, 10))
    with pytest.raises(ImageError, match=r"cat/001\.png in .* cannot be read: No such file or directory \(.*files"):
        source.read(1)


def test_what_a_data_set_lacks_is_said(tmp_path):
    whole = hub_dataset()
    whole.remove_columns("label").save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="has 9 rows with the columns image; it needs images, and labels"):
        open_images(tmp_path / "a")
    whole.remove_columns("image").save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="with the columns label; it needs images"):
        open_images(tmp_path / "b")
    whole.map(lambda row: {"label": -1}).save_to_disk(tmp_path / "c")
    with pytest.raises(ValueError, match="has rows without a label"):
        open_images(tmp_path / "c")


def test_damaged_data_sets_are_named(tmp_path):
    saved = saved_dataset(tmp_path / "saved")
    arrow = next(saved.glob("*.arrow"))
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"saved is no readable Hugging Face data set .*get or save it again"):
        open_images(saved)
    downloaded = hub_download(tmp_path / "downloaded")
    os.truncate(downloaded / "data" / "train-00001-of-00002.parquet", 300)
    with pytest.raises(ValueError, match="downloaded is no readable Hugging Face data set"):
        open_images(downloaded)
    write_parquet(hub_dataset(), tmp_path / "two" / "a" / "train.parquet")
    write_parquet(hub_dataset(), tmp_path / "two" / "b" / "train.parquet")
    with pytest.raises(
        ValueError, match=r"several folders hold files of the split 'train', pass one: .*two/a, .*two/b"
    ):
        open_images(tmp_path / "two")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    hub_dataset().save_to_disk(tmp_path / "h")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lwd\[encoders\]"'):
        open_images(tmp_path / "h")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "lwd\[encoders\]"'):
        decode_image(b"", "x")


# --- class names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "eel European eel\n\ncat tabby, tabby cat\ndog\ta dog\n",
        '{"cat": "tabby, tabby cat", "eel": "European eel", "dog": "a dog", "fox": "unused"}',
    ],
)
def test_class_names_come_from_a_file_and_keep_the_order_of_the_folders(text, tmp_path):
    table = tmp_path / "names.txt"
    table.write_text(text)
    source = open_images(write_folder(tmp_path / "r"), classes=table)
    assert source.class_names == ("tabby, tabby cat", "a dog", "European eel")
    assert source.labels.tolist() == LABELS
    assert list(source.names) == NAMES


def test_bad_class_names_are_refused(tmp_path):
    table = tmp_path / "names"
    for text, message in [
        ("cat x\ndog y\n", "has no name for 1 of 3 classes: eel"),
        ("cat x\ndog\neel z\n", "has no name for 1 of 3 classes: dog"),
        ("cat x\ncat y\n", "names is no table of class names: it names a class twice"),
        ('{"cat": "x"', "names is no table of class names: Expecting"),
        ('{"cat": "x", "dog": ["y"], "eel": "z"}', "has no name for 1 of 3 classes: dog"),
    ]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(table, CLASSES)
    table.write_bytes(b"cat \xff")
    with pytest.raises(ValueError, match="no table of class names"):
        read_class_names(table, CLASSES)
    table.write_text("tree frog\tHyla\ncat\ttabby\n")
    assert read_class_names(table, ("cat", "tree frog")) == ("tabby", "Hyla")
